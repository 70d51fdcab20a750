"""One sweep's lasting traces: its folder, its records, its MLflow run; made, or taken up again."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.errors import InputError
from diffusion.sources import short_name
from workflows.console import SweepView
from workflows.records import TrialRecords
from workflows.runs import RunRecord, Status, check_same_config
from workflows.storage import Storage
from workflows.storage_place import shared_location
from workflows.tracking import Tracker, redact
from workflows.tune_options import UNLIMITED, TuneOptions

_MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "running": "RUNNING"}


class SweepLog:
    """One run of tune.py as it goes; `open` makes it.

    Attributes:
        directory: of the sweep.
        shared: where all machines of a cluster see what belongs to it; the same, or in a bucket.
        experiment: in MLflow.
        records: of its trials, those of earlier sessions among them.
        tracker: of its MLflow runs.
        view: what a person sees.
    """

    def __init__(self, directory: Path, record: RunRecord, tracker: Tracker, options: TuneOptions) -> None:
        self.directory, self.tracker = directory, tracker
        self.experiment = record.experiment
        self.records = TrialRecords(directory)
        planned = options.num_trials if options.num_trials < UNLIMITED else None
        self.view = SweepView(record.name, planned, _num_updates(record))
        self._record, self._folder = record, Storage(str(directory))
        self.shared = Storage(shared_location(directory))

    @classmethod
    def open(
        cls,
        options: TuneOptions,
        config: Config,
        params: Mapping[str, Any],
        dataset: Dataset,
        record: RunRecord | None,
        uri: str,
    ) -> "SweepLog":
        """Make a sweep, or take up one that was begun.

        Args:
            options: of the command line.
            config: what the options say, with what the data add.
            params: of the sweep, for MLflow.
            dataset: that it is about.
            record: of the sweep to go on with, or None for a new one.
            uri: of MLflow's store.

        Raises:
            InputError: the name is taken, the folder cannot be made, the sweep to go on with was told other
                things, or MLflow does not know it.
        """
        if record is not None:
            _check_same(options, config, dataset, record)
            directory = options.output_folder() / record.name
            tracker = Tracker(uri, record.experiment)
            log = cls(directory, record, tracker, options)
            log._send_again(but=tracker.resume_sweep(record.run_id, log.records.ids))
            log.shared.delete("tune")
            log._record = record.write(log._folder, "running")
            return log
        directory = options.run_directory()
        experiment = options.experiment or short_name(config.data)
        tracker = Tracker(uri, experiment)
        try:
            directory.mkdir(parents=True, exist_ok=options.resume)  # one that was killed at its very start
        except OSError as error:
            raise InputError(
                f"{directory} cannot be made ({error.strerror}): give another --output-dir"
            ) from error
        name = directory.name
        run_id = tracker.start(name, dict(params), str(directory), again=options.resume)
        fingerprint = dataset.spec.fingerprint
        record = RunRecord(
            name, experiment, run_id, config.to_dict(), fingerprint, command="tune", options=options.kept()
        )
        return cls(directory, record.write(Storage(str(directory)), "running"), tracker, options)

    def close(self, status: Status) -> None:
        """End the MLflow run and note how the sweep ended."""
        # Before the record: a sweep that is killed in between is not finished, and can be gone on with.
        self.tracker.close(_MLFLOW_STATUS[status])
        self._record = self._record.write(self._folder, status)
        if self.tracker.unsent:
            where = redact(self.tracker.uri)
            self.view.say(f"warning: {self.tracker.unsent} entries could not be sent to MLflow at {where}")

    def _send_again(self, but: Container[str]) -> None:
        """What a killed driver had noted, and MLflow may have missed."""
        for record in self.records:
            if record.unfinished or record.trial_id in but:
                continue  # what is unfinished is run anew
            self.tracker.start_trial(record.trial_id, record.params)
            for updates, metrics in sorted(record.evaluations.items()):
                self.tracker.log(metrics, updates, record.trial_id)
            picture = self.records.folder(record.trial_id) / "samples.png"
            if picture.exists():
                with Image.open(picture) as file:
                    self.tracker.log_picture(file.copy(), record.updates, record.trial_id)
            self.tracker.end_trial(record.trial_id, record.status, record.reason)


def _num_updates(record: RunRecord) -> int:
    return Config.from_dict(record.config).training.num_updates


def _check_same(options: TuneOptions, config: Config, dataset: Dataset, record: RunRecord) -> None:
    """See that a sweep goes on with its own config, space and data; only its budget may differ.

    Raises:
        InputError: something else differs.
    """
    check_same_config(config, Config.from_dict(record.config))
    kept = options.kept()
    for name in ("search", "workers_per_trial"):
        # Through JSON tuples become lists.
        if _plain(kept[name]) != _plain(record.options[name]):
            raise InputError(
                f"--{name.replace('_', '-')} differs from what the sweep to be resumed was started with; "
                "leave it out, or start a new sweep"
            )
    if dataset.spec.fingerprint != record.data_fingerprint:
        raise InputError(
            f"--resume: the data of {config.data.name} have changed since the sweep {record.name} was "
            "started; bring them back, or start a new one"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return list(value) if isinstance(value, tuple) else value
