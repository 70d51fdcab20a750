"""Does the ONNX file compute what PyTorch computes? Step by step, and over whole trajectories."""

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.checkpoints import TrainedModel
from diffusion.generation import Condition, classes_in_turn, denoiser
from diffusion.sampling import SamplerName, SamplerTable, last_sample, sampler_table, trajectory
from export.noise import normal_noise
from export.sampler import Sampler

STEP_TOLERANCE = 1e-4
# A trajectory feeds its errors back into itself.
TRAJECTORY_TOLERANCE = 1e-3
# Beyond this, in units of the data's deviation, a trajectory has diverged: it multiplies rounding errors
# without bound, so it says nothing about the file. Only the deployed sampler must not do that.
_DIVERGED = 1e3
_DEPLOYED = "deployed sampler"
_BATCHES = (1, 3, 7)
_GRID_SIZE = 9
_NUM_TRAJECTORIES, _NUM_LONGEST_TRAJECTORIES = 8, 2
SEED = 0
_GUIDANCE = 3.0

# Of weights in 16 bits, against the model itself: 11 bits of each are right.
STORAGE_TOLERANCE = 1e-2

# (x, timestep, labels, guidance_scale) -> output
Engine = Callable[[NDArray[np.float64], int, NDArray[np.int64] | None, float], NDArray[np.float64]]


class ParityError(RuntimeError):
    """The exported graph does not compute what PyTorch computes; the message names the first case."""


@dataclass(frozen=True)
class ParityCase:
    """One comparison.

    Attributes:
        name: of what was compared.
        max_abs_error: the largest difference.
        output_scale: the largest value of PyTorch's output.
        passed: whether the difference is within the tolerance times that scale.
        rms_error: root mean square of the differences.
    """

    name: str
    max_abs_error: float
    output_scale: float
    passed: bool
    rms_error: float = 0.0


def require(cases: list[ParityCase]) -> None:
    """Let nothing pass that failed.

    Raises:
        ParityError: a comparison failed.
    """
    for case in cases:
        if not case.passed:
            raise ParityError(
                f"parity failed ({case.name}): PyTorch and ONNX Runtime differ by {case.max_abs_error:.2g} "
                f"where the output reaches {case.output_scale:.2g}; nothing was written"
            )


def check_parity(model: TrainedModel, onnx_file: bytes) -> list[ParityCase]:
    """Compare PyTorch with ONNX Runtime on the CPU from shared noise.

    Single calls at batch 1, 3 and 7 over a grid of timesteps, then whole trajectories: the deployed
    sampler, DDPM over all timesteps, DDIM over at most 50 and DPM-Solver++(2M) over at most 20,
    clipped and not. A conditional model is asked for every class in turn, with guidance and without.
    Trajectories that diverge in PyTorch are left out, unless they are the deployed sampler's.
    """
    own = model.config.sampler.guidance_scale
    runs: dict[str, tuple[float, Callable[[Engine], NDArray[np.float64]]]] = {}
    may_diverge = set()
    for scale in [1.0] + ([_GUIDANCE if own == 1.0 else own] if model.data.num_classes else []):
        suffix = f", guidance {scale:g}" if model.data.num_classes else ""
        for batch in _BATCHES:
            run = partial(_single_calls, model, batch, scale)
            runs[f"one step, batch {batch}{suffix}"] = STEP_TOLERANCE, run
        for name, table in _tables(model).items():
            longest = name.startswith("ddpm") and scale != 1.0
            count = _NUM_LONGEST_TRAJECTORIES if longest else _NUM_TRAJECTORIES
            run = partial(end_of_trajectory, model, table, scale, count)
            runs[name + suffix] = TRAJECTORY_TOLERANCE, run
            if name != _DEPLOYED or scale != own:
                may_diverge.add(name + suffix)

    # One engine after the other: ONNX Runtime's threads would starve torch's.
    expected = {name: run(torch_engine(model)) for name, (_, run) in runs.items()}
    sampler = Sampler(onnx_file, provider="cpu")
    actual = {name: run(sampler.denoise) for name, (_, run) in runs.items()}
    cases = [_compare(name, actual[name], expected[name], tolerance) for name, (tolerance, _) in runs.items()]
    diverged = {case.name for case in cases if not case.output_scale <= _DIVERGED}
    return [case for case in cases if case.name not in diverged & may_diverge]


def check_storage(model: TrainedModel, onnx_file: bytes) -> list[ParityCase]:
    """What storing the weights in 16 bits costs: a file with such weights against the model itself.

    Held to `STORAGE_TOLERANCE`: single calls by their largest difference, the deployed sampler's samples
    by the root mean square, since a sample between two modes may fall either way.
    """
    sampler, engine = Sampler(onnx_file, provider="cpu"), torch_engine(model)
    own = model.config.sampler.guidance_scale if model.data.num_classes else 1.0
    calls = partial(_single_calls, model, _BATCHES[-1], own)
    step = _compare("weights in 16 bits, one step", calls(sampler.denoise), calls(engine), STORAGE_TOLERANCE)
    samples = partial(end_of_trajectory, model, model.table, own, _NUM_TRAJECTORIES)
    end = _compare(
        "weights in 16 bits, deployed sampler",
        samples(sampler.denoise),
        samples(engine),
        STORAGE_TOLERANCE,
    )
    passed = end.rms_error <= STORAGE_TOLERANCE * end.output_scale
    return [step, dataclasses.replace(end, passed=passed)]


def summary(cases: list[ParityCase]) -> dict[str, Any]:
    """The content of parity.json."""
    return {"passed": all(case.passed for case in cases), "cases": [asdict(case) for case in cases]}


def _tables(model: TrainedModel) -> dict[str, SamplerTable]:
    schedule, total = model.schedule, model.schedule.num_train_timesteps
    tables = {_DEPLOYED: model.table}
    for clip in (model.data.clip, None):
        suffix = "clipped" if clip else "unclipped"
        samplers: dict[SamplerName, int] = {"ddpm": total, "ddim": min(50, total), "dpmpp_2m": min(20, total)}
        for name, steps in samplers.items():
            tables[f"{name}, {steps} steps, {suffix}"] = sampler_table(
                schedule, name, steps, prediction_type=model.config.prediction_type, clip=clip
            )
    return tables


def _single_calls(model: TrainedModel, batch: int, scale: float, engine: Engine) -> NDArray[np.float64]:
    x = normal_noise(SEED, np.arange(batch), 0, model.data.shape)
    grid = np.linspace(0, model.schedule.num_train_timesteps - 1, _GRID_SIZE).round().astype(int)
    labels = _labels(model, batch)
    return np.stack([engine(x, int(t), labels, scale) for t in np.unique(grid)])


def end_of_trajectory(
    model: TrainedModel, table: SamplerTable, scale: float, count: int, engine: Engine
) -> NDArray[np.float64]:
    """Samples 0 to `count` - 1 of `SEED`, every class in turn: float64 [count, *shape], normalised."""
    indices, labels = np.arange(count), _labels(model, count)

    def noise(row: int) -> NDArray[np.float64]:
        return normal_noise(SEED, indices, row + 1, model.data.shape)

    def denoise(x: NDArray[np.float64], timestep: int) -> NDArray[np.float64]:
        return engine(x, timestep, labels, scale)

    return last_sample(trajectory(denoise, noise(-1), table, noise))


def _labels(model: TrainedModel, count: int) -> NDArray[np.int64] | None:
    return classes_in_turn(count, model.data.num_classes).numpy() if model.data.num_classes else None


def torch_engine(model: TrainedModel) -> Engine:
    """The model's network in PyTorch."""

    def engine(
        x: NDArray[np.float64], timestep: int, labels: NDArray[np.int64] | None, scale: float
    ) -> NDArray[np.float64]:
        condition = None
        if labels is not None:
            condition = Condition(torch.from_numpy(labels), model.data.num_classes, scale)
        return denoiser(model.network, condition)(torch.from_numpy(x), timestep).numpy()

    return engine


def _compare(
    name: str, actual: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float
) -> ParityCase:
    scale = float(np.abs(expected).max())
    error = float(np.abs(actual - expected).max())
    passed = bool(np.isfinite(scale) and error <= tolerance * max(scale, 1e-6))
    return ParityCase(name, error, scale, passed, float(np.sqrt(np.square(actual - expected).mean())))
