"""A trained model as its ONNX file describes it, and PyTorch's counterpart of `export.Sampler`."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diffusion.data.dataset import Dataset
from diffusion.data.low_resolution import LowResolution
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.sampler_choice import PROVENANCE, SamplerChoice
from diffusion.process.generate import MAX_VALUES_PER_CPU_BATCH
from diffusion.process.image_start import start_from
from diffusion.process.inpainting import Inpainting
from diffusion.process.samplers import SamplerTable, trajectory
from diffusion.training.checkpoints import TrainedModel
from export.conditions import LOW_RESOLUTION, LOW_RESOLUTION_NOISE
from export.contract import FAST, LABEL, ConditionSpec, SamplerSpec, X
from export.noise import normal_noise

Conditions = dict[str, NDArray[np.float64]]
"""Values of each condition by its name, [num_samples, *shape], in the condition's units."""


@dataclass(frozen=True, eq=False)
class DrawnSamples:
    """Samples, and how the first of them came out of noise.

    Attributes:
        samples: float64 [num_samples, *shape], normalised.
        conditions: the conditions that they were drawn for.
        states: float64 [num_shown, *shape] each: the first samples as the initial noise, then after each row
            of the table.
    """

    samples: NDArray[np.float64]
    conditions: Conditions
    states: list[NDArray[np.float64]]


class TorchSampler:
    """Draws with PyTorch, from the same noise, the samples that `export.Sampler` draws from a file.

    Labels cycle through the classes.

    Args:
        network: network in evaluation mode on the CPU, with the positional arguments
            `SamplerSpec.graph_inputs` and the outputs `SamplerSpec.graph_outputs`.
        spec: what sampling needs besides the network.
        seed: seed of the noise.
        conditions: number of samples -> values of each condition for each sample, in the condition's units;
            None: random values.

    Attributes:
        network, spec, seed: as given.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: SamplerSpec,
        seed: int = 0,
        conditions: Callable[[int], Conditions] | None = None,
    ) -> None:
        self.network, self.spec, self.seed = network, spec, seed
        self.conditions = cache(conditions or self._random_conditions)

    @classmethod
    def of(cls, model: TrainedModel, dataset: Dataset | None = None) -> "TorchSampler":
        """The samples of a trained model, with seed 0.

        Args:
            model: the model.
            dataset: the data, whose validation examples are the low-resolution images of a super-resolution
                model; None: it gets random ones.
        """
        conditions = None if dataset is None else partial(held_out_conditions, model, dataset)
        return cls(model.network, sampler_spec(model), conditions=conditions)

    def noise(self, count: int, row: int = -1) -> NDArray[np.float64]:
        """Noise of the first `count` samples, [count, *shape]: of a row of the table, or the initial one."""
        return normal_noise(self.seed, np.arange(count), row + 1, self.spec.shape)

    def labels(self, count: int) -> NDArray[np.int64] | None:
        """Label of each sample; None without classes."""
        return np.arange(count) % len(self.spec.classes) if self.spec.classes else None

    def _random_conditions(self, count: int) -> Conditions:
        return {
            each.name: normal_noise(self.seed + 1, np.arange(count), index, each.shape) * np.array(each.std)
            + np.array(each.mean)
            for index, each in enumerate(self.spec.conditions)
        }

    def inputs(
        self,
        x: NDArray[np.float64],
        level: float | NDArray[np.int64],
        labels: NDArray[np.int64] | None = None,
        conditions: Conditions | None = None,
    ) -> dict[str, NDArray[Any]]:
        """The network's inputs by name.

        Args:
            x: [batch, *shape], normalised.
            level: timestep or noise level of all rows, or of each.
            labels: int64 [batch]; None: those of `labels`.
            conditions: of each row; None: those of `conditions`.
        """
        level_type, _ = self.spec.graph_inputs[self.spec.level_input]
        found = {X: x.astype(np.float32), self.spec.level_input: np.full(len(x), level, dtype=level_type)}
        own_labels = self.labels(len(x)) if labels is None else labels
        if self.spec.classes and own_labels is not None:
            found[LABEL] = own_labels
        values = self.conditions(len(x)) if conditions is None else conditions
        return found | {each.input_name: each.normalise(values[each.name]) for each in self.spec.conditions}

    @torch.no_grad()
    def outputs(self, inputs: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """The network's outputs, each [batch, *shape]."""
        batch_size = max(1, MAX_VALUES_PER_CPU_BATCH // self.spec.size)
        chunks = zip(*(torch.from_numpy(value).split(batch_size) for value in inputs.values()), strict=True)
        found = [self.network(*chunk) for chunk in chunks]
        rows = [outputs if isinstance(outputs, tuple) else (outputs,) for outputs in found]
        return [torch.cat(each).numpy() for each in zip(*rows, strict=True)]

    def denoise(
        self,
        x: NDArray[np.float64],
        level: float | NDArray[np.int64],
        labels: NDArray[np.int64] | None = None,
        guidance_scale: float = 1.0,
        conditions: Conditions | None = None,
    ) -> NDArray[np.float64]:
        """The network's output for one batch, with guidance, as `export.Sampler.denoise` computes it."""
        return self._guided_outputs(x, level, labels, guidance_scale, conditions)[0]

    def states(
        self,
        num_samples: int,
        table: SamplerTable | None = None,
        guidance_scale: float | None = None,
        *,
        inpainting: Inpainting | None = None,
        x_0: NDArray[np.float64] | None = None,
        strength: float = 1.0,
    ) -> Iterator[NDArray[np.float64]]:
        """The first samples of the seed from noise to the end: the initial noise, then x after each row.

        Args:
            num_samples: number of samples.
            table: the sampler; None: the spec's.
            guidance_scale: strength of guidance; None: the spec's.
            inpainting: the known part of the samples.
            x_0: samples to start from instead of pure noise, [num_samples, *shape], normalised.
            strength: with x_0, the fraction of the steps that run, see `diffusion.process.image_start`.

        Yields:
            float64 [num_samples, *shape], normalised.
        """
        scale = self.spec.sampler["guidance_scale"] if guidance_scale is None else guidance_scale

        def denoise(x: NDArray[np.float64], level: float) -> Any:
            outputs = self._guided_outputs(x, level, None, scale)
            return outputs if len(outputs) > 1 else outputs[0]

        table = self.spec.table if table is None else table
        noise: Callable[[int], NDArray[np.float64]] = partial(self.noise, num_samples)
        if x_0 is not None:
            table, noise = start_from(x_0, strength, table, noise)
        yield noise(-1)
        yield from (x for x, _ in trajectory(denoise, noise(-1), table, noise, inpainting))

    def draw(self, num_samples: int, num_shown: int = 0) -> DrawnSamples:
        """Draw samples as `states` does, by the spec's sampler, and keep all states of the first ones.

        Args:
            num_samples: number of samples, at least 1.
            num_shown: number of samples of which the states are kept.
        """
        kept = []
        for x in self.states(num_samples):
            kept.append(x[:num_shown].copy())  # a view would keep all samples of every row
        return DrawnSamples(x, self.conditions(num_samples), kept)

    def run(
        self, denoise: Callable[[NDArray[np.float64], float], Any], num_samples: int, table: SamplerTable
    ) -> Iterator[NDArray[np.float64]]:
        """Run a table on this noise, yielding x after each row.

        Args:
            denoise: as for `diffusion.process.samplers.trajectory`.
            num_samples: number of samples.
            table: the sampler.
        """
        noise = partial(self.noise, num_samples)
        return (x for x, _ in trajectory(denoise, noise(-1), table, noise))

    def _guided_outputs(
        self,
        x: NDArray[np.float64],
        level: float | NDArray[np.int64],
        labels: NDArray[np.int64] | None,
        guidance_scale: float,
        conditions: Conditions | None = None,
    ) -> list[NDArray[np.float64]]:
        """The network's outputs, the first of them guided.

        Source: classifier-free guidance, arXiv:2207.12598, Eq. 6 with guidance_scale = 1 + w.
        """
        outputs = self.outputs(self.inputs(x, level, labels, conditions))
        out, *others = (output.astype(np.float64) for output in outputs)
        if self.spec.classes and guidance_scale != 1.0:
            no_class = np.full(len(x), len(self.spec.classes))
            unconditional = self.outputs(self.inputs(x, level, no_class, conditions))[0].astype(np.float64)
            out = unconditional + guidance_scale * (out - unconditional)
        return [out, *others]


def held_out_conditions(model: TrainedModel, dataset: Dataset, count: int) -> Conditions:
    """Conditions that validation examples make for a model's samples, in their units; empty without any."""
    side = model.config.data.low_resolution
    if side is None:
        return {}
    images, noise_levels = Evaluator(model.config, dataset).low_resolution(count)
    return {
        LOW_RESOLUTION: LowResolution(model.data, side).denormalised(images),
        LOW_RESOLUTION_NOISE: noise_levels.double().cpu().numpy(),
    }


def sampler_spec(model: TrainedModel) -> SamplerSpec:
    """Collect the metadata of a model's ONNX file."""
    data, sampler, schedule = model.data, model.config.sampler, model.config.schedule
    side = model.config.data.low_resolution
    choice = SamplerChoice.of(model.provenance)
    fast = choice.fast if choice else None
    return SamplerSpec(
        data={
            "kind": data.kind,
            "shape": list(data.shape),
            "mean": data.mean,
            "std": data.std,
            "range": data.range,
            "columns": data.columns,
            **({"classes": list(data.classes)} if data.classes else {}),
        },
        schedule={**dataclasses.asdict(schedule), "betas": model.schedule.betas.tolist()},
        prediction_type=model.config.prediction_type,
        sampler={
            "name": sampler.name,
            "num_steps": model.table.num_steps,
            "eta": sampler.used_eta,
            "variance": sampler.variance,
            "spacing": sampler.spacing,
            "clip": list(data.clip) if sampler.clip else None,
            "guidance_scale": sampler.guidance_scale,
            **({FAST: {"name": fast.name, "num_steps": fast.num_steps}} if fast else {}),
            **({LOW_RESOLUTION_NOISE: sampler.low_resolution_noise} if side else {}),
        },
        provenance={
            "run_id": model.provenance.get("run_id"),
            "git_revision": model.provenance.get("git_revision"),
            "data_fingerprint": data.fingerprint,
            "metrics": model.provenance.get("metrics", {}),
            **({PROVENANCE: choice.to_dict()} if choice else {}),
        },
        table=model.table,
        conditions=(
            ConditionSpec(LOW_RESOLUTION, (data.shape[0], side, side), data.mean, data.std),
            ConditionSpec(LOW_RESOLUTION_NOISE, (), 0.0, 1.0),
        )
        if side
        else (),
    )
