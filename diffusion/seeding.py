"""Random numbers of training as a function of seed and update, so that resuming needs no generator state.

The order of the data, the timesteps and the noise of update u are drawn for the whole batch from
(seed, u), those of small batches in blocks of updates. They are therefore the same on every worker, for
any number of workers, and after resuming. EDM's training loop (arXiv:2206.00364) reseeds each step in a
similar way.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_ORDER, _NOISE, _DROPOUT = 0, 1, 2  # independent streams of one seed


def seed_of(seed: int, *counters: int) -> int:
    """A 64-bit seed derived from `seed` and the counters; it differs if any of them differs."""
    return int(np.random.SeedSequence((seed, *counters)).generate_state(1, np.uint64)[0])


def noise_generator(seed: int, block: int, device: torch.device) -> torch.Generator:
    """Generator of the timesteps, noise and horizontal flips of a block of updates, on every worker."""
    return torch.Generator(device).manual_seed(seed_of(seed, _NOISE, block))


def dropout_seeds(seed: int, block: int, rank: int, count: int) -> list[int]:
    """Seeds of dropout in each update of a block, a different stream on each worker."""
    sequence = np.random.SeedSequence((seed, _DROPOUT, block, rank))
    return [int(value) for value in sequence.generate_state(count, np.uint64)]


def seed_dropout(value: int, device: torch.device) -> None:
    """Seed the device's default generator, which dropout uses."""
    if device.type == "cpu":
        # torch.manual_seed seeds every kind of device; for those that are not in use yet it keeps the
        # call and a formatted stack, which took a tenth of the training of a small network.
        torch.default_generator.manual_seed(value)
    else:
        torch.manual_seed(value)


class ShuffledBatchSampler:
    """Indices of the examples in each batch, in an order that is shuffled again in each epoch.

    Every example occurs once per epoch. The epochs follow each other without a gap, so a batch may
    contain the end of one epoch and the start of the next.

    Args:
        num_examples: number of examples in the training split.
        batch_size: examples per batch, over all workers.
        seed: seed of the order.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def batch(self, update: int) -> Tensor:
        """Indices of a batch, int64 [batch_size] on the CPU; the first update is 0."""
        start = update * self.batch_size
        end = start + self.batch_size
        pieces = []
        while start < end:
            epoch, offset = divmod(start, self.num_examples)
            piece = self._epoch_order(epoch)[offset : offset + end - start]
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def batches(self, update: int, part: slice) -> Iterator[Tensor]:
        """Endless iterator over the batches from `update` on; of each batch only one worker's `part`."""
        while True:
            yield self.batch(update)[part]
            update += 1

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            # Keep only the previous epoch, with which a batch may begin.
            self._epochs = {old: order for old, order in self._epochs.items() if old == epoch - 1}
            generator = np.random.default_rng(np.random.SeedSequence((self.seed, _ORDER, epoch)))
            self._epochs[epoch] = torch.from_numpy(generator.permutation(self.num_examples))
        return self._epochs[epoch]
