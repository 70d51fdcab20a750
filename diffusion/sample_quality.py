"""How near generated samples come to held-out data, and whether they copy the training data."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.data import Dataset
from diffusion.feature_fitting import fit_features
from diffusion.metrics import (
    energy_distance,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_and_recall,
    sliced_wasserstein_distance,
)

# Below, the Frechet distance's bias by the number of samples would decide.
_FEWEST_FOR_FRECHET = 5000
# That samples are compared with; in memory as float64.
_MOST_EXAMPLES, _MOST_VALUES = 20_000, 2**27
# A sample so much nearer to one training example than to the next is a copy of it.
_COPY_RATIO = 1.0 / 3.0
_COPYING_SHARE, _COPYING_DEVIATIONS = 0.05, 3.0
_FEWEST_HELD_OUT = 100


@dataclass(frozen=True, eq=False)
class SampleJudge:
    """Measures samples of a data set's models against held-out examples.

    Args:
        dataset: its training split gives the floors: the same figures of as many training examples.
        reference: [examples, *shape] held-out data, normalised.
    """

    dataset: Dataset
    reference: Tensor

    def figures(self, samples: Tensor) -> dict[str, float]:
        """Every figure of samples [N, *shape], normalised, with its floor.

        `distance` decides, always lower is better. Points: the energy distance, in normalised units;
        beside it `sliced_wasserstein`, `precision` and `recall`. Images: `kid` below 5,000 samples, else
        `frechet`, on the data set's features. `..._se` is a standard error, `..._floor` the figure of as
        many training examples (as many as there are). `nn_train` and `nn_heldout` see `_nearness`.
        """
        deciding = "kid" if len(samples) < _FEWEST_FOR_FRECHET else "frechet"
        floors = self._distances(self.dataset.train[: len(samples)], deciding)
        finite = bool(samples.isfinite().all())
        return {
            **(self._distances(samples, deciding) if finite else {"distance": math.inf}),
            **{_floor_name(name): value for name, value in floors.items()},
            **(self._nearness(samples) if finite else {}),
            "num_samples": len(samples),
            "num_reference": len(self.reference),
        }

    def _distances(self, examples: Tensor, deciding: str) -> dict[str, float]:
        if self.dataset.spec.kind == "points":
            energy = energy_distance(examples, self.reference)
            precision, recall = precision_and_recall(examples, self.reference)
            return {
                "distance": energy.value,
                "distance_se": energy.standard_error,
                "sliced_wasserstein": sliced_wasserstein_distance(examples, self.reference),
                "precision": precision,
                "recall": recall,
            }
        features = self.dataset.features or fit_features(self.dataset, "random")
        assert features is not None
        both = [features(torch.from_numpy(self.dataset.raw(each))) for each in (examples, self.reference)]
        kid, frechet = kernel_distance(*both), frechet_distance(*both)
        decides = kid if deciding == "kid" else frechet
        return {
            "distance": decides.value,
            "distance_se": decides.standard_error,
            "kid": kid.value,
            "kid_se": kid.standard_error,
            "frechet": frechet.value,
            "frechet_se": frechet.standard_error,
        }

    def _nearness(self, samples: Tensor) -> dict[str, float]:
        """Distances to the nearest example, per dimension's root mean square, and copies.

        `nn_train` and `nn_heldout` are means over the samples of the distance to the nearest of equally
        many training and held-out examples: without copying they are equal but for chance (`nn_se`, over
        the samples alone: where they outnumber the examples, chance is larger). `copied` is the share of
        the samples that are less than a third as far from their nearest training example as from the next;
        `copied_floor` is that of the held-out examples, which cannot be copies.

        Source of the third: arXiv:2310.02664, Section 2.
        """
        train, reference = _for_comparison(self.dataset), self.reference
        if min(len(train), len(reference)) < 2:
            return {}
        equal = min(len(train), len(reference))
        scale = math.sqrt(math.prod(self.dataset.spec.shape))
        to_train = nearest(samples, train[:equal], 1)[:, 0] / scale
        to_held_out = nearest(samples, reference[:equal], 1)[:, 0] / scale
        return {
            "nn_train": float(to_train.mean()),
            "nn_heldout": float(to_held_out.mean()),
            "nn_se": float((to_train - to_held_out).std() / math.sqrt(len(samples))),
            "copied": _copied(samples, train),
            "copied_floor": _copied(reference, train),
        }


def copies(figures: dict[str, float], prefix: str = "sample/") -> bool:
    """Whether a model's figures say that it copies training examples, beyond what chance explains.

    Fewer than 100 held-out examples tell too little of chance to say so.
    """
    needed = ("copied", "copied_floor", "num_samples", "num_reference")
    if any(f"{prefix}{name}" not in figures for name in needed):
        return False
    copied, floor, n, m = (figures[f"{prefix}{name}"] for name in needed)
    spread = math.sqrt(copied * (1.0 - copied) / n + floor * (1.0 - floor) / m)
    return m >= _FEWEST_HELD_OUT and copied - floor > max(_COPYING_SHARE, _COPYING_DEVIATIONS * spread)


def nearest_training_examples(dataset: Dataset, samples: Tensor) -> Tensor:
    """The training example nearest to each sample, of the first 20,000 at most: [N, *shape]."""
    train = _for_comparison(dataset)
    flat = train.flatten(1).double()
    places = [torch.cdist(part.flatten(1).double(), flat).argmin(dim=1) for part in samples.split(1024)]
    return train[torch.cat(places)]


def _for_comparison(dataset: Dataset) -> Tensor:
    return dataset.train[: max(2, min(_MOST_EXAMPLES, _MOST_VALUES // math.prod(dataset.spec.shape)))]


def _copied(x: Tensor, train: Tensor) -> float:
    first, second = nearest(x, train, 2).unbind(1)
    return float((first < _COPY_RATIO * second).double().mean())


def _floor_name(name: str) -> str:
    return name.removesuffix("_se") + "_floor" + ("_se" if name.endswith("_se") else "")
