"""Events of a training: what its workers tell the driver, and the base class of those that handle them.

Workers send events through the `coordinator`, as pickled objects; the driver passes each to an
`EventHandler`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Started:
    """The workers have started, or started again.

    Attributes:
        updates: number of updates that they start from.
        attempt: how many times in a row they have started from this number of updates.
        history: evaluations stored in the checkpoint that is resumed, as {"update", "metrics"}.
        device: device of rank 0.
        num_workers: number of workers.
    """

    updates: int
    attempt: int
    history: Sequence[dict[str, Any]]
    device: str
    num_workers: int


@dataclass(frozen=True)
class Evaluated:
    """The model was evaluated.

    Attributes:
        updates: number of updates done.
        metrics: metrics by name.
        files: content of each file of the evaluation by name, see `workflows.training.evaluation_files`.
    """

    updates: int
    metrics: dict[str, float]
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class CheckpointDamaged:
    """A checkpoint was skipped.

    Attributes:
        reason: what is wrong with it, one line.
    """

    reason: str


@dataclass(frozen=True)
class StorageFailed:
    """Checkpoints cannot be written for now and the training goes on, or they can be written again.

    Attributes:
        reason: which of the two, and why, one line.
    """

    reason: str


@dataclass(frozen=True)
class WorkerDied:
    """A worker failed; unless it happens too often, all workers are restarted.

    Attributes:
        reason: why it failed, one line.
    """

    reason: str


@dataclass(frozen=True)
class Finished:
    """The training did all of its updates."""


@dataclass(frozen=True)
class Stopped:
    """The training wrote a checkpoint and stopped, as requested.

    Attributes:
        updates: number of updates done.
    """

    updates: int


@dataclass(frozen=True)
class Failed:
    """The training ended without a result, and restarting the workers cannot change that.

    Attributes:
        reason: why it ended, one line.
    """

    reason: str


@dataclass(frozen=True)
class Diverged(Failed):
    """The training failed since its loss became infinite or not a number."""


@dataclass(frozen=True)
class InputRejected(Failed):
    """The training failed since the user's input cannot be used."""


Event = Started | Evaluated | CheckpointDamaged | StorageFailed | WorkerDied | Finished | Stopped | Failed


class EventHandler:
    """Handles the events of a training; subclasses override the methods of the events that concern them.

    All other events are ignored. `diverged` and `input_rejected` call `failed` unless they are overridden.
    """

    def on_event(self, event: Event) -> None:
        """Call the method of the event's class."""
        match event:
            case Started():
                self.started(event)
            case Evaluated():
                self.evaluated(event)
            case CheckpointDamaged():
                self.checkpoint_damaged(event)
            case StorageFailed():
                self.storage_failed(event)
            case WorkerDied():
                self.worker_died(event)
            case Finished():
                self.finished(event)
            case Stopped():
                self.stopped(event)
            case Diverged():
                self.diverged(event)
            case InputRejected():
                self.input_rejected(event)
            case Failed():
                self.failed(event)

    def started(self, event: Started) -> None:
        """Handle a start of the workers."""

    def evaluated(self, event: Evaluated) -> None:
        """Handle an evaluation."""

    def checkpoint_damaged(self, event: CheckpointDamaged) -> None:
        """Handle a damaged checkpoint."""

    def storage_failed(self, event: StorageFailed) -> None:
        """Handle a storage that fails for a while, or works again."""

    def worker_died(self, event: WorkerDied) -> None:
        """Handle the failure of a worker."""

    def finished(self, event: Finished) -> None:
        """Handle the end of a complete training."""

    def stopped(self, event: Stopped) -> None:
        """Handle the end of a training that was stopped."""

    def failed(self, event: Failed) -> None:
        """Handle the end of a training that failed."""

    def diverged(self, event: Diverged) -> None:
        """Handle the end of a training that diverged."""
        self.failed(event)

    def input_rejected(self, event: InputRejected) -> None:
        """Handle the end of a training whose input cannot be used."""
        self.failed(event)
