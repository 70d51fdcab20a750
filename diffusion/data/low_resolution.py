"""Low-resolution images, computed from others: those that a super-resolution model receives."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.dataset import DataSpec
from diffusion.data.image_reading import reduction_matrix
from diffusion.normalisation import denormalise, normalise


class LowResolution:
    """The low-resolution images of a data set, as its super-resolution models receive them.

    They are the ones that `--image-size` makes of the same data, apart from the rounding to 8 bits, and are
    normalised by the mean and the standard deviation of the full images.

    Args:
        spec: description of the data.
        side: side of the low-resolution images in pixels.

    Attributes:
        shape: shape of a low-resolution image, (C, side, side).
    """

    def __init__(self, spec: DataSpec, side: int) -> None:
        assert spec.range is not None, "only images are reduced"
        self.shape = (spec.shape[0], side, side)
        self._mean, self._std = spec.mean, spec.std
        self._low, self._high = (self.normalised(np.array(end)) for end in spec.range)

    def of(self, x_0: Tensor) -> Tensor:
        """Low-resolution images [batch, *shape] of images [batch, C, H, W]; both are normalised."""
        down, across = (_matrix(size, self.shape[-1], x_0.device) for size in x_0.shape[-2:])
        return (down @ x_0 @ across.T).clip(self._low.to(x_0.device), self._high.to(x_0.device))

    def normalised(self, images: NDArray[Any]) -> Tensor:
        """Low-resolution images in data units, [batch, *shape], as float32 in normalised units."""
        return torch.from_numpy(normalise(images, self._mean, self._std)).float()

    def denormalised(self, low_resolution: Tensor) -> NDArray[np.float64]:
        """Low-resolution images in normalised units, in data units; with noise they may exceed the range."""
        return denormalise(low_resolution.double().cpu().numpy(), self._mean, self._std, None)


def noised(low_resolution: Tensor, noise: Tensor, noise_levels: Tensor) -> tuple[Tensor, Tensor]:
    """The two inputs of a super-resolution network: low-resolution images with noise, and its strength.

    Args:
        low_resolution: [batch, C, H, W], normalised.
        noise: standard normal, of the same shape.
        noise_levels: [batch], standard deviation of the noise of each image.

    Returns:
        [batch, C, H, W], and `noise_levels`.

    Source: conditioning augmentation of Cascaded diffusion, arXiv:2106.15282.
    """
    return low_resolution + noise_levels[:, None, None, None] * noise, noise_levels


def noised_by_seed(low_resolution: Tensor, noise_level: float, seed: int) -> tuple[Tensor, Tensor]:
    """`noised` with noise of one level; that of the first images is the same for any number of them."""
    device = low_resolution.device
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(low_resolution.shape)))
    return noised(
        low_resolution, noise.float().to(device), torch.full((len(noise),), noise_level, device=device)
    )


@cache
def _matrix(size: int, side: int, device: torch.device) -> Tensor:
    return torch.from_numpy(reduction_matrix(size, side)).float().to(device)
