"""The process group of a data-parallel training, as seen by one worker."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")
Result = TypeVar("Result")


class Interrupted(Exception):
    """What the workers do together was interrupted, on this worker or on another one."""


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
        """Whether this is rank 0, which reports and writes for all workers."""
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

    def map(self, function: Callable[[Item], Result], items: Sequence[Item], /) -> list[Result]:
        """Results of a function for all items, each computed by one worker; every worker must call it.

        Args:
            function: what to compute; the result can be pickled and is in the memory of the host.
            items: the same items on every worker.

        Raises:
            Interrupted: the function raised it on some worker.
        """
        if self.world_size == 1:
            return [function(item) for item in items]
        results: list[Result] | None = None
        try:
            results = [function(item) for item in items[self.shard(len(items))]]
        except Interrupted:
            pass
        by_rank: list[list[Result] | None] = [None] * self.world_size
        distributed.all_gather_object(by_rank, results)
        if any(each is None for each in by_rank):
            raise Interrupted
        return [result for each in by_rank if each is not None for result in each]

    def broadcast(self, value: Result) -> Result:
        """Rank 0's value, which can be pickled; every worker must call it."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def _reduce(self, value: float, operation: "distributed.ReduceOp.RedOpType") -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, operation)
        return float(tensor)
