"""What images are compared by: the features of a network, standardised over the training split."""

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffusion.errors import InputError
from diffusion.feature_networks import Inception, classifier, random_network
from diffusion.run_config import FeatureNetwork
from diffusion.sources import CACHE

if TYPE_CHECKING:
    from diffusion.data import Dataset

# That a classifier is trained on, and features are standardised over; in memory as float64.
_MOST_IMAGES, _MOST_VALUES = 20_000, 2**26
_RECIPE = 1  # of the classifier; another one must not read this one's files
_FEWEST_OF_A_CLASS = 20
_LARGEST_SIDE = 32  # that the small networks look at
_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Features:
    """A named feature network.

    Attributes:
        name: random, classifier or inception.
        network: the network; its `features` are taken.
        value_range: of the images, in data units.
        mean, std: of the features over the training split: float64 [features].
        accuracy: of a classifier on the validation split, else None.
    """

    name: FeatureNetwork
    network: nn.Module
    value_range: tuple[float, float]
    mean: Tensor
    std: Tensor
    accuracy: float | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Standardised features of images [batch, C, H, W] in data units: float64 [batch, features]."""
        found = [self._of(part.to(self.mean.device)) for part in images.split(_AT_ONCE)]
        return (torch.cat(found) - self.mean) / self.std

    def to(self, device: str | torch.device) -> "Features":
        """The same on another device."""
        network = copy.deepcopy(self.network).to(device)
        return replace(self, network=network, mean=self.mean.to(device), std=self.std.to(device))

    def _of(self, images: Tensor) -> Tensor:
        take = self.network.features
        return take(_prepared(images, self.value_range, self.name)).double()  # type: ignore[operator]


def fit_features(dataset: "Dataset", wanted: FeatureNetwork) -> Features | None:
    """The features that a data set's images are compared by; None of points.

    Args:
        dataset: on the CPU.
        wanted: "auto" is a classifier where the data have classes of 20 training images or more, else a
            random network.

    Raises:
        InputError: a classifier is asked for and there are no such classes, or Inception's weights are
            not there.
    """
    spec, value_range = dataset.spec, dataset.spec.range
    if value_range is None:
        return None
    name: FeatureNetwork = wanted
    if wanted in ("auto", "classifier"):
        name = "classifier" if _can_be_classified(dataset) else "random"
        if name != wanted == "classifier":
            raise InputError(
                f"--metrics.features classifier: {spec.name} needs two classes or more, each of "
                f"{_FEWEST_OF_A_CLASS} training images or more; give random, or auto"
            )
    accuracy = None
    network: nn.Module
    count = max(1, min(_MOST_IMAGES, _MOST_VALUES // math.prod(spec.shape)))
    images = torch.from_numpy(dataset.raw(dataset.train[:count]))
    if name == "classifier":
        held_out, labels = torch.from_numpy(dataset.raw(dataset.val[:count])), dataset.train.labels
        assert labels is not None and dataset.val.labels is not None
        network, accuracy = classifier(
            _prepared(images, value_range, name),
            labels[:count],
            (_prepared(held_out, value_range, name), dataset.val.labels[:count]),
            int(labels.max()) + 1,
            CACHE.expanduser() / "features" / f"{spec.fingerprint}-{_RECIPE}.safetensors",
        )
    else:
        network = Inception() if name == "inception" else random_network(spec.shape[0])
    nothing = torch.zeros((), dtype=torch.float64)
    bare = Features(name, network.eval().requires_grad_(False), value_range, nothing, nothing + 1.0, accuracy)
    found = bare(images)
    # What never varies says nothing, and must not be divided by 0.
    std = found.std(dim=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)
    return Features(name, bare.network, value_range, found.mean(dim=0), std, accuracy)


def _can_be_classified(dataset: "Dataset") -> bool:
    labels = dataset.train.labels
    if labels is None or dataset.val.labels is None:
        return False
    sizes = torch.bincount(labels[:_MOST_IMAGES])
    return len(sizes) > 1 and int(sizes.min()) >= _FEWEST_OF_A_CLASS


def _prepared(images: Tensor, value_range: tuple[float, float], name: FeatureNetwork) -> Tensor:
    """Images in data units as the networks take them: float32 in [-1, 1]; small ones for small networks."""
    low, high = value_range
    scaled = ((images - low) / (high - low) * 2.0 - 1.0).float()
    if name == "inception" or max(scaled.shape[2:]) <= _LARGEST_SIDE:
        return scaled
    side = [min(each, _LARGEST_SIDE) for each in scaled.shape[2:]]
    return nn.functional.interpolate(scaled, side, mode="bilinear", antialias=True)
