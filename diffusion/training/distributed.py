"""The process group of a data-parallel training, as seen by one worker."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class DistributedContext:
    """This worker's rank in torch's process group, and its collective operations.

    A single worker needs no process group.

    Attributes:
        rank: rank of this worker, from 0.
        world_size: number of workers.
        device: device that this worker trains on.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def from_process_group(cls, device: torch.device) -> "DistributedContext":
        """The context of the initialised process group, or of a single worker if there is none."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size(), device)
        return cls(0, 1, device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which evaluates, reports and writes for all workers."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """This worker's slice of `count` items; the slices cover all items and differ by one at most."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def all_reduce_sum(self, value: float) -> float:
        """Sum over the workers; every worker must call it."""
        return self._reduce(value, distributed.ReduceOp.SUM) if self.world_size > 1 else value

    def all_reduce_max(self, value: int) -> int:
        """Maximum over the workers; every worker must call it."""
        return int(self._reduce(value, distributed.ReduceOp.MAX)) if self.world_size > 1 else value

    def all_gather(self, shard: Tensor, count: int) -> Tensor:
        """All workers' shards of `count` numbers, concatenated in rank order; every worker must call it."""
        if self.world_size == 1:
            return shard
        gathered = torch.zeros(count, dtype=shard.dtype, device=self.device)
        gathered[self.shard(count)] = shard
        distributed.all_reduce(gathered)
        return gathered

    def _reduce(self, value: float, operation: "distributed.ReduceOp.RedOpType") -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, operation)
        return float(tensor)
