"""Judges samples against a data set, and each against the best of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.dataset import Dataset, make_split
from diffusion.evaluation.copying import CopyingVerdict, copying_verdict
from diffusion.evaluation.distances import Estimate
from diffusion.evaluation.features import Features
from diffusion.evaluation.sample_metrics import SampleMetrics
from diffusion.metrics import AUC, DISTANCE
from workflows.evaluation.candidates import Candidate

_TOLD_APART = 2.0  # standard errors


@dataclass(frozen=True, eq=False)
class Judged:
    """A candidate and its metrics.

    Attributes:
        candidate: what was judged.
        metrics: metrics of its samples by name, see docs/judging.md.
        verdict: whether it copies training examples; None if its model was trained on other data or another
            split, so that nothing is known of its training examples.
        from_best: its `distance` and `auc` minus those of the best candidate; empty for the best one.
    """

    candidate: Candidate
    metrics: Mapping[str, float]
    verdict: CopyingVerdict | None
    from_best: Mapping[str, Estimate]

    @property
    def outcome(self) -> str:
        """How it compares with the best candidate, in words."""
        if not self.from_best:
            return "the best"
        signs = {name: each.sign(_TOLD_APART) for name, each in self.from_best.items()}
        if not any(signs.values()):
            return "not told apart from the best"
        worse = " and ".join(name for name, sign in signs.items() if sign > 0)
        better = " and ".join(name for name, sign in signs.items() if sign < 0)
        words = [f"{word} by {names}" for word, names in (("worse", worse), ("better", better)) if names]
        return ", ".join(words)


def judge(
    candidates: Sequence[Candidate],
    dataset: Dataset,
    features: Features | None,
    *,
    add_training: bool = False,
) -> list[Judged]:
    """Judge candidates by equally many samples of each, the lowest `distance` first, those that copy last.

    Args:
        candidates: the candidates, at least one.
        dataset: the data; samples are compared with the test and validation splits.
        features: features by which images are compared; None for points.
        add_training: whether training examples join the reference, see `SampleMetrics`.
    """
    held_out = torch.cat([dataset.test[:], dataset.val[:]])
    measure = SampleMetrics(dataset, held_out, features, add_training)
    count = min(len(each.samples) for each in candidates)
    samples = [normalised(each.samples[:count], dataset) for each in candidates]
    metrics = [measure.compute(each) for each in samples]
    verdicts = [
        copying_verdict(values, prefix="") if each.trained_on in (None, dataset.spec.fingerprint) else None
        for each, values in zip(candidates, metrics, strict=True)
    ]
    order = sorted(
        range(len(candidates)), key=lambda index: (verdicts[index] == "copies", metrics[index][DISTANCE])
    )
    best = samples[order[0]]
    return [
        Judged(
            candidates[index],
            metrics[index],
            verdicts[index],
            {} if index == order[0] else _difference(measure, samples[index], best),
        )
        for index in order
    ]


def normalised(samples: NDArray[Any], dataset: Dataset) -> Tensor:
    """Samples in data units as the data's models see them, float32."""
    mean, std = np.array(dataset.spec.mean), np.array(dataset.spec.std)
    return make_split(np.asarray(samples, dtype=np.float64), mean, std, None)[:]


def _difference(measure: SampleMetrics, samples: Tensor, best: Tensor) -> dict[str, Estimate]:
    if not all(bool(torch.isfinite(each).all()) for each in (samples, best)):
        return dict.fromkeys((DISTANCE, AUC), Estimate(np.nan, np.nan))
    return measure.difference(samples, best)
