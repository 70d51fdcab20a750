"""Randomness as a function of the seed and the update, so that a resumed run needs no state of it.

The order of the data, the timesteps and the noise of update u are drawn for the whole batch from
(seed, u): any worker, at any time, and any number of workers, draw the same. The idea is that of EDM's
training loop (arXiv:2206.00364), which reseeds each step from what it has seen.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_ORDER, _NOISE, _DROPOUT = 0, 1, 2  # independent streams of one seed


def seed_of(seed: int, *counters: int) -> int:
    """A 64-bit seed that differs wherever one of the counters does."""
    return int(np.random.SeedSequence((seed, *counters)).generate_state(1, np.uint64)[0])


def noise_generator(seed: int, update: int, device: torch.device) -> torch.Generator:
    """What an update's timesteps, noise and flips are drawn from, the same on every worker."""
    return torch.Generator(device).manual_seed(seed_of(seed, _NOISE, update))


def seed_dropout(seed: int, update: int, rank: int) -> None:
    """Seed torch's own generator, which dropout draws from: another stream on each worker."""
    torch.manual_seed(seed_of(seed, _DROPOUT, update, rank))


class DataOrder:
    """Which examples each batch holds: every example once an epoch, epochs joined without a gap.

    Args:
        num_examples: in the training split.
        batch_size: examples in a batch, over all workers.
        seed: of the order.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def batch(self, update: int) -> Tensor:
        """Indices of a batch, int64 [batch_size] on the CPU; the first update is 0."""
        start = update * self.batch_size
        end = start + self.batch_size
        parts = []
        while start < end:
            epoch, offset = divmod(start, self.num_examples)
            taken = self._epoch(epoch)[offset : offset + end - start]
            parts.append(taken)
            start += len(taken)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def batches(self, update: int, share: slice) -> Iterator[Tensor]:
        """Endless batches from an update on, one worker's share of each."""
        while True:
            yield self.batch(update)[share]
            update += 1

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {old: order for old, order in self._epochs.items() if old == epoch - 1}
            generator = np.random.default_rng(np.random.SeedSequence((self.seed, _ORDER, epoch)))
            self._epochs[epoch] = torch.from_numpy(generator.permutation(self.num_examples))
        return self._epochs[epoch]
