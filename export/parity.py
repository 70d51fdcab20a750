"""Compares the ONNX file with PyTorch: single network calls, whole trajectories and sample quality."""

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.data.dataset import Dataset
from diffusion.evaluation.features import Features, fit_features
from diffusion.evaluation.sample_metrics import SampleMetrics
from diffusion.process.forward import q_sample
from diffusion.process.generate import Condition, cycling_labels, denoiser
from diffusion.process.samplers import SamplerTable, last_sample, sampler_table, trajectory
from diffusion.process.sampling_methods import SamplingMethod
from diffusion.registry import SAMPLERS
from diffusion.training.checkpoints import TrainedModel
from export.contract import LABEL, SamplerSpec, X
from export.noise import normal_noise
from export.sampler import Sampler
from export.session import open_session

# Tolerances are relative to the largest output of PyTorch.
STEP_TOLERANCE = 1e-4
# Larger, since a trajectory accumulates errors.
TRAJECTORY_TOLERANCE = 1e-3
# For weights stored in 16 bits, compared with the original model: float16 has 11 significant bits.
STORAGE_TOLERANCE = 1e-2

_SEED = 0
_BATCH_SIZES = (1, 3, 7)
_NUM_GRID_TIMESTEPS = 9
_TIMESTEPS_PER_CALL = 64
_NUM_TRAJECTORIES = 8
_MAX_SAMPLES = 256  # PyTorch and ONNX Runtime both draw them
_GUIDANCE_SCALE = 3.0
_DEPLOYED = "deployed sampler"
_EVERY_TIMESTEP = "every timestep"
# A trajectory whose output, in units of the data's standard deviation, exceeds this has diverged: it
# amplifies rounding errors without bound, so it says nothing about the file. Only the deployed sampler must
# not diverge.
_DIVERGED = 1e3

# (x, timestep, labels, guidance_scale) -> output
DenoiseFunction = Callable[[NDArray[np.float64], int, NDArray[np.int64] | None, float], NDArray[np.float64]]


class ParityError(RuntimeError):
    """The exported graph does not compute what PyTorch computes; the message names the first failed case."""


@dataclass(frozen=True)
class ParityCase:
    """Result of one comparison.

    Attributes:
        name: name of what was compared.
        max_abs_error: largest absolute difference.
        output_scale: largest absolute value of PyTorch's output.
        passed: whether the difference is within the tolerance times that scale.
        rms_error: root mean square of the differences.
    """

    name: str
    max_abs_error: float
    output_scale: float
    passed: bool
    rms_error: float = 0.0


def check_parity(model: TrainedModel, onnx_file: bytes) -> list[ParityCase]:
    """Compare PyTorch with ONNX Runtime on the CPU, starting from the same noise.

    The comparisons are single calls at batch sizes 1, 3 and 7 over a grid of timesteps, single calls at
    every timestep, whose inputs are samples of the model with that timestep's noise, and whole trajectories:
    the deployed sampler, and every sampler of `SAMPLERS` over at most its `parity_steps`, each with and
    without clipping. For a conditional model, labels cycle through the classes, and all but the calls at
    every timestep, whose labels include the null label, run with and without guidance. Trajectories that
    diverge in PyTorch are left out, except the deployed sampler's.
    """
    own_scale = model.config.sampler.guidance_scale
    conditional = model.data.num_classes > 0
    runs: dict[str, tuple[float, Callable[[DenoiseFunction], NDArray[np.float64]]]] = {}
    may_diverge = set()
    for scale in [1.0] + ([_GUIDANCE_SCALE if own_scale == 1.0 else own_scale] if conditional else []):
        suffix = f", guidance {scale:g}" if conditional else ""
        for batch_size in _BATCH_SIZES:
            run = partial(_single_calls, model, batch_size, scale)
            runs[f"one step, batch {batch_size}{suffix}"] = STEP_TOLERANCE, run
        for name, table in _tables(model).items():
            run = partial(_draw_samples, model, table, scale, _NUM_TRAJECTORIES)
            runs[name + suffix] = TRAJECTORY_TOLERANCE, run
            if name != _DEPLOYED or scale != own_scale:
                may_diverge.add(name + suffix)

    # First all of PyTorch, then all of ONNX Runtime, whose threads would slow PyTorch's down.
    expected = {name: run(_torch_denoise(model)) for name, (_, run) in runs.items()}
    sampler = Sampler(onnx_file, provider="cpu")
    actual = {name: run(sampler.denoise) for name, (_, run) in runs.items()}
    cases = [compare(name, actual[name], expected[name], tolerance) for name, (tolerance, _) in runs.items()]
    samples = next(values for name, values in expected.items() if name.startswith(_DEPLOYED))
    cases.append(_every_timestep(model, onnx_file, sampler.spec, samples))
    diverged = {case.name for case in cases if not case.output_scale <= _DIVERGED}
    return [case for case in cases if case.name not in diverged & may_diverge]


def check_network(network: torch.nn.Module, onnx_file: bytes) -> list[ParityCase]:
    """Compare a network with its file, of any format version, on the CPU, starting from the same noise.

    The comparisons are every output of single calls at batch sizes 1, 3 and 7 in each row of the default
    sampler, then that sampler's samples, for a conditional model with and without guidance.

    Args:
        network: network in evaluation mode, with the positional arguments `SamplerSpec.graph_inputs` and
            the outputs `SamplerSpec.graph_outputs`.
        onnx_file: bytes of the file.
    """
    sampler, (session, _) = Sampler(onnx_file, provider="cpu"), open_session(onnx_file, "cpu")
    spec, cases = sampler.spec, []
    names = list(spec.graph_outputs)
    for batch_size in _BATCH_SIZES:
        x = normal_noise(_SEED, np.arange(batch_size), 0, spec.shape)
        calls = [_network_inputs(spec, x, level) for level in spec.table.network_levels]
        expected = [_call_torch(network, inputs) for inputs in calls]
        actual = [session.run(names, inputs) for inputs in calls]
        for index, name in enumerate(names):
            values, references = (
                np.stack([outputs[index] for outputs in each]) for each in (actual, expected)
            )
            cases.append(compare(f"{name}, batch {batch_size}", values, references, STEP_TOLERANCE))
    scales = [None] if not spec.classes else sorted({1.0, float(spec.sampler["guidance_scale"])})
    mean, std = np.array(spec.data["mean"]), np.array(spec.data["std"])
    for scale in scales:
        suffix = "" if scale is None else f", guidance {scale:g}"
        drawn = sampler.sample(
            _NUM_TRAJECTORIES,
            seed=_SEED,
            guidance_scale=scale,
            conditions=_condition_values(spec, _NUM_TRAJECTORIES),
        )
        expected_samples = spec.denormalise(_network_samples(network, spec, 1.0 if scale is None else scale))
        actual_x, expected_x = ((samples - mean) / std for samples in (drawn, expected_samples))
        cases.append(compare(_DEPLOYED + suffix, actual_x, expected_x, TRAJECTORY_TOLERANCE))
    return cases


def check_storage(model: TrainedModel, onnx_file: bytes) -> list[ParityCase]:
    """Compare a file whose weights are stored in 16 bits with the original model.

    The tolerance is `STORAGE_TOLERANCE`. It applies to the largest difference of single calls, and to the
    root mean square difference of samples, since a sample between two modes may end in either.
    """
    sampler, torch_denoise = Sampler(onnx_file, provider="cpu"), _torch_denoise(model)
    scale = model.config.sampler.guidance_scale if model.data.num_classes else 1.0
    calls = partial(_single_calls, model, _BATCH_SIZES[-1], scale)
    step = compare(
        "weights in 16 bits, one step", calls(sampler.denoise), calls(torch_denoise), STORAGE_TOLERANCE
    )
    samples = partial(_draw_samples, model, model.table, scale, _NUM_TRAJECTORIES)
    end = compare(
        "weights in 16 bits, deployed sampler",
        samples(sampler.denoise),
        samples(torch_denoise),
        STORAGE_TOLERANCE,
    )
    passed = end.rms_error <= STORAGE_TOLERANCE * end.output_scale
    return [step, dataclasses.replace(end, passed=passed)]


def check_samples(
    model: TrainedModel, onnx_file: bytes, dataset: Dataset, features: Features | None = None
) -> list[ParityCase]:
    """Compare the quality of samples by PyTorch and ONNX Runtime: their `sample/distance` to the data.

    Args:
        model: the model that the file was exported from.
        onnx_file: bytes of the file, which runs on the CPU.
        dataset: the data set that the model was trained on.
        features: features that images are compared by; None fits those of the model's config.

    Returns:
        One comparison. It passes if the two distances differ by at most the standard error of PyTorch's
        distance, which is also its scale.
    """
    features = features or fit_features(dataset, model.config.metrics.features)
    num_samples = min(_MAX_SAMPLES, len(dataset.train))
    scale = model.config.sampler.guidance_scale
    expected = _draw_samples(model, model.table, scale, num_samples, _torch_denoise(model))
    actual = Sampler(onnx_file, provider="cpu").sample(num_samples, seed=_SEED)
    spec, metrics = model.data, SampleMetrics(dataset, dataset.val[:], features)
    mean, std = np.array(spec.mean), np.array(spec.std)
    by_torch, by_onnx = (
        metrics.distance(torch.from_numpy((samples - mean) / std).float())
        for samples in (spec.denormalise(expected), actual)
    )
    error = abs(by_onnx.value - by_torch.value)
    passed = bool(error <= by_torch.standard_error)
    return [ParityCase(f"distance of {num_samples} samples", error, abs(by_torch.value), passed, error)]


def require(cases: list[ParityCase]) -> None:
    """Raise an error unless all comparisons passed.

    Raises:
        ParityError: a comparison failed.
    """
    for case in cases:
        if not case.passed:
            raise ParityError(
                f"parity failed ({case.name}): PyTorch and ONNX Runtime differ by {case.max_abs_error:.2g}, "
                f"with outputs of up to {case.output_scale:.2g}; nothing was written"
            )


def summary(cases: list[ParityCase]) -> dict[str, Any]:
    """Convert comparisons to the content of parity.json."""
    return {"passed": all(case.passed for case in cases), "cases": [asdict(case) for case in cases]}


def compare(
    name: str, actual: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float
) -> ParityCase:
    """Compare an output of ONNX Runtime with PyTorch's, `expected`; NaN and infinity never pass."""
    scale = float(np.abs(expected).max())
    error = float(np.abs(actual - expected).max())
    passed = bool(np.isfinite(scale) and error <= tolerance * max(scale, 1e-6))
    return ParityCase(name, error, scale, passed, float(np.sqrt(np.square(actual - expected).mean())))


def _tables(model: TrainedModel) -> dict[str, SamplerTable]:
    """Samplers whose trajectories are compared, by name."""
    num_train_timesteps = model.schedule.num_train_timesteps
    tables = {_DEPLOYED: model.table}
    for clip in (model.data.clip, None):
        suffix = "clipped" if clip else "unclipped"
        method: SamplingMethod
        for name, method in SAMPLERS.items():
            num_steps = min(method.parity_steps, num_train_timesteps)
            tables[f"{name}, {num_steps} steps, {suffix}"] = sampler_table(
                model.schedule, name, num_steps, prediction_type=model.config.prediction_type, clip=clip
            )
    return tables


def _single_calls(
    model: TrainedModel, batch_size: int, guidance_scale: float, denoise: DenoiseFunction
) -> NDArray[np.float64]:
    """Outputs for one batch of noise over a grid of timesteps: float64 [timesteps, batch, *shape]."""
    x = normal_noise(_SEED, np.arange(batch_size), 0, model.data.shape)
    grid = np.linspace(0, model.schedule.num_train_timesteps - 1, _NUM_GRID_TIMESTEPS).round().astype(int)
    labels = _labels(model, batch_size)
    return np.stack([denoise(x, int(t), labels, guidance_scale) for t in np.unique(grid)])


def _every_timestep(
    model: TrainedModel, onnx_file: bytes, spec: SamplerSpec, samples: NDArray[np.float64]
) -> ParityCase:
    """Compare single calls at all timesteps of the schedule, many of them in each batch.

    Args:
        model: the model that the file was exported from.
        onnx_file: bytes of the file.
        spec: the file's metadata.
        samples: [n, *shape] samples of the model, normalised, to which the timesteps' noise is added.
    """
    timesteps = np.arange(model.schedule.num_train_timesteps)
    x_0 = torch.from_numpy(samples[timesteps % len(samples)])
    noise = torch.from_numpy(normal_noise(_SEED, timesteps, 0, model.data.shape))
    x_t = q_sample(model.schedule, x_0, torch.from_numpy(timesteps), noise).numpy()
    labels = timesteps % (model.data.num_classes + 1)
    batches = [slice(first, first + _TIMESTEPS_PER_CALL) for first in timesteps[::_TIMESTEPS_PER_CALL]]
    calls = [_network_inputs(spec, x_t[rows], timesteps[rows], labels[rows]) for rows in batches]
    expected = [_call_torch(model.network, inputs)[0] for inputs in calls]
    session, _ = open_session(onnx_file, "cpu")
    actual = [session.run(None, inputs)[0] for inputs in calls]
    return compare(_EVERY_TIMESTEP, np.concatenate(actual), np.concatenate(expected), STEP_TOLERANCE)


def _draw_samples(
    model: TrainedModel,
    table: SamplerTable,
    guidance_scale: float,
    num_samples: int,
    denoise: DenoiseFunction,
) -> NDArray[np.float64]:
    """The first samples of `_SEED`, with labels cycling through the classes.

    Returns:
        float64 [num_samples, *shape], normalised.
    """
    indices, labels = np.arange(num_samples), _labels(model, num_samples)

    def noise(row: int) -> NDArray[np.float64]:
        return normal_noise(_SEED, indices, row + 1, model.data.shape)

    def denoise_labelled(x: NDArray[np.float64], timestep: int) -> NDArray[np.float64]:
        return denoise(x, timestep, labels, guidance_scale)

    return last_sample(trajectory(denoise_labelled, noise(-1), table, noise))


def _condition_values(spec: SamplerSpec, count: int) -> dict[str, NDArray[np.float64]]:
    """Some value of each condition for each sample, in the condition's units."""
    return {
        each.name: normal_noise(_SEED + 1, np.arange(count), index, each.shape) * np.array(each.std)
        + np.array(each.mean)
        for index, each in enumerate(spec.conditions)
    }


def _network_inputs(
    spec: SamplerSpec,
    x: NDArray[np.float64],
    level: float | NDArray[np.int64],
    labels: NDArray[np.int64] | None = None,
) -> dict[str, NDArray[Any]]:
    """Inputs of the network by name, with labels cycling through the classes unless they are given.

    `level` is the level of all rows, or that of each.
    """
    level_type, _ = spec.graph_inputs[spec.level_input]
    inputs = {X: x.astype(np.float32), spec.level_input: np.full(len(x), level, dtype=level_type)}
    if spec.classes:
        inputs[LABEL] = cycling_labels(len(x), len(spec.classes)).numpy() if labels is None else labels
    values = _condition_values(spec, len(x))
    return inputs | {each.input_name: each.normalise(values[each.name]) for each in spec.conditions}


@torch.no_grad()
def _call_torch(network: torch.nn.Module, inputs: dict[str, NDArray[Any]]) -> list[NDArray[np.float64]]:
    outputs = network(*(torch.from_numpy(value) for value in inputs.values()))
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def _network_samples(
    network: torch.nn.Module, spec: SamplerSpec, guidance_scale: float
) -> NDArray[np.float64]:
    """Samples of the default sampler by PyTorch, float64 [_NUM_TRAJECTORIES, *shape], normalised."""
    indices = np.arange(_NUM_TRAJECTORIES)
    null_labels = np.full(_NUM_TRAJECTORIES, len(spec.classes))

    def noise(row: int) -> NDArray[np.float64]:
        return normal_noise(_SEED, indices, row + 1, spec.shape)

    def denoise(x: NDArray[np.float64], level: float) -> Any:
        outputs = _call_torch(network, _network_inputs(spec, x, level))
        out, *variance = (output.astype(np.float64) for output in outputs)
        if spec.classes and guidance_scale != 1.0:
            null, *_ = _call_torch(network, _network_inputs(spec, x, level, null_labels))
            out = null + guidance_scale * (out - null)
        return (out, *variance) if variance else out

    return last_sample(trajectory(denoise, noise(-1), spec.table, noise))


def _labels(model: TrainedModel, count: int) -> NDArray[np.int64] | None:
    return cycling_labels(count, model.data.num_classes).numpy() if model.data.num_classes else None


def _torch_denoise(model: TrainedModel) -> DenoiseFunction:
    """PyTorch's counterpart of `Sampler.denoise`."""

    def denoise(
        x: NDArray[np.float64], timestep: int, labels: NDArray[np.int64] | None, guidance_scale: float
    ) -> NDArray[np.float64]:
        condition = None
        if labels is not None:
            condition = Condition(torch.from_numpy(labels), model.data.num_classes, guidance_scale)
        return denoiser(model.network, condition)(torch.from_numpy(x), timestep).numpy()

    return denoise
