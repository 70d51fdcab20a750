"""Writes a training's files to a storage that may be silent for minutes, while the training goes on."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from diffusion.files import os_reason
from workflows.storage.attempt import Attempt
from workflows.storage.storage import is_permanent
from workflows.training.checkpoint_store import REMEDY, CheckpointStore, CheckpointWriteError

# How long a training waits for one write. One that takes longer goes on in the background.
SECONDS_TO_WRITE = 60.0
SECONDS_BETWEEN_RETRIES = 30.0
PAUSE_FACTOR = 4.0  # pause after a failed write, in times of its duration: they take a fifth of the time
_SECONDS_TO_STOP = 20.0


class PatientWriter:
    """Writes checkpoints and other files; a storage that fails for a while costs a training only time.

    A write that fails, or that does not return within a minute as on a dead mount, is left out with a notice,
    and the caller tries again at the next checkpoint. Attempts take at most a fifth of the time. A failure
    that waiting cannot mend, such as a full disk, is an error at once.

    Args:
        store: store of the checkpoints; None for a training that keeps none.
        retry_seconds: seconds after the first failed write after which another one is an error.
        notify: receives one line when checkpoints begin to be missed, and when they are written again.
    """

    def __init__(
        self, store: CheckpointStore | None, retry_seconds: float, notify: Callable[[str], None]
    ) -> None:
        self._store, self._retry_seconds, self._notify = store, retry_seconds, notify
        self._failing_since: float | None = None
        self._missed: tuple[Callable[[Path], None], int, float | None] | None = None
        self._attempt: Attempt | None = None
        self._paused_until, self._problem = 0.0, ""  # after a failed write, and why it failed

    def save(self, write: Callable[[Path], None], update: int, objective: float | None) -> None:
        """Write a checkpoint, or miss it; the arguments are those of `CheckpointStore.save`.

        Raises:
            CheckpointWriteError: waiting cannot mend the failure, or the storage has failed for too long.
        """
        if self._store is None:
            return
        store, abandoned = self._store, threading.Event()

        def write_unless_abandoned(folder: Path) -> None:
            write(folder)
            if abandoned.is_set():  # the weights have changed while they were written
                raise TimeoutError("it was abandoned")

        try:
            self._run(lambda: store.save(write_unless_abandoned, update, objective))
        except CheckpointWriteError as error:
            if not isinstance(error.__cause__, OSError) or is_permanent(error.__cause__):
                raise
            self._missed = write, update, objective
            self._fail(error)
            return
        except TimeoutError as error:
            abandoned.set()
            self._missed = write, update, objective
            problem = f"the checkpoint of update {update} could not be written to {store} ({error})"
            self._fail(CheckpointWriteError(problem + REMEDY))
            return
        if self._failing_since is not None:
            self._notify(f"{store} answers again: it has the checkpoint of update {update}")
        self._failing_since = self._missed = None

    def write(self, action: Callable[[], None], what: str) -> None:
        """Write a file that the training can do without.

        Args:
            action: writes it; may raise OSError.
            what: the file and its location, for the message.

        Raises:
            CheckpointWriteError: waiting cannot mend the failure.
        """
        try:
            self._run(action)
        except OSError as error:
            if is_permanent(error):
                raise CheckpointWriteError(
                    f"{what} could not be written ({os_reason(error)}){REMEDY}"
                ) from error

    def finish(self, is_stopping: Callable[[], bool]) -> None:
        """Repeat a missed last checkpoint until it is written; call it when the training has ended.

        Args:
            is_stopping: whether the run is asked to end, so that only seconds are left.

        Raises:
            CheckpointWriteError: the time is over.
        """
        tried_at, deadline = time.monotonic(), None
        while self._missed is not None:
            now = time.monotonic()
            if deadline is None and is_stopping():
                deadline = now + _SECONDS_TO_STOP
            if now - tried_at > SECONDS_BETWEEN_RETRIES or deadline is not None:
                if deadline is not None and now > deadline:
                    self._retry_seconds = 0.0  # the next failure is the last one
                self._paused_until = 0.0  # nothing else is left to do
                self.save(*self._missed)
                tried_at = time.monotonic()
            time.sleep(min(1.0, SECONDS_BETWEEN_RETRIES))

    def _run(self, action: Callable[[], None]) -> None:
        """Run an action, and wait for it for a minute.

        Raises:
            TimeoutError: it, or an earlier action, has not returned yet, or an earlier one has just failed.
            Exception: what the action raises.
        """
        started = time.monotonic()
        if started < self._paused_until:
            raise TimeoutError(self._problem)
        if self._attempt is not None and self._attempt.is_running:
            raise TimeoutError("an earlier write has not returned yet")
        self._attempt = Attempt(action)
        try:
            self._attempt.wait(SECONDS_TO_WRITE)
        except Exception as error:
            now = time.monotonic()
            self._paused_until = now + PAUSE_FACTOR * max(now - started, SECONDS_BETWEEN_RETRIES / 4)
            self._problem = os_reason(error.__cause__ if isinstance(error.__cause__, OSError) else error)
            raise

    def _fail(self, error: CheckpointWriteError) -> None:
        """Count a failed write.

        Raises:
            CheckpointWriteError: the storage has failed for too long.
        """
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            self._notify(
                f"{str(error).removesuffix(REMEDY)}; training goes on, and checkpoints are tried again for "
                f"{self._retry_seconds / 60:g} minutes"
            )
        if now - self._failing_since >= self._retry_seconds:
            raise error
