"""Which timesteps a batch is noised to: drawn uniformly, spread evenly, or where the loss is large.

All is drawn for the whole batch from one generator, so that any number of workers draw the same.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of the losses of each timestep, and the share of timesteps that is drawn uniformly all the same.
_HISTORY, _UNIFORM_SHARE = 10, 0.001


def uniform_timesteps(num_train_timesteps: int, count: int, generator: torch.Generator) -> Tensor:
    """Independent draws from 0..T-1: int64 [count] on the generator's device.

    Source: DDPM, arXiv:2006.11239, Algorithm 1.
    """
    return torch.randint(num_train_timesteps, (count,), generator=generator, device=generator.device)


def stratified_timesteps(num_train_timesteps: int, count: int, generator: torch.Generator) -> Tensor:
    """One draw from each of `count` equal parts of 0..T-1, in random order.

    Each draw alone is uniform, but the batch covers the timesteps evenly, so that its mean loss varies
    less.

    Args:
        num_train_timesteps: T.
        count: examples in the whole batch.
        generator: of torch.

    Returns:
        int64 [count] on the generator's device.

    Source: VDM, arXiv:2107.00630, Appendix I.1, with a draw of its own for each part.
    """
    device = generator.device
    inside = torch.rand(count, dtype=torch.float64, generator=generator, device=device)
    part = torch.randperm(count, generator=generator, device=device)
    return _below((part + inside) / count * num_train_timesteps, num_train_timesteps)


class LossSecondMoment:
    """Draws t with probability proportional to the root of the mean square of its last 10 losses.

    That makes the variance of the weighted loss smallest. Weights of 1 / (T p(t)) keep its mean that of
    uniform t. Until every timestep has 10 losses t is uniform; after that a thousandth of the draws are,
    so that no timestep's losses grow old.

    Args:
        num_train_timesteps: T.

    Source: improved DDPM, arXiv:2102.09672, Section 3.3, Eq. 18, and its code for the thousandth.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        # Each row a ring of the last losses; its mean square does not ask for their order.
        self._losses = np.zeros((num_train_timesteps, _HISTORY))
        self._counts = np.zeros(num_train_timesteps, dtype=np.int64)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """p(t), float64 [T]."""
        total = len(self._counts)
        uniform = np.full(total, 1.0 / total)
        root = np.sqrt(np.square(self._losses).mean(axis=1))
        # A training that diverges must live to be told so: its losses may be anything.
        if self._counts.min() < _HISTORY or not 0.0 < root.sum() < np.inf:
            return uniform
        return (1.0 - _UNIFORM_SHARE) * root / root.sum() + _UNIFORM_SHARE * uniform

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps for a batch, int64 [count], and their weights, float64 [count]."""
        device, probabilities = generator.device, self.probabilities
        u = torch.rand(count, dtype=torch.float64, generator=generator, device=device)
        ends = torch.from_numpy(np.cumsum(probabilities)).to(device)
        timesteps = _below(torch.searchsorted(ends, u, right=True), len(probabilities))
        weights = torch.from_numpy(1.0 / (len(probabilities) * probabilities)).to(device)
        return timesteps, weights[timesteps]

    def observe(self, timesteps: Tensor, losses: Tensor) -> None:
        """Take note of the whole batch's losses, which must be the same on every worker.

        Args:
            timesteps: int64 [count], as drawn.
            losses: [count], not multiplied by their weights.
        """
        order = timesteps.cpu().numpy()
        by_timestep = np.argsort(order, kind="stable")
        sorted_ = order[by_timestep]
        occurrence = np.arange(len(sorted_)) - np.searchsorted(sorted_, sorted_)
        place = (self._counts[sorted_] + occurrence) % _HISTORY
        self._losses[sorted_, place] = losses.cpu().numpy()[by_timestep]
        np.add.at(self._counts, order, 1)

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs."""
        return {"losses": torch.from_numpy(self._losses.copy()), "counts": torch.tensor(self._counts)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self._losses, self._counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


def _below(values: Tensor, total: int) -> Tensor:
    """As timesteps: rounding may have taken a number just below the end to it."""
    return values.to(torch.int64).clamp(max=total - 1)
