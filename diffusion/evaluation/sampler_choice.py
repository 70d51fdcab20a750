"""Choice of a trained model's sampler and number of steps by measurement.

Which sampler suits a model, and how many steps it needs, depends on the model. `measure_samplers` draws
samples with every sampler at several numbers of steps and compares them with the data; `choose_sampler`
takes the cheapest that is as good as the best. benchmarks/results/samplers_by_cost.md has the evidence
for which samplers are candidates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from diffusion.config import Config, SamplerConfig
from diffusion.data.dataset import Dataset
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features import Features
from diffusion.evaluation.sample_metrics import SampleMetrics
from diffusion.metrics import AUC, DISTANCE
from diffusion.registry import SAMPLERS
from diffusion.seeding import seed_of

PROVENANCE = "samplers"  # the entry of a model's provenance that holds its choice
FAST_EVALUATIONS = 20  # of the fast choice, at most
_EVALUATIONS: Mapping[str, tuple[int, ...]] = {"points": (10, 20, 50, 100, 200), "image": (10, 20, 50)}
_MAX_SAMPLES = 2000  # more would make the distances dearer than the sampling
_STREAM = 23  # of seeds: no trial and no confirmation has seen this noise


@dataclass(frozen=True)
class MeasuredSampler:
    """A sampler at a number of steps, with the two deciding metrics of its samples.

    Attributes:
        name: name of the sampler.
        num_steps: number of sampling steps.
        network_evaluations: number of network calls for each sample.
        distance: `distance` of its samples to the training and validation examples.
        distance_se: standard error of `distance`.
        auc: `auc` of its samples against the same.
        auc_se: standard error of `auc`.
    """

    name: str
    num_steps: int
    network_evaluations: int
    distance: float
    distance_se: float
    auc: float
    auc_se: float

    def __str__(self) -> str:
        return f"{self.name} with {self.num_steps} steps"


@dataclass(frozen=True)
class SamplerChoice:
    """The samplers that were measured for a model, and those that were chosen.

    Attributes:
        measured: all, by network evaluations.
        best: the one that is the fewest standard errors away from the smallest distance and auc of all.
        deployed: the one with the fewest network evaluations of those that are as good as the best.
        fast: the best of those with 20 network evaluations at most, or None if there is none.
        num_samples: number of samples that each was measured with.
    """

    measured: tuple[MeasuredSampler, ...]
    best: MeasuredSampler
    deployed: MeasuredSampler
    fast: MeasuredSampler | None
    num_samples: int

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain values, fit for JSON: numbers that are not finite become None.

        `measured` is a list, and the others are indices into it.
        """
        index = {measure: place for place, measure in enumerate(self.measured)}
        return {
            "measured": [
                {
                    name: None if isinstance(value, float) and not math.isfinite(value) else value
                    for name, value in asdict(measure).items()
                }
                for measure in self.measured
            ],
            "best": index[self.best],
            "deployed": index[self.deployed],
            "fast": None if self.fast is None else index[self.fast],
            "num_samples": self.num_samples,
        }

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> "SamplerChoice | None":
        """The choice that was made for the model of this provenance; None if none was."""
        return cls.from_dict(provenance[PROVENANCE]) if PROVENANCE in provenance else None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "SamplerChoice":
        """Read what `to_dict` returned."""
        rows: list[dict[str, Any]] = [
            {name: math.nan if value is None else value for name, value in each.items()}
            for each in content["measured"]
        ]
        measured = tuple(MeasuredSampler(**row) for row in rows)
        best, deployed = measured[content["best"]], measured[content["deployed"]]
        fast = None if content["fast"] is None else measured[content["fast"]]
        return cls(measured, best, deployed, fast, content["num_samples"])

    def sentences(self) -> list[str]:
        """What was chosen and why, without full stops."""
        best, deployed, fast = self.best, self.deployed, self.fast
        number = len(self.measured)
        if deployed == best:
            lines = [f"it samples by {deployed}: the best of {number} choices of sampler and steps"]
        else:
            lines = [
                f"it samples by {deployed}: of {number} choices of sampler and steps the cheapest within one "
                f"standard error of the best, {best}"
            ]
        if fast is not None and fast != deployed:
            lines.append(
                f"fast: {fast} costs {fast.network_evaluations} instead of {deployed.network_evaluations} "
                f"network evaluations, for an AUC of {fast.auc:.3f} instead of {deployed.auc:.3f} and a "
                f"distance of {fast.distance:.3g} instead of {deployed.distance:.3g}"
            )
        return lines


def choose_sampler(measured: Sequence[MeasuredSampler], num_samples: int) -> SamplerChoice:
    """Choose by the one-standard-error rule (Breiman et al., 1984, Section 3.4.3).

    How far a sampler is from the smallest `distance` and from the smallest `auc` of all is counted in the
    standard errors of these two; the larger number counts, since each metric is blind somewhere. The best has
    the smallest such number, and as good are those that are at most one standard error away.

    Args:
        measured: at least one.
        num_samples: number of samples that each was measured with.
    """
    by_distance = _errors_from_smallest(
        [each.distance for each in measured], [each.distance_se for each in measured]
    )
    by_auc = _errors_from_smallest([each.auc for each in measured], [each.auc_se for each in measured])
    away = {each: max(pair) for each, *pair in zip(measured, by_distance, by_auc, strict=True)}
    ordered = sorted(measured, key=lambda each: (each.network_evaluations, each.name))
    best = min(ordered, key=away.__getitem__)
    as_good = [each for each in ordered if each == best or away[each] <= 1.0]
    deployed = min(as_good, key=lambda each: (each.network_evaluations, away[each]))
    affordable = [
        each for each in ordered if each.network_evaluations <= FAST_EVALUATIONS and away[each] < math.inf
    ]
    fast = min(affordable, key=away.__getitem__, default=None)
    return SamplerChoice(tuple(ordered), best, deployed, fast, num_samples)


def _errors_from_smallest(values: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Differences to the smallest value in units of its error; infinite where one of them is unknown."""
    known = [math.inf if math.isnan(value) else value for value in values]
    smallest, error = min(zip(known, errors, strict=True), key=lambda pair: pair[0])
    return [
        0.0 if value == smallest else (value - smallest) / error if error > 0.0 else math.inf
        for value in known
    ]


def measure_samplers(
    config: Config,
    network: nn.Module,
    dataset: Dataset,
    features: Features | None,
    notify: Callable[[str], None] = lambda line: None,
    names: Sequence[str] = (),
) -> SamplerChoice:
    """Measure a model's samples with several samplers at several numbers of steps, and choose.

    Samples come from the same noise with every sampler. They are compared with the training and validation
    examples, not with the test split. Guidance, spacing and clipping are the config's.

    Args:
        config: config of the model.
        network: the denoiser, in evaluation mode.
        dataset: the data that it was trained on, on its device.
        features: features by which images are compared; None fits those of a random network.
        notify: receives a line before each sampler.
        names: the samplers, see `samplers_to_measure`.
    """
    measure = SampleMetrics(dataset, dataset.val[:], features)
    num_samples = min(config.metrics.num_samples, _MAX_SAMPLES, len(dataset.train))
    seed = seed_of(config.metrics.seed, _STREAM)
    measured: list[MeasuredSampler] = []
    for sampler in samplers_to_measure(config, dataset.spec.kind, names):
        if not measured or sampler.name != measured[-1].name:
            notify(f"measuring the sampler {sampler.name} with several numbers of steps")
        evaluator = Evaluator(replace(config, sampler=sampler), dataset, features)
        found = measure.deciding(evaluator.samples(network, num_samples=num_samples, seed=seed))
        distance, auc = found[DISTANCE], found[AUC]
        measured.append(
            MeasuredSampler(
                sampler.name,
                sampler.num_steps,
                evaluator.network_evaluations,
                distance.value,
                distance.standard_error,
                auc.value,
                auc.standard_error,
            )
        )
    return choose_sampler(measured, num_samples)


def samplers_to_measure(config: Config, data_kind: str, names: Sequence[str] = ()) -> list[SamplerConfig]:
    """Each sampler with at most 10 to 200 network evaluations (images: to 50), and as many as the config's.

    Args:
        config: config of the model.
        data_kind: "points" or "image".
        names: samplers; none: those that are candidates (`SamplingMethod.is_candidate`), and the config's.
    """
    own, timesteps = config.sampler, config.schedule.num_train_timesteps
    own_evaluations = SAMPLERS[own.name].rows_per_step * (own.num_steps - 1) + 1
    found = []
    for name, method in SAMPLERS.items():
        if name not in names if names else not (method.is_candidate or name == own.name):
            continue
        evaluations = (*_EVALUATIONS[data_kind], own_evaluations)
        numbers = {min((most - 1) // method.rows_per_step + 1, timesteps) for most in evaluations}
        eta = own.eta if name == own.name else None
        for number in sorted(numbers):
            found.append(replace(own, name=name, num_steps=number, eta=eta))
    return found
