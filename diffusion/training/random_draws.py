"""The random numbers of each update: timesteps, noise, changes of the images, hidden labels and dropout."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.data.augmentation import draw_augmentations
from diffusion.seeding import dropout_seeds, noise_generator

# Updates of small batches share a generator, whose seeding would take longer than the draws.
_MAX_UPDATES, _MAX_VALUES = 64, 2**16


@dataclass(frozen=True, eq=False)
class Draws:
    """Random numbers of one update, for the whole batch.

    Attributes:
        timesteps: int64 [batch].
        importance: [batch], weights that correct for timesteps that were not drawn uniformly, or None.
        noise: standard normal, [batch, *shape].
        flips: uniform on [0, 1), [batch], for horizontal flips.
        labels: uniform on [0, 1), [batch], for hiding labels.
        low_resolution: for low-resolution images, standard normal noise [batch, *shape] and values uniform on
            [0, 1), [batch], for its standard deviation; None if there are none.
        augmentations: see `diffusion.data.augmentation`; None without.
        dropout_seed: seed of this worker's dropout.
    """

    timesteps: Tensor
    importance: Tensor | None
    noise: Tensor
    flips: Tensor
    labels: Tensor
    low_resolution: tuple[Tensor, Tensor] | None
    augmentations: Tensor | None
    dropout_seed: int


class RandomDraws:
    """Draws of each update as a function of (seed, update), the same on every worker but for dropout.

    Updates are drawn in blocks, and a training that resumes in the middle of one draws it again.

    Args:
        seed: seed of the training.
        rank: rank of this worker.
        batch_size: examples per update, over all workers.
        shape: shape of one example.
        draw_timesteps: draws the timesteps of one update, and their importance weights or None.
        ahead: whether timesteps can be drawn before the updates that come before theirs are done.
        device: device of the draws.
        low_resolution_shape: shape of a low-resolution image, or None.
        augment: probability of each augmentation.
    """

    def __init__(
        self,
        seed: int,
        rank: int,
        batch_size: int,
        shape: Sequence[int],
        draw_timesteps: Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]],
        *,
        ahead: bool,
        device: torch.device,
        low_resolution_shape: Sequence[int] | None = None,
        augment: float = 0.0,
    ) -> None:
        self._low_resolution_shape, self._augment = low_resolution_shape, augment
        self._seed, self._rank, self._device = seed, rank, device
        self._shape, self._draw_timesteps = (batch_size, *shape), draw_timesteps
        self._updates = min(_MAX_UPDATES, max(1, _MAX_VALUES // math.prod(self._shape))) if ahead else 1
        self._number, self._block = -1, list[Draws]()

    def of(self, update: int) -> Draws:
        """The draws of an update; the first update is 0."""
        number, index = divmod(update, self._updates)
        if number != self._number:
            self._number, self._block = number, self._draw(number)
        return self._block[index]

    def _draw(self, number: int) -> list[Draws]:
        generator = noise_generator(self._seed, number, self._device)
        count, batch_size = self._updates, self._shape[0]
        timesteps = [self._draw_timesteps(batch_size, generator) for _ in range(count)]
        noise = torch.randn(count, *self._shape, generator=generator, device=self._device)
        flips, labels = (
            torch.rand(count, batch_size, generator=generator, device=self._device) for _ in range(2)
        )
        # Last, so that a training without them has the same draws as ever.
        low_resolution, augmentations = (
            [draw(generator) for _ in range(count)]
            for draw in (self._draw_low_resolution, self._draw_changes)
        )
        seeds = dropout_seeds(self._seed, number, self._rank, count)
        columns = noise, flips, labels, low_resolution, augmentations, seeds
        return [
            Draws(*drawn, *values)
            for drawn, values in zip(timesteps, zip(*columns, strict=True), strict=True)
        ]

    def _draw_low_resolution(self, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        if self._low_resolution_shape is None:
            return None
        batch_size = self._shape[0]
        noise = torch.randn(batch_size, *self._low_resolution_shape, generator=generator, device=self._device)
        return noise, torch.rand(batch_size, generator=generator, device=self._device)

    def _draw_changes(self, generator: torch.Generator) -> Tensor | None:
        if not self._augment:
            return None
        return draw_augmentations(self._shape[0], self._augment, generator)
