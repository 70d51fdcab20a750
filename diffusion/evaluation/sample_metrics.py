"""Metrics of generated samples: their distances to the data."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diffusion.data.dataset import Dataset
from diffusion.devices import to_float64, widest_float
from diffusion.evaluation.copying import copying_metrics
from diffusion.evaluation.distances import (
    Estimate,
    SampleMetric,
    kernel_distance_difference,
)
from diffusion.evaluation.features import Features, fit_features
from diffusion.evaluation.once import once
from diffusion.evaluation.two_sample_auc import classifier_auc_difference, pixel_auc_difference
from diffusion.metrics import (
    AUC,
    DISTANCE,
    FLOOR,
    NUM_HELDOUT,
    NUM_REFERENCE,
    NUM_SAMPLES,
    STANDARD_ERROR,
)
from diffusion.registry import SAMPLE_METRICS

# Examples that samples are compared with: more make pairwise distances dearer than they make them exact.
MAX_REFERENCE = 4000
# The two deciding metrics by kind of data. A metric of samples that chance or one kind of error can hide
# from does not decide; docs/judging.md has the evidence.
DECIDING: Mapping[str, Mapping[str, str]] = {
    "points": {DISTANCE: "kernel", AUC: "auc"},
    "image": {DISTANCE: "kernel", AUC: "pixel_auc"},
}
_OF_INFINITE_SAMPLES = {DISTANCE: math.inf, AUC: 1.0}  # if any sample is not finite
# Limits on the training examples that samples are compared with, which are in memory as float64.
MAX_TRAINING_EXAMPLES, _MAX_VALUES = 20_000, 2**27


@dataclass(frozen=True, eq=False)
class _Reference:
    """Examples that samples are compared with.

    Attributes:
        views: the examples as metrics compare them, see `SampleMetrics._views`.
        floors: floors by the examples that they were measured on, which cost as much as metrics of samples.
    """

    views: dict[str, Tensor]
    floors: dict[bytes, dict[str, float]] = field(default_factory=dict)


# References by content, since a process that trains one trial after another has a copy of the data in each.
# They stay in memory, so few and small ones.
_REFERENCES: dict[bytes, _Reference] = {}
_MAX_REFERENCES, _MAX_REFERENCE_VALUES = 2, 2**23


@dataclass(frozen=True, eq=False)
class SampleMetrics:
    """Measures generated samples against the data.

    The reference of all distances is the held-out data, at most 4,000 examples (fewer of large images); with
    `add_training`, training examples fill it up to that number. A fifth of the training examples at least
    is left out: the floor of a metric is its value for training examples that are not in the reference.

    Args:
        dataset: the data that the model was trained on.
        held_out: [examples, *shape] held-out data, normalised.
        features: features by which images are compared; None fits those of a random network.
        add_training: whether training examples belong to the reference: more of them make the distances more
            exact, and a model that copies training examples is found by `diffusion.evaluation.copying`.
    """

    dataset: Dataset
    held_out: Tensor
    features: Features | None = None
    add_training: bool = True

    @property
    def _num_added(self) -> int:
        """Number of training examples in the reference."""
        missing = max(0, self._max_reference - len(self.held_out)) if self.add_training else 0
        return min(missing, 4 * len(self.dataset.train) // 5)

    @property
    def _max_reference(self) -> int:
        return max(2, min(MAX_REFERENCE, _MAX_VALUES // math.prod(self.dataset.spec.shape)))

    @cached_property
    def _reference(self) -> _Reference:
        held_out = self.held_out[: self._max_reference]
        views = self._views(torch.cat([held_out, self.dataset.train[: self._num_added]]))
        if sum(view.numel() for view in views.values()) > _MAX_REFERENCE_VALUES:
            return _Reference(views)
        key = _digest(views)
        if key not in _REFERENCES:
            while len(_REFERENCES) >= _MAX_REFERENCES:
                del _REFERENCES[next(iter(_REFERENCES))]
            _REFERENCES[key] = _Reference(views)
        return _REFERENCES[key]

    @cached_property
    def _floors(self) -> dict[int, dict[str, float]]:
        """Floors by number of samples."""
        return {}

    @cached_property
    def _fitted_features(self) -> Features | None:
        return self.features or fit_features(self.dataset, "random")

    def compute(self, samples: Tensor) -> dict[str, float]:
        """All metrics of normalised samples [N, *shape], with their floors.

        They are those of `diffusion.registry.SAMPLE_METRICS` for the kind of data; docs/judging.md describes
        each. `distance` and `auc` are the two that decide between models, see `DECIDING`; lower is better.
        `..._se` is a standard error and `..._floor` a floor, with fewer than N examples if there are fewer.
        See also `diffusion.evaluation.copying.copying_metrics`.
        """
        if len(samples) not in self._floors:
            self._floors[len(samples)] = self._floor(len(samples))
        floors = self._floors[len(samples)]
        finite = bool(samples.isfinite().all())
        return {
            **(self._distances(self._views(samples)) if finite else _OF_INFINITE_SAMPLES),
            **{_floor_name(name): value for name, value in floors.items()},
            **(copying_metrics(samples, _training_examples(self.dataset), self.held_out) if finite else {}),
            NUM_SAMPLES: len(samples),
            NUM_REFERENCE: len(self._reference.views["features"]),
            NUM_HELDOUT: len(self.held_out),
        }

    def distance(self, samples: Tensor) -> Estimate:
        """The metric `distance` of normalised samples [N, *shape] alone; infinite if a sample is."""
        return self._deciding(DISTANCE, samples)

    def deciding(self, samples: Tensor) -> dict[str, Estimate]:
        """The metrics `distance` and `auc` of normalised samples [N, *shape] alone, see `DECIDING`."""
        return {name: self._deciding(name, samples) for name in (DISTANCE, AUC)}

    def _deciding(self, name: str, samples: Tensor) -> Estimate:
        if not samples.isfinite().all():
            return Estimate(_OF_INFINITE_SAMPLES[name], math.nan)
        chosen = DECIDING[self.dataset.spec.kind][name]
        metric: SampleMetric = SAMPLE_METRICS[chosen]
        x, y = (views[metric.images_as] for views in (self._views(samples), self._reference.views))
        values = metric.compute(x, y)
        return Estimate(values[chosen], values[chosen + STANDARD_ERROR])

    def difference(self, a: Tensor, b: Tensor) -> dict[str, Estimate]:
        """`distance` and `auc` of samples a minus those of samples b, with errors of the differences.

        Args:
            a: normalised samples [N, *shape] of one model.
            b: as many samples of another model. The difference is most exact if sample i of both comes from
                the same noise.

        Raises:
            ValueError: a and b have different numbers of samples.
        """
        of_a, of_b = self._views(a), self._views(b)
        y = self._reference.views
        auc_difference = (
            pixel_auc_difference if self.dataset.spec.kind == "image" else classifier_auc_difference
        )
        return {
            DISTANCE: kernel_distance_difference(of_a["features"], of_b["features"], y["features"]),
            AUC: auc_difference(of_a["pixels"], of_b["pixels"], y["pixels"]),
        }

    def _views(self, examples: Tensor) -> dict[str, Tensor]:
        """Examples as metrics compare them: points by their coordinates in any case."""
        if self.dataset.spec.kind == "points":
            return {"features": examples, "pixels": examples}
        views: dict[str, Tensor] = once(examples, self, lambda: self._views_of_images(examples))
        return views

    def _views_of_images(self, examples: Tensor) -> dict[str, Tensor]:
        assert self._fitted_features is not None and self.dataset.spec.range is not None
        device = examples.device
        raw = torch.from_numpy(self.dataset.raw(examples)).to(device, widest_float(device))
        low, high = self.dataset.spec.range
        pixels = ((raw - low) / (high - low) * 255.0).round()
        return {"features": self._fitted_features(raw), "pixels": pixels}

    def _floor(self, num_samples: int) -> dict[str, float]:
        """Metrics of as many training examples that are not in the reference."""
        added, reference = self._num_added, self._reference
        views = self._views(self.dataset.train[: added + num_samples][added:])
        key = _digest(views)
        if key not in reference.floors:
            reference.floors[key] = self._distances(views)
        return reference.floors[key]

    def _distances(self, views: Mapping[str, Tensor]) -> dict[str, float]:
        kind = self.dataset.spec.kind
        values: dict[str, float] = {}
        metric: SampleMetric
        for metric in SAMPLE_METRICS.values():
            if kind in metric.data_kinds:
                values |= metric.compute(views[metric.images_as], self._reference.views[metric.images_as])
        for name, chosen in DECIDING[kind].items():
            values |= {name + suffix: values[chosen + suffix] for suffix in ("", STANDARD_ERROR)}
        return values


def nearest_training_examples(dataset: Dataset, samples: Tensor) -> Tensor:
    """The training example nearest to each sample, among the first 20,000 at most: [N, *shape]."""
    train = _training_examples(dataset)
    flat = to_float64(train).flatten(1)
    indices = [torch.cdist(to_float64(batch).flatten(1), flat).argmin(dim=1) for batch in samples.split(1024)]
    return train[torch.cat(indices)]


def _training_examples(dataset: Dataset) -> Tensor:
    """The training examples that samples are compared with."""
    count = max(2, min(MAX_TRAINING_EXAMPLES, _MAX_VALUES // math.prod(dataset.spec.shape)))
    return dataset.train[:count]


def _digest(views: Mapping[str, Tensor]) -> bytes:
    """Digest of all that metrics of these views depend on, but for what they are compared with."""
    found = hashlib.blake2b(repr(sorted(SAMPLE_METRICS.items(), key=lambda item: item[0])).encode())
    for name, view in sorted(views.items()):
        found.update(f"{name} {view.dtype} {list(view.shape)} {view.device}".encode())
        found.update(view.detach().cpu().contiguous().numpy().tobytes())
    return found.digest()


def _floor_name(name: str) -> str:
    error = STANDARD_ERROR if name.endswith(STANDARD_ERROR) else ""
    return name.removesuffix(error) + FLOOR + error
