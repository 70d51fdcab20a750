"""Dispatches the events of a training to the tracker, the terminal and the run record."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from workflows.cli.run_options import TrainOptions
from workflows.status import Status
from workflows.storage.run_record import RunRecord
from workflows.storage.storage import Storage
from workflows.terminal import TrainingProgress
from workflows.tracking.tracker import Tracker
from workflows.training.base_logger import BaseLogger, resume_command
from workflows.training.checkpoint_store import CheckpointStore
from workflows.training.evaluation_files import PICTURE, UNTRAINED
from workflows.training.events import (
    CheckpointDamaged,
    Evaluated,
    EventHandler,
    Failed,
    Finished,
    InputRejected,
    Started,
    Stopped,
    StorageFailed,
    WorkerDied,
)
from workflows.training.worker import picture_name

# Flags that a resumed training does not remember.
_NOT_SAVED = ("num_workers", "keep_checkpoints", "storage_retry_minutes", "output_dir", "tracking_uri")


class RunLogger(BaseLogger[TrainOptions], EventHandler):
    """Log of one run of train.py, in the driver process; created by `open`.

    Attributes:
        folder: folder of the run.
        tracker: tracker of the run.
        store: checkpoints of the run.
        pictures: folder with the pictures of samples.
        view: progress of the training in the terminal.
        history: one entry per evaluation, {"update", "metrics"}, over all sessions of the run.
        status: status of the training; "failed" until an event sets another.
        reason: why the training failed, one line; empty if it did not.
        input_error: what a worker found wrong with the user's input, one line; empty if nothing.
    """

    command = "train"
    view: TrainingProgress

    def __init__(self, folder: Storage, record: RunRecord, tracker: Tracker, options: TrainOptions) -> None:
        super().__init__(folder, record, tracker, options)
        num_updates = record.config.training.num_updates
        self.view = TrainingProgress(record.name, num_updates, quiet=not options.progress)
        self.store = CheckpointStore(folder.child("checkpoints"), options.keep_checkpoints)
        self.pictures = folder.child("samples")
        self.history: list[dict[str, Any]] = []
        self.status: Status = "failed"
        self.reason = self.input_error = ""
        self._logged: set[int] = set()
        self._has_damaged = False  # whether a checkpoint is
        self._resume_command = resume_command(self.command, record.name, options, _NOT_SAVED)

    def resume(self, run_id: str) -> None:
        """Continue the run in the tracker, and keep which evaluations it has."""
        self._logged = self.tracker.resume(run_id)

    def started(self, event: Started) -> None:
        """Take over the history of the checkpoint that is resumed."""
        self.history = list(event.history)
        for index, entry in enumerate(self.history):  # a driver that was killed may not have logged all
            updates = ([] if index else [0]) + [entry["update"]]
            pictures = {step: self.pictures.read_bytes(picture_name(step)) for step in updates}
            self._log_evaluation(entry["update"], entry["metrics"], pictures)
        if self._has_damaged and not event.updates:
            self.view.print("warning: no checkpoint is left to resume from: the training starts from scratch")
        elif event.updates or event.attempt > 1:
            self.view.print(f"Resuming from update {event.updates} (workers: {event.num_workers}).")

    def evaluated(self, event: Evaluated) -> None:
        """Log and print the metrics."""
        self.history.append({"update": event.updates, "metrics": event.metrics})
        pictures = {0: event.files.get(UNTRAINED), event.updates: event.files.get(PICTURE)}
        self._log_evaluation(event.updates, event.metrics, pictures)
        self.view.evaluated(event.updates, event.metrics)

    def checkpoint_damaged(self, event: CheckpointDamaged) -> None:
        """Print a warning."""
        self._has_damaged = True
        self.view.print(f"warning: {event.reason}; using an older checkpoint, if there is one")

    def storage_failed(self, event: StorageFailed) -> None:
        """Print a warning."""
        self.view.print(f"warning: {event.reason}")

    def worker_died(self, event: WorkerDied) -> None:
        """Print that the workers are restarted, unless they have reported why they ended."""
        if not (self.reason or self.input_error):
            self.view.print(f"A worker ended ({event.reason}); restarting the workers.")

    def finished(self, event: Finished) -> None:
        """Set the status."""
        self.status = "finished"

    def stopped(self, event: Stopped) -> None:
        """Set the status."""
        self.status = "stopped"

    def failed(self, event: Failed) -> None:
        """Keep the reason for the end of the run."""
        self.reason = event.reason

    def input_rejected(self, event: InputRejected) -> None:
        """Keep the reason as an error in the user's input."""
        self.input_error = event.reason

    def close(self, status: Status) -> None:
        """End the run in the tracker, record the status, and print how to resume if there is no model."""
        self.tracker.tag({"status": status} | ({"reason": self.reason[:500]} if self.reason else {}))
        super().close(status)

    def _print_end(self, status: Status) -> None:
        next_line = f"next: {self._resume_command}"
        if status == "stopped":
            saved = self.store.updates()
            newest = (
                f"the newest checkpoint is that of update {saved[-1]}"
                if saved
                else "there is no checkpoint yet"
            )
            self.view.print(f"Stopped; {newest}.\n{next_line}")
        elif status == "failed" and not self.input_error:
            self.view.print(f"error: {self.reason or 'the workers ended without a result'}\n{next_line}")

    def _log_evaluation(
        self, updates: int, metrics: dict[str, float], pictures: Mapping[int, bytes | None]
    ) -> None:
        """Send an evaluation, and pictures by the updates before them, unless the tracker has it already.

        The metrics go last, since their steps tell a resumed run which evaluations the tracker has.
        """
        if updates in self._logged:
            return
        self._logged.add(updates)
        for step, picture in pictures.items():
            if picture is not None:
                with Image.open(io.BytesIO(picture)) as file:
                    self.tracker.log_picture(file.copy(), step)
        self.tracker.log(metrics, updates)
