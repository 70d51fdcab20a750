"""A small Ray actor through which the workers of a training and their driver exchange events and signals.

Rank 0 adds events and reports its progress, which the driver collects with `take_events`. The driver and the
workers request signals, which every worker polls. Workers never call the driver directly. Ray Train's
controller makes itself known, so that the driver can end it.
"""

from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workflows.training.events import Event

Signal = Literal["continue", "restart", "stop", "abort"]
"""What all workers should do:

- "continue": train.
- "restart": write a checkpoint and end, to be restarted; the machine of one of them will be taken away.
- "stop": write a checkpoint and end.
- "abort": end; an error occurred that a restart cannot fix.
"""


class Coordinator:
    """Holds the events that the driver has not collected yet, and the current signal for the workers.

    It belongs to the driver process and dies with it: a worker that cannot reach its coordinator has no
    driver any more and must exit.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._signal: Signal = "continue"
        self._updates = 0
        self._starts: list[int] = []
        self._controller: Any = None

    def set_controller(self, controller: Any) -> None:
        """Record the actor handle of Ray Train's controller, which starts the workers."""
        self._controller = controller

    def controller(self) -> Any:
        """Return the actor handle of Ray Train's controller; None before it has started."""
        return self._controller

    def record_start(self, updates: int) -> int:
        """Record that the workers start, and end a request to restart them.

        Args:
            updates: number of updates that the workers start from.

        Returns:
            How many times in a row they have started from this number of updates.
        """
        self._starts = [*(start for start in self._starts if start == updates), updates]
        self._updates = updates
        if self._signal == "restart":
            self._signal = "continue"
        return len(self._starts)

    def add_event(self, event: Event) -> None:
        """Add an event for the driver."""
        self._events.append(event)

    def take_events(self) -> tuple[list[Event], int]:
        """Return the events since the last call, in order, and the number of updates done."""
        events, self._events = self._events, []
        return events, self._updates

    def poll(self, updates: int | None) -> Signal:
        """Return the current signal.

        Args:
            updates: number of updates done, reported by rank 0; None from other callers.
        """
        if updates is not None:
            self._updates = updates
        return self._signal

    def request_signal(self, signal: Signal) -> None:
        """Set the signal for all workers; "abort" is final, and only "abort" replaces "stop"."""
        if signal == "abort" or self._signal not in ("stop", "abort"):
            self._signal = signal


def start_coordinator() -> Any:
    """Start a coordinator on the machine of this process, and return its actor handle.

    Any other machine may be taken away while the driver still runs.
    """
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_concurrency=1, scheduling_strategy=this_node)(Coordinator).remote()
