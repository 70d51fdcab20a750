"""What the logs of a training and of a sweep have in common: the run's record, its tracker and its status."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from diffusion.config import IN_MEMORY, Config
from diffusion.data.dataset import Dataset
from diffusion.data.sources import short_name
from diffusion.errors import InputError
from diffusion.files import os_reason
from workflows.cli.resume import output_storage
from workflows.cli.run_options import RunOptions
from workflows.environment import default_output_dir
from workflows.publishing.provenance import session_provenance
from workflows.redaction import redact
from workflows.status import Status
from workflows.storage.run_lock import RunLock, remove_parts
from workflows.storage.run_record import Command, RunRecord
from workflows.storage.storage import Storage
from workflows.terminal import display_path, waiting
from workflows.tracking.outbox import ENTRIES_FILE
from workflows.tracking.tracker import Tracker, open_tracker

Options = TypeVar("Options", bound=RunOptions)


class Terminal(Protocol):
    """Terminal output of a run in progress."""

    def print(self, line: str) -> None:
        """Print a line."""
        ...

    def step(self, line: str) -> None:
        """Print a line about a step that takes seconds."""
        ...

    def end_step(self) -> None:
        """End the last step, if there is one."""
        ...


class BaseLogger(Generic[Options]):
    """Keeps the record of a run and the run in the tracker up to date; created by `open`.

    Subclasses set `view` when they are created.

    Args:
        folder: folder of the run.
        record: record of the run.
        tracker: tracker of the run, not yet started.
        options: options from the command line.

    Attributes:
        command: program whose runs this logs.
        view: terminal output of the run.
    """

    command: ClassVar[Command]
    view: Terminal

    def __init__(self, folder: Storage, record: RunRecord, tracker: Tracker, options: Options) -> None:
        self.folder, self.tracker = folder, tracker
        self._record = record
        self._sync_command = sync_command(record.name, options)
        self._lock: RunLock | None = None

    @classmethod
    def open(
        cls,
        options: Options,
        config: Config,
        dataset: Dataset,
        record: RunRecord | None,
        uri: str,
        params: Mapping[str, Any] | None = None,
    ) -> Self:
        """Start a run, or resume one.

        Args:
            options: options from the command line.
            config: config of the run, completed with what the data determine.
            dataset: data of the run.
            record: record of the run to resume, or None to start a new one.
            uri: URI of the tracker's store.
            params: parameters for the tracker; by default those of the config.

        Raises:
            InputError: the name is taken, the folder cannot be created, the config, the options or the data
                differ from those of the run to resume, or the tracker does not have that run.
        """
        if record is not None:
            record.check_unchanged(config, dataset.spec.fingerprint, cls.fixed_options(options))
        with cls._locked_folder(options, record) as (name, folder, lock):
            experiment = record.experiment if record else options.experiment or short_name(config.data)
            tracker = open_tracker(uri, experiment)
            local = cls.local_folder(folder)
            if local is not None:
                tracker.keep_entries(local)
            with _ended_on_error(tracker):
                if record is not None:
                    record = replace(
                        record, options=cls.saved_options(options)
                    )  # the budget may have changed
                    log = cls(folder, record.with_session(session_provenance()), tracker, options)
                    log.resume(record.run_id)
                    log._record = replace(log._record, run_id=tracker.run_id)
                else:
                    tracker.start(name, dict(params or config.flat()), str(folder), reuse=options.may_exist)
                    record = RunRecord(
                        name,
                        experiment,
                        tracker.run_id,
                        config,
                        dataset.spec.fingerprint,
                        command=cls.command,
                        options=cls.saved_options(options),
                    )
                    log = cls(folder, record.with_session(session_provenance()), tracker, options)
                tracker.log_dataset(dataset)
                log._write_record("running")
            log._lock = lock
            return log

    @classmethod
    @contextmanager
    def _locked_folder(
        cls, options: Options, record: RunRecord | None
    ) -> Iterator[tuple[str, Storage, RunLock | None]]:
        """Lock the folder of a run; that of a new one is created, and deleted again if the block fails.

        Yields:
            The name of the run, its folder and the lock, which is None for a folder in a bucket.
        """
        runs = output_storage(options)
        name = record.name if record else cls._new_name(options, runs)
        folder = runs.child(name)
        lock = RunLock(folder.path) if folder.is_local else None
        try:
            if lock is not None:
                remove_parts(folder.path, except_in=("checkpoints", "final", "tune"))
            yield name, folder, lock
        except BaseException:
            if lock is not None:
                lock.release()
            if record is None and not options.may_exist and not folder.exists("run.json"):
                runs.delete(name)  # this call has made it
            raise

    @classmethod
    def saved_options(cls, options: Options) -> dict[str, Any]:
        """Options that are not part of the config and that a resumed run needs; fit for JSON."""
        return {}

    @classmethod
    def fixed_options(cls, options: Options) -> dict[str, Any]:
        """Those of `saved_options` that must be the same when the run is resumed."""
        return {}

    @classmethod
    def _new_name(cls, options: Options, runs: Storage) -> str:
        """Name of a new run, whose folder is created if it is local.

        Raises:
            InputError: the name is taken, or the folder cannot be created.
        """
        taken = set[str]()
        while True:
            if options.may_exist and options.name is not None:
                name = options.name
            else:
                name = options.free_name(taken.union(runs.names()).__contains__)
            folder = runs.child(name)
            if not folder.is_local:
                return name
            try:
                folder.path.mkdir(parents=True, exist_ok=options.may_exist)
                return name
            except FileExistsError:  # another command has just made it
                taken.add(name)
            except OSError as error:
                raise InputError(
                    f"{folder} cannot be created ({error.strerror}): give another --output-dir"
                ) from error

    @classmethod
    def local_folder(cls, folder: Storage) -> Path | None:
        """Local folder of what belongs into the run's folder, or None if a run in a bucket has none."""
        return folder.path if folder.is_local else None

    def resume(self, run_id: str) -> None:
        """Continue the run in the tracker."""
        self.tracker.resume(run_id)

    def close(self, status: Status) -> None:
        """End the run in the tracker, record the status, and print how the run ended.

        A Ctrl-C meanwhile ends the wait for the tracker, and goes on.
        """
        # The record last: a run that is killed in between is not "finished" and can be resumed.
        self.view.end_step()
        interrupt: KeyboardInterrupt | None = None
        try:
            if status == "stopped":
                self.view.print(
                    f"Stopping: {self.tracker.name} is sent the rest; Ctrl-C leaves it for later."
                )
            with waiting(f"sending the rest to {self.tracker.name}"):
                self.tracker.close(status)
        except KeyboardInterrupt as error:
            interrupt = error
        try:
            self._write_record(status)
        except OSError as error:  # a full disk must not hide why the run ended
            self.view.print(
                f"warning: {self.folder} could not be written to ({os_reason(error)}): --resume goes on from "
                "what is there"
            )
        self._print_end(status)
        self._print_unsent()
        if self._lock is not None:
            self._lock.release()
        if interrupt is not None:
            raise interrupt

    def _print_unsent(self) -> None:
        """Print what the tracker has not, and how to send it."""
        tracker = self.tracker
        if tracker.refused:
            first = tracker.refused[0]
            self.view.print(
                f"warning: {tracker.name} refused {len(tracker.refused)} entries for good, such as: {first}"
            )
        if tracker.unsent:
            line = (
                f"warning: {tracker.unsent} entries could not be sent to {tracker.name} at {tracker.location}"
            )
            with suppress(OSError):  # a storage that is silent
                if self.folder.exists(ENTRIES_FILE):
                    kept = f"{display_path(self.folder)}/{ENTRIES_FILE}"
                    line += f"; {kept} has them, and this sends them: {self._sync_command}"
            self.view.print(line)

    def _write_record(self, status: Status) -> None:
        """Write the record with this status into the run's folder."""
        self._record = self._record.write(self.folder, status)

    def _print_end(self, status: Status) -> None:
        """Print how the run ended; a hook for subclasses."""


@contextmanager
def _ended_on_error(tracker: Tracker) -> Iterator[None]:
    """End a run that the block has started if the block fails: nobody else would."""
    try:
        yield
    except BaseException:
        if tracker.run_id:
            tracker.close("stopped")
        raise


def sync_command(name: str, options: RunOptions) -> str:
    """Command that sends what a run has kept for its tracker."""
    words = ["python", "-m", "workflows.sync", name]
    for flag, value in (("--output-dir", options.output_dir), ("--tracking-uri", options.tracking_uri)):
        if value is not None and (flag, value) != ("--output-dir", default_output_dir()):
            words += [flag, redact(value)]
    return shlex.join(words)


def resume_command(command: Command, name: str, options: RunOptions, not_saved: Sequence[str]) -> str:
    """Command that resumes a run.

    Args:
        command: program that started the run.
        name: name of the run.
        options: options of the run.
        not_saved: options that the run's record does not have: given again unless they are the default.
    """
    if options.data.startswith(IN_MEMORY):
        function = "run_training" if command == "train" else "run_sweep"
        return f"{function}(data, name={name!r}, resume=True), with the same data"
    words = ["python", "-m", f"workflows.{command}", "--resume", "--name", name]
    for field in fields(options):
        value = getattr(options, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in not_saved and value != default:
            words += [f"--{field.name.replace('_', '-')}", redact(str(value))]
    return shlex.join(words)
