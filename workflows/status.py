"""Status of runs and trials: the words in run.json, in trials.csv, in the terminal and for the tracker."""

from dataclasses import dataclass
from typing import Final, Literal

Status = Literal["running", "stopped", "failed", "finished"]
"""Status of a run of train.py or tune.py; "running" may also mean that its process was killed."""

STOPPED: Final = 3
"""Exit status of a command that a signal has stopped; the same command, or --resume, goes on."""

OUT_OF_MEMORY: Final = "out of memory"
TrialStatus = Literal["running", "finished", "stopped", "pruned", "failed", "diverged", "out of memory"]
"""Status of a sweep's trial:

- "running": it has not ended.
- "finished": it did all of its updates.
- "stopped": it was evaluated, and then stopped early.
- "pruned": its config cannot be trained.
- "failed": it raised, or its process died.
- "diverged": its loss became infinite or not a number.
- "out of memory": it waits to run again, with a GPU to itself.
"""


@dataclass(frozen=True)
class Outcome:
    """How a session of train.py or tune.py ended.

    Attributes:
        status: status of the run.
        location: folder or bucket of the run, as `Storage` writes it; None if nothing was to be run.
        has_model: whether the session published a model.
        reason: why there is no model, in one line; empty if there is one or the run was stopped.
    """

    status: Status
    location: str | None = None
    has_model: bool = False
    reason: str = ""

    @property
    def exit_status(self) -> int:
        """Exit status of the process: 3 if the run was stopped, 1 without a model, else 0."""
        if self.status == "stopped":
            return STOPPED
        return 0 if self.has_model or self.location is None else 1
