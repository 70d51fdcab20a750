"""Opens and closes what a sweep writes: its folder, its trial records and its run in the tracker.

`open` creates these for a new sweep, or restores them for one that is resumed.
"""

import hashlib
import shutil
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.errors import InputError
from diffusion.files import os_reason
from workflows.cli.tune_options import UNLIMITED, TuneOptions
from workflows.environment import cache_folder, shared_location
from workflows.status import OUT_OF_MEMORY, Status, TrialStatus
from workflows.storage.mirror import Mirror, restore
from workflows.storage.run_record import RunRecord
from workflows.storage.storage import Storage
from workflows.sweep.journal import JOURNAL_FILE
from workflows.sweep.table_view import SweepTable
from workflows.sweep.trial_records import INTERRUPTED, TrialRecords
from workflows.terminal import display_path, waiting
from workflows.tracking.tracker import Tracker
from workflows.training.base_logger import BaseLogger, resume_command
from workflows.training.evaluation_files import PICTURE, UNTRAINED

# Folders in `SweepLogger.shared` with checkpoints that are of no use once the sweep has ended.
_TUNE, FINAL_CHECKPOINTS, RUNNING_TRIALS = "tune", "final", "running"
TEMPORARY = (_TUNE, FINAL_CHECKPOINTS, RUNNING_TRIALS)
# Flags that a resumed sweep does not remember.
_NOT_SAVED = ("output_dir", "storage_retry_minutes", "tracking_uri")


class SweepLogger(BaseLogger[TuneOptions]):
    """The outputs of a sweep in progress; made by `open`.

    Attributes:
        directory: folder of the sweep; of one in a bucket the local working copy, see `Mirror`.
        shared: storage that all machines of a cluster can access: the sweep's folder, or a bucket.
        experiment: name of the tracker's experiment.
        records: records of the sweep's trials, those of earlier sessions included.
        tracker: tracker of the sweep and its trials.
        view: live table in the terminal.
    """

    command = "tune"
    view: SweepTable

    def __init__(self, folder: Storage, record: RunRecord, tracker: Tracker, options: TuneOptions) -> None:
        super().__init__(folder, record, tracker, options)
        num_trials = options.num_trials if options.num_trials < UNLIMITED else None
        num_updates = record.config.training.num_updates
        self.view = SweepTable(
            record.name,
            num_trials,
            num_updates,
            folder=display_path(folder),
            quiet=not options.progress,
        )
        self.experiment, self._options = record.experiment, options
        self._mirror: Mirror | None = None
        if folder.is_local:
            self.directory = folder.path
            self.shared = Storage(shared_location(folder.path))
        else:
            self.directory, self.shared = working_copy(folder), folder
            self._mirror = Mirror(self.directory, folder, JOURNAL_FILE, self.view.print)
            self._mirror.start()
        self.records = TrialRecords(self.directory, is_copy=not folder.is_local)

    @classmethod
    def saved_options(cls, options: TuneOptions) -> dict[str, Any]:
        """The search space, the budget and how trials are run."""
        return options.resume_options()

    @classmethod
    def fixed_options(cls, options: TuneOptions) -> dict[str, Any]:
        """The search space and the workers; the budget may change."""
        saved = options.resume_options()
        return {name: saved[name] for name in ("search", "workers_per_trial")}

    @classmethod
    def local_folder(cls, folder: Storage) -> Path:
        """The folder, or the working copy of one in a bucket, made equal to it."""
        if folder.is_local:
            return folder.path
        copy = working_copy(folder)
        try:
            restore(copy, folder, JOURNAL_FILE, leave_out=TEMPORARY)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be copied to {copy} ({os_reason(error)}): fix that and run again"
            ) from error
        return copy

    def resume(self, run_id: str) -> None:
        """Continue the sweep in the tracker, and send it what a killed session may not have sent.

        Raises:
            InputError: a finished sweep is extended without time to do so.
        """
        budget = self._options.budget_seconds()
        if self._record.status == "finished" and budget and self.records.previous_seconds >= budget:
            raise InputError(
                f"--num-trials {self._options.num_trials}: the sweep has used its time budget of "
                f"{self._options.time_budget}; give a larger --time-budget as well"
            )
        self._send_missing(self.tracker.resume_sweep(run_id, self.records.ids))
        for name in (_TUNE, RUNNING_TRIALS):
            self.shared.delete(name)

    def end_running_trials(self) -> None:
        """End the trials that still run when the sweep ends: they run again when it is resumed."""
        for record in self.records:
            if record.status in ("running", OUT_OF_MEMORY):
                status: TrialStatus = "stopped" if record.updates else "failed"
                with suppress(OSError):  # a full disk: the sweep's end comes first
                    self.records.end(record.trial_id, status, INTERRUPTED, record.seconds)
                self.tracker.end_trial(record.trial_id, status, INTERRUPTED)

    def _send_missing(self, sent: Container[str]) -> None:
        """Send completed trials to the tracker that a killed session recorded but may not have sent.

        Args:
            sent: IDs of the trials that the tracker has completely.
        """
        for record in self.records:
            if record.unfinished or record.trial_id in sent:
                continue  # unfinished trials run again
            self.tracker.start_trial(record.trial_id, record.params)
            for updates, metrics in sorted(record.evaluations.items()):
                self.tracker.log(metrics, updates, record.trial_id)
            for name, step in ((UNTRAINED, 0), (PICTURE, record.updates)):
                picture = self.records.folder(record.trial_id) / name
                if picture.exists():
                    with Image.open(picture) as file:
                        self.tracker.log_picture(file.copy(), step, record.trial_id)
            self.tracker.end_trial(record.trial_id, record.status, record.reason)

    def shown(self, name: str) -> str:
        """A file or folder of the sweep as users find it: a path, or an address in a bucket."""
        return f"{display_path(self.folder)}/{name}"

    def _write_record(self, status: Status) -> None:
        """Write the record, also into a working copy; that of a sweep which has ended after all its files."""
        if self._mirror is not None and status == "running":
            self._record.write(Storage(str(self.directory)), status)
        elif self._mirror is not None:
            with waiting(f"copying the rest to {self.folder}"):
                self._mirror.close()
        super()._write_record(status)
        if self._mirror is not None and status == "finished":
            shutil.rmtree(self.directory, ignore_errors=True)

    def _print_end(self, status: Status) -> None:
        """Print how to go on with a sweep that is not finished."""
        if status != "finished":
            how = "Stopped" if status == "stopped" else "The sweep failed"
            self.view.print(f"{how}; trials that have ended are kept, and --resume runs what is missing.")
            self.view.print(f"next: {resume_command('tune', self._record.name, self._options, _NOT_SAVED)}")


def working_copy(folder: Storage) -> Path:
    """Local folder in which this machine works on the sweep of a folder in a bucket."""
    parent, _, name = str(folder).rpartition("/")
    return cache_folder() / "sweeps" / hashlib.sha256(parent.encode()).hexdigest()[:8] / name
