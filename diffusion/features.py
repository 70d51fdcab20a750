"""What images are compared by: the features of a network, standardised over the training split."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffusion.run_config import FeatureNetwork

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
        return take(prepared(images, self.value_range, self.name)).double()  # type: ignore[operator]


def prepared(images: Tensor, value_range: tuple[float, float], name: FeatureNetwork) -> Tensor:
    """Images in data units as the networks take them: float32 in [-1, 1]; small ones for small networks."""
    low, high = value_range
    scaled = ((images - low) / (high - low) * 2.0 - 1.0).float()
    if name == "inception" or max(scaled.shape[2:]) <= _LARGEST_SIDE:
        return scaled
    side = [min(each, _LARGEST_SIDE) for each in scaled.shape[2:]]
    return nn.functional.interpolate(scaled, side, mode="bilinear", antialias=True)
