"""How the workers of a training and whoever runs them talk: a small actor that both can reach."""

from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Wish = Literal["go on", "start anew", "stop", "give up"]
"""What is wanted of the workers: to start anew where one of them is about to be ended from outside, to
stop after a checkpoint, or to end at once, since one of them met what no new start mends."""
Event = dict[str, Any]
"""`kind` and what belongs to it; see `workflows.worker`."""


class Mailbox:
    """Events from the leading worker, and what is wanted of all workers.

    It belongs to the process that runs the workers and dies with it: a worker that cannot reach its
    mailbox is on its own and must end.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._wish: Wish = "go on"
        self._updates = 0
        self._attempts: list[int] = []

    def begin(self, updates: int) -> int:
        """Say that the workers start at this update; how many times in a row they have started there."""
        self._attempts = [*(old for old in self._attempts if old == updates), updates]
        self._updates = updates
        if self._wish == "start anew":
            self._wish = "go on"
        return len(self._attempts)

    def post(self, event: Event) -> None:
        """Leave an event."""
        self._events.append(event)

    def take(self) -> tuple[list[Event], int]:
        """The events since the last call, and the updates done."""
        events, self._events = self._events, []
        return events, self._updates

    def exchange(self, updates: int | None) -> Wish:
        """Tell how far training is (the leading worker), and hear what is wanted."""
        if updates is not None:
            self._updates = updates
        return self._wish

    def want(self, wish: Wish) -> None:
        """Want something of all workers; `give up` stays, and so does `stop` but for that."""
        if wish == "give up" or self._wish not in ("stop", "give up"):
            self._wish = wish


def open_mailbox() -> Any:
    """A mailbox of this process, on its own machine: others may be taken away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_concurrency=1, scheduling_strategy=here)(Mailbox).remote()
