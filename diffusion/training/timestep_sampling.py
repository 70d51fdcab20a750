"""Sampling of a batch's timesteps: uniform, stratified, or by importance (where the loss is large).

Timesteps are drawn for the whole batch from one generator, so they do not depend on the number of workers.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.devices import widest_float

_HISTORY_LENGTH = 10  # losses kept per timestep
_UNIFORM_FRACTION = 0.001  # of importance sampling's draws


def uniform_timesteps(num_train_timesteps: int, count: int, generator: torch.Generator) -> Tensor:
    """Independent draws from 0..T-1: int64 [count] on the generator's device.

    Source: DDPM, arXiv:2006.11239, Algorithm 1.
    """
    return torch.randint(num_train_timesteps, (count,), generator=generator, device=generator.device)


def stratified_timesteps(num_train_timesteps: int, count: int, generator: torch.Generator) -> Tensor:
    """One draw from each of `count` equal parts of 0..T-1, in random order.

    Each draw by itself is uniform, but the batch covers the timesteps evenly, so its mean loss varies
    less.

    Args:
        num_train_timesteps: T.
        count: number of examples in the whole batch.
        generator: generator to draw from.

    Returns:
        int64 [count] on the generator's device.

    Source: VDM, arXiv:2107.00630, Appendix I.1, with an independent offset in each part.
    """
    device = generator.device
    offset = torch.rand(count, dtype=widest_float(device), generator=generator, device=device)
    part = torch.randperm(count, generator=generator, device=device)
    return _to_timesteps((part + offset) / count * num_train_timesteps, num_train_timesteps)


class LossSecondMoment:
    """Importance sampler: draws t in proportion to the root mean square of its last 10 losses.

    This minimises the variance of the weighted loss. The weights 1 / (T p(t)) keep the mean equal to that
    of uniform t. Draws are uniform until every timestep has 10 losses. After that one draw in a thousand
    is, so that every timestep's losses are renewed.

    Args:
        num_train_timesteps: T.

    Source: improved DDPM, arXiv:2102.09672, Section 3.3, Eq. 18; the thousandth is from its code.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        # Each row is a ring buffer of a timestep's last losses.
        self._losses = np.zeros((num_train_timesteps, _HISTORY_LENGTH))
        self._counts = np.zeros(num_train_timesteps, dtype=np.int64)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """p(t), float64 [T]."""
        num_train_timesteps = len(self._counts)
        uniform = np.full(num_train_timesteps, 1.0 / num_train_timesteps)
        rms = np.sqrt(np.square(self._losses).mean(axis=1))
        # Losses that are not finite must not fail here: the training loop detects the divergence.
        if self._counts.min() < _HISTORY_LENGTH or not 0.0 < rms.sum() < np.inf:
            return uniform
        return (1.0 - _UNIFORM_FRACTION) * rms / rms.sum() + _UNIFORM_FRACTION * uniform

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps of a batch, int64 [count], and their importance weights, [count]."""
        device, probabilities = generator.device, self.probabilities
        u = torch.rand(count, dtype=widest_float(device), generator=generator, device=device)
        cumulative = torch.from_numpy(np.cumsum(probabilities)).to(device, u.dtype)
        timesteps = _to_timesteps(torch.searchsorted(cumulative, u, right=True), len(probabilities))
        weights = torch.from_numpy(1.0 / (len(probabilities) * probabilities)).to(device, u.dtype)
        return timesteps, weights[timesteps]

    def observe(self, timesteps: Tensor, losses: Tensor) -> None:
        """Record the losses of the whole batch, which must be the same on every worker.

        Args:
            timesteps: int64 [count], as drawn.
            losses: [count], not multiplied by the importance weights.
        """
        drawn = timesteps.cpu().numpy()
        by_timestep = np.argsort(drawn, kind="stable")
        sorted_ = drawn[by_timestep]
        occurrence = np.arange(len(sorted_)) - np.searchsorted(sorted_, sorted_)
        index = (self._counts[sorted_] + occurrence) % _HISTORY_LENGTH
        self._losses[sorted_, index] = losses.cpu().numpy()[by_timestep]
        np.add.at(self._counts, drawn, 1)

    def state(self) -> dict[str, Tensor]:
        """The state that `restore` needs."""
        return {"losses": torch.from_numpy(self._losses.copy()), "counts": torch.tensor(self._counts)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self._losses, self._counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


def _to_timesteps(values: Tensor, num_train_timesteps: int) -> Tensor:
    """Values rounded down to timesteps, and below T even if a rounding error took a value up to T."""
    return values.to(torch.int64).clamp(max=num_train_timesteps - 1)
