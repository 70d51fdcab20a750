"""How the independent parts of an evaluation are shared by the workers of a training, if it has several."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Protocol):
    """The processes that share an evaluation, as one of them sees them.

    `diffusion.training.distributed.DistributedContext` is those of a training. An evaluation's parts are the
    same however many workers there are, and so are its results.
    """

    @property
    def is_main(self) -> bool:
        """Whether this one computes what is not shared."""
        ...

    @property
    def world_size(self) -> int:
        """Number of workers."""
        ...

    def map(self, function: Callable[[Item], Result], items: Sequence[Item], /) -> list[Result]:
        """Results of a function for all items, in order, each computed by one worker; all must call it."""
        ...


class _Alone:
    is_main, world_size = True, 1

    def map(self, function: Callable[[Item], Result], items: Sequence[Item], /) -> list[Result]:
        return [function(item) for item in items]


ALONE: Workers = _Alone()
