"""Compares the ONNX file with PyTorch: single network calls, whole trajectories and sample quality."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.data.dataset import Dataset
from diffusion.evaluation.features import Features
from diffusion.evaluation.sample_metrics import SampleMetrics
from diffusion.process.forward import q_sample
from diffusion.process.samplers import SamplerTable, sampler_table
from diffusion.process.sampling_methods import SamplingMethod
from diffusion.registry import SAMPLERS
from export.contract import SamplerSpec
from export.sampler import Sampler
from export.session import open_session
from export.torch_sampler import Conditions, TorchSampler

# Tolerances are relative to the largest output of PyTorch.
STEP_TOLERANCE = 1e-4
# Larger, since a trajectory accumulates errors.
TRAJECTORY_TOLERANCE = 1e-3
# For weights stored in 16 bits, compared with the original model: float16 has 11 significant bits.
STORAGE_TOLERANCE = 1e-2

_BATCH_SIZES = (1, 3, 7)
_NUM_GRID_TIMESTEPS = 9
_TIMESTEPS_PER_CALL = 64
# Limits on network evaluations, each by PyTorch and by ONNX Runtime: for a U-Net they take all the time.
_NUM_TRAJECTORIES, _EVALUATIONS_OF_TRAJECTORIES = 8, 100  # of each sampler
_FEWEST_SAMPLES, _MOST_SAMPLES, _EVALUATIONS_OF_SAMPLES = 32, 256, 1280
_GUIDANCE_SCALE = 3.0
_CLIP = (-1.0, 1.0)  # of a model that is deployed without
_DEPLOYED = "deployed sampler"
_EVERY_TIMESTEP = "every timestep"
# A trajectory whose output, in units of the data's standard deviation, exceeds this has diverged: it
# amplifies rounding errors without bound, so it says nothing about the file. Only the deployed sampler must
# not diverge.
_DIVERGED = 1e3

# (x, level, labels, guidance_scale, conditions) -> output
DenoiseFunction = Callable[
    [NDArray[np.float64], float | NDArray[np.int64], NDArray[np.int64] | None, float, Conditions],
    NDArray[np.float64],
]


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


def check_parity(reference: TorchSampler, sampler: Sampler) -> list[ParityCase]:
    """Compare PyTorch with ONNX Runtime, starting from the same noise.

    The comparisons are single calls at batch sizes 1, 3 and 7 over a grid of timesteps, single calls at
    every timestep, whose inputs are samples of the model with that timestep's noise, and whole trajectories:
    the deployed sampler, and every sampler of `SAMPLERS` over at most its `parity_steps`, each with and
    without clipping. For a conditional model, labels cycle through the classes, and all but the calls at
    every timestep, whose labels include the null label, run with and without guidance. Trajectories that
    diverge in PyTorch are left out, except the deployed sampler's.

    A wrong output at any timestep is found by the calls at every timestep, with as many different inputs, of
    which many share one call of the network. What trajectories add is that differences accumulate, in the
    right order of timesteps, over all rows of a table. Their number adds little, and their rows cannot share
    calls, so it falls with the number of rows, to one.

    Args:
        reference: PyTorch's counterpart of the file.
        sampler: the file, on the CPU.
    """
    spec = reference.spec
    own_scale, conditional = float(spec.sampler["guidance_scale"]), bool(spec.classes)
    runs: dict[str, tuple[float, Callable[[DenoiseFunction], NDArray[np.float64]]]] = {}
    may_diverge = set()
    for scale in [1.0] + ([_GUIDANCE_SCALE if own_scale == 1.0 else own_scale] if conditional else []):
        suffix = f", guidance {scale:g}" if conditional else ""
        for batch_size in _BATCH_SIZES:
            run = partial(_single_calls, reference, batch_size, scale)
            runs[f"one step, batch {batch_size}{suffix}"] = STEP_TOLERANCE, run
        for name, table in _tables(spec).items():
            run = partial(_trajectories, reference, table, scale)
            runs[name + suffix] = TRAJECTORY_TOLERANCE, run
            if name != _DEPLOYED or scale != own_scale:
                may_diverge.add(name + suffix)

    # First all of PyTorch, then all of ONNX Runtime, whose threads would slow PyTorch's down.
    expected = {name: run(reference.denoise) for name, (_, run) in runs.items()}
    actual = {name: run(sampler.denoise) for name, (_, run) in runs.items()}
    cases = [compare(name, actual[name], expected[name], tolerance) for name, (tolerance, _) in runs.items()]
    samples = next(values for name, values in expected.items() if name.startswith(_DEPLOYED))
    run = partial(_every_timestep, reference, samples)
    cases.append(compare(_EVERY_TIMESTEP, run(sampler.denoise), run(reference.denoise), STEP_TOLERANCE))
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
    reference, names = TorchSampler(network, spec), list(spec.graph_outputs)
    for batch_size in _BATCH_SIZES:
        x = reference.noise(batch_size)
        calls = [reference.inputs(x, level) for level in spec.table.network_levels]
        expected = [reference.outputs(inputs) for inputs in calls]
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
            seed=reference.seed,
            guidance_scale=scale,
            conditions=reference.conditions(_NUM_TRAJECTORIES),
        )
        expected_samples = spec.denormalise(_last(reference.states(_NUM_TRAJECTORIES, guidance_scale=scale)))
        actual_x, expected_x = ((samples - mean) / std for samples in (drawn, expected_samples))
        cases.append(compare(_DEPLOYED + suffix, actual_x, expected_x, TRAJECTORY_TOLERANCE))
    return cases


def check_storage(reference: TorchSampler, sampler: Sampler) -> list[ParityCase]:
    """Compare a file whose weights are stored in 16 bits with the original model.

    The tolerance is `STORAGE_TOLERANCE`. It applies to the largest difference of single calls, and to the
    root mean square difference of samples, since a sample between two modes may end in either.
    """
    spec = reference.spec
    scale = float(spec.sampler["guidance_scale"])
    calls = partial(_single_calls, reference, _BATCH_SIZES[-1], scale)
    samples = partial(_trajectories, reference, spec.table, scale)
    step, end = (
        compare(
            f"weights in 16 bits, {name}", run(sampler.denoise), run(reference.denoise), STORAGE_TOLERANCE
        )
        for name, run in (("one step", calls), ("deployed sampler", samples))
    )
    passed = end.rms_error <= STORAGE_TOLERANCE * end.output_scale
    return [step, dataclasses.replace(end, passed=passed)]


def num_compared_samples(spec: SamplerSpec) -> int:
    """Number of samples that are compared with the data: the fewer, the more steps they take."""
    return min(_MOST_SAMPLES, max(_FEWEST_SAMPLES, _EVALUATIONS_OF_SAMPLES // spec.table.num_rows))


def check_samples(
    expected: NDArray[np.floating], actual: NDArray[np.floating], dataset: Dataset, features: Features | None
) -> list[ParityCase]:
    """Compare the quality of samples by PyTorch and ONNX Runtime: their `sample/distance` to the data.

    Args:
        expected: samples by PyTorch, [num_samples, *shape], in data units. At most 256 of them are compared,
            and at most as many as there are training examples.
        actual: those by ONNX Runtime, of the same shape, from the same noise.
        dataset: the data set that the model was trained on.
        features: features that images are compared by; None for points.

    Returns:
        One comparison. It passes if the two distances differ by at most the standard error of PyTorch's
        distance, which is also its scale.
    """
    num_samples = min(len(expected), _MOST_SAMPLES, len(dataset.train))
    spec, metrics = dataset.spec, SampleMetrics(dataset, dataset.val[:], features)
    mean, std = np.array(spec.mean), np.array(spec.std)
    by_torch, by_onnx = (
        metrics.distance(torch.from_numpy((drawn[:num_samples] - mean) / std).float())
        for drawn in (expected, actual)
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
                f"parity failed ({case.name}): the results differ by {case.max_abs_error:.2g}, "
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


def _tables(spec: SamplerSpec) -> dict[str, SamplerTable]:
    """Samplers whose trajectories are compared, by name."""
    schedule, tables = spec.noise_schedule, {_DEPLOYED: spec.table}
    for clip in (spec.sampler["clip"] or _CLIP, None):
        suffix = "clipped" if clip else "unclipped"
        method: SamplingMethod
        for name, method in SAMPLERS.items():
            num_steps = min(method.parity_steps, schedule.num_train_timesteps)
            tables[f"{name}, {num_steps} steps, {suffix}"] = sampler_table(
                schedule, name, num_steps, prediction_type=spec.prediction_type, clip=clip
            )
    return tables


def _single_calls(
    reference: TorchSampler, batch_size: int, guidance_scale: float, denoise: DenoiseFunction
) -> NDArray[np.float64]:
    """Outputs for one batch of noise over a grid of timesteps: float64 [timesteps, batch, *shape]."""
    x, labels = reference.noise(batch_size), reference.labels(batch_size)
    conditions = reference.conditions(batch_size)
    last = reference.spec.noise_schedule.num_train_timesteps - 1
    grid = np.unique(np.linspace(0, last, _NUM_GRID_TIMESTEPS).round().astype(int))
    return np.stack([denoise(x, int(t), labels, guidance_scale, conditions) for t in grid])


def _trajectories(
    reference: TorchSampler, table: SamplerTable, guidance_scale: float, denoise: DenoiseFunction
) -> NDArray[np.float64]:
    """Samples of a table, normalised: float64 [count, *shape], at most `_NUM_TRAJECTORIES`."""
    count = min(_NUM_TRAJECTORIES, max(1, _EVALUATIONS_OF_TRAJECTORIES // table.num_rows))
    labels, conditions = reference.labels(count), reference.conditions(count)

    def denoise_labelled(x: NDArray[np.float64], level: float) -> NDArray[np.float64]:
        return denoise(x, level, labels, guidance_scale, conditions)

    return _last(reference.run(denoise_labelled, count, table))


def _last(states: Iterator[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The samples at the end; the states before them are not kept."""
    return deque(states, maxlen=1).pop()


def _every_timestep(
    reference: TorchSampler, samples: NDArray[np.float64], denoise: DenoiseFunction
) -> NDArray[np.float64]:
    """Outputs for samples of the model with the noise of each timestep: float64 [timesteps, *shape]."""
    schedule, num_classes = reference.spec.noise_schedule, len(reference.spec.classes)
    timesteps = np.arange(schedule.num_train_timesteps)
    x_0, noise = samples[timesteps % len(samples)], reference.noise(len(timesteps))
    x_t = q_sample(schedule, *(torch.from_numpy(each) for each in (x_0, timesteps, noise))).numpy()
    labels = timesteps % (num_classes + 1) if num_classes else None
    batches = [slice(first, first + _TIMESTEPS_PER_CALL) for first in timesteps[::_TIMESTEPS_PER_CALL]]
    return np.concatenate(
        [
            denoise(
                x_t[rows],
                timesteps[rows],
                None if labels is None else labels[rows],
                1.0,
                reference.conditions(len(x_t[rows])),
            )
            for rows in batches
        ]
    )
