"""The workers of one data-parallel training, as each of them sees the others."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Ranks:
    """This worker's place among those of torch's process group; one worker needs no group.

    Attributes:
        rank: from 0.
        world_size: number of workers.
        device: that this worker trains on.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> "Ranks":
        """From the process group, where there is one."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size(), device)
        return cls(0, 1, device)

    @property
    def leads(self) -> bool:
        """Whether this worker evaluates, reports and writes for all."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This worker's part of `count` things; parts differ by one at most and leave nothing out."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def total(self, value: float) -> float:
        """Sum over the workers; every worker must call it."""
        return self._reduced(value, distributed.ReduceOp.SUM) if self.world_size > 1 else value

    def highest(self, value: int) -> int:
        """Maximum over the workers; every worker must call it."""
        return int(self._reduced(value, distributed.ReduceOp.MAX)) if self.world_size > 1 else value

    def gathered(self, part: Tensor, count: int) -> Tensor:
        """All workers' shares of `count` numbers, in order; every worker must call it."""
        if self.world_size == 1:
            return part
        whole = torch.zeros(count, dtype=part.dtype, device=self.device)
        whole[self.share(count)] = part
        distributed.all_reduce(whole)
        return whole

    def _reduced(self, value: float, operation: "distributed.ReduceOp.RedOpType") -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, operation)
        return float(tensor)
