"""Records of a sweep's trials: in memory, in a journal, in trials.csv and in one folder per trial.

`tuner.SweepCallback` records each event of a trial here. A resumed sweep reads the `journal` to find out
which trials are completed. trials.csv is written from memory after trials have
ended. `run_sweep` ranks the trials and takes the finalists' models from their folders.
"""

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffusion.errors import InputError
from diffusion.evaluation.measured_objective import MeasuredObjective
from diffusion.files import replacing
from diffusion.manifest import write_manifest
from diffusion.metrics import (
    BEST_OBJECTIVE,
    BEST_UPDATE,
    OBJECTIVE,
    VAL_ELBO_WINDOW,
    VAL_ELBO_WINDOW_PAIRED_SE,
    VAL_MSE,
    metrics_of_best,
)
from workflows.status import OUT_OF_MEMORY, TrialStatus
from workflows.sweep.decision import choose_finalists, with_training_seed
from workflows.sweep.journal import (
    JOURNAL_FILE,
    REMEDY,
    Journal,
    TrialBegan,
    TrialEnded,
    TrialEvaluated,
    TrialEvent,
    read_journal,
)
from workflows.training.evaluation_files import MODEL_FILES, PICTURES, check_model_files, read_objective

INTERRUPTED = "the sweep was interrupted"  # reason of a trial that runs again when the sweep is resumed
_PAUSE_PER_WRITE = 20.0  # between two writes of trials.csv, in units of the time that the last one took
_NAMED = (OBJECTIVE, BEST_UPDATE, BEST_OBJECTIVE)  # metrics that have columns of their own


@dataclass
class TrialRecord:
    """The record of one trial.

    Attributes:
        trial_id: ID of the trial in every file and in the tracker.
        params: all parameters by dotted name.
        status: see `workflows.status`.
        seconds: seconds from start to end.
        evaluations: metrics of each evaluation, `objective` among them, by the number of updates.
        reason: why the trial was pruned, stopped or failed.
        extra_metrics: metrics that are computed after the trial's end.
        rank: place among the finalists, from 1; None for the other trials.
        decision: why a finalist is the champion, or is not.
    """

    trial_id: str
    params: dict[str, Any]
    status: TrialStatus = "running"
    seconds: float = 0.0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    reason: str = ""
    extra_metrics: dict[str, float] = field(default_factory=dict)
    rank: int | None = None
    decision: str = ""

    @property
    def updates(self) -> int:
        """Optimizer steps at the last evaluation."""
        return max(self.evaluations, default=0)

    @property
    def best_update(self) -> int:
        """Optimizer steps at the best evaluation, whose weights are the trial's model."""
        return int(self.metrics.get(BEST_UPDATE, self.updates))

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the trial's model, and `extra_metrics`."""
        return {**metrics_of_best(self.evaluations), **self.extra_metrics}

    @property
    def objective(self) -> float:
        """Objective of the trial's model; lower is better."""
        return self.metrics.get(OBJECTIVE, math.nan)

    @property
    def unfinished(self) -> bool:
        """Whether the trial has to run again when the sweep is resumed."""
        return self.status in ("running", OUT_OF_MEMORY) or self.reason == INTERRUPTED


class TrialRecords:
    """The trials of a sweep in the order of their start, those of earlier sessions included.

    Args:
        directory: the sweep's folder.
        is_copy: whether the folder is a copy of one in a bucket, whose journal may be older than its other
            files, see `workflows.storage.mirror`.

    Raises:
        InputError: the journal is damaged, or lacks a trial that has a folder.

    Attributes:
        previous_seconds: seconds that earlier sessions of the sweep took.
    """

    def __init__(self, directory: Path, *, is_copy: bool = False) -> None:
        self._directory = directory
        self._records: dict[str, TrialRecord] = {}
        self._damaged: set[str] = set()  # IDs of trials whose model files are
        self.previous_seconds = 0.0
        journal = directory / JOURNAL_FILE
        for event in read_journal(journal):
            if not isinstance(event, TrialBegan) and event.trial_id not in self._records:
                raise InputError(f"{journal} is damaged (trial {event.trial_id} has no start): {REMEDY}")
            self._apply(event)
            self.previous_seconds = event.at
        folders = directory / "trials"
        for name in (
            sorted(each.name for each in folders.iterdir() if each.is_dir()) if folders.is_dir() else ()
        ):
            if not (name in self._records or name.startswith(".") or is_copy):
                lost = "is damaged" if journal.exists() else "is missing"
                raise InputError(f"{journal} {lost} (it had trial {name}, which has a folder): {REMEDY}")
        self._journal = Journal(journal)
        self._start_time = time.monotonic()
        self._csv_outdated = False
        self._next_csv_write = 0.0

    def __getitem__(self, trial_id: str) -> TrialRecord:
        return self._records[trial_id]

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    @property
    def ids(self) -> set[str]:
        """IDs of all trials."""
        return set(self._records)

    @property
    def elapsed(self) -> float:
        """Seconds that this session and earlier ones took."""
        return self.previous_seconds + time.monotonic() - self._start_time

    def start(self, trial_id: str, params: Mapping[str, Any]) -> None:
        """Record that a trial starts; an earlier one of this ID starts from scratch."""
        self._record(TrialBegan(trial_id, dict(params), self._now()))

    def add_evaluation(self, trial_id: str, updates: int, metrics: Mapping[str, float]) -> None:
        """Record a trial's metrics after a number of updates."""
        self._record(TrialEvaluated(trial_id, updates, dict(metrics), self._now()))

    def end(self, trial_id: str, status: TrialStatus, reason: str, seconds: float) -> None:
        """Record how a trial ended."""
        self._record(TrialEnded(trial_id, status, reason, seconds, self._now()))
        self._csv_outdated = True

    def folder(self, trial_id: str) -> Path:
        """Folder of a trial's config, weights and picture."""
        return self._directory / "trials" / trial_id

    def save_files(self, trial_id: str, checkpoint: Path) -> None:
        """Copy files of a Tune checkpoint into the trial's folder, in place of earlier ones.

        Pictures are copied from every checkpoint that has any, the model only from the best evaluation's.
        """
        folder, record = self.folder(trial_id), self[trial_id]
        folder.mkdir(parents=True, exist_ok=True)
        model_files = MODEL_FILES if record.best_update == record.updates else ()
        pictures = (name for name in PICTURES if (checkpoint / name).exists())
        for name in (*model_files, *pictures):
            with replacing(folder / name) as part:
                shutil.copyfile(checkpoint / name, part)
        if model_files:
            write_manifest(folder, {}, model_files)

    def ranked(self) -> list[TrialRecord]:
        """Trials with a usable model, best objective first: the finished and the stopped ones.

        A trial that was cut by the time budget or stopped early counts with the weights that it has.
        """
        usable = [
            record
            for record in self
            if record.status in ("finished", "stopped")
            and np.isfinite(record.objective)
            and record.trial_id not in self._damaged
        ]
        return sorted(usable, key=lambda record: (record.objective, record.trial_id))

    def leave_out_damaged(self) -> list[str]:
        """Leave trials whose model files are missing or damaged out of `ranked`; returns a line for each."""
        lines = []
        for record in self.ranked():
            try:
                check_model_files(self.folder(record.trial_id))
            except InputError as error:
                self._damaged.add(record.trial_id)
                lines.append(f"trial {record.trial_id} is left out: {error}, and resume the sweep")
        return lines

    def measured_objective(self, trial_id: str) -> MeasuredObjective:
        """The objective of a trial's model, per example if that is known."""
        record = self[trial_id]
        objective = record.params.get("metrics.objective", VAL_ELBO_WINDOW)
        return read_objective(self.folder(trial_id), objective, record.metrics)

    def finalists(self, seed_error: float) -> dict[str, Path]:
        """Folders of the trials that compete for the champion, by ID, see `decision.choose_finalists`.

        Args:
            seed_error: standard deviation of an objective over training seeds.
        """
        ranked = self.model_folders(record.trial_id for record in self.ranked())
        objectives = {trial_id: self.measured_objective(trial_id) for trial_id in ranked}
        if not objectives:
            return {}
        best = next(iter(objectives.values()))
        differences = {
            trial_id: with_training_seed(objective.minus(best), seed_error)
            for trial_id, objective in objectives.items()
        }
        return self.model_folders(choose_finalists(differences))

    def model_folders(self, trial_ids: Iterable[str]) -> dict[str, Path]:
        """Folders of those of the trials that have a model, by ID."""
        folders = {trial_id: self.folder(trial_id) for trial_id in trial_ids}
        return {
            trial_id: folder
            for trial_id, folder in folders.items()
            if (folder / "model.safetensors").exists()
        }

    def picked_by_mse(self) -> str:
        """ID of the trial with a usable model whose mean squared error is lowest; empty if there is none."""
        known = [record for record in self.ranked() if np.isfinite(record.metrics.get(VAL_MSE, np.nan))]
        return min(known, key=lambda record: record.metrics[VAL_MSE]).trial_id if known else ""

    def add_paired_errors(self) -> None:
        """Add the standard error of the difference between each trial's ELBO and the best trial's.

        All trials are evaluated on the same examples with the same noise, so their differences are known much
        more precisely than their values.
        """
        ranked = self.ranked()
        if not ranked:
            return
        best, *_ = bounds = [
            read_objective(self.folder(record.trial_id), VAL_ELBO_WINDOW, record.metrics) for record in ranked
        ]
        for record, bound in zip(ranked, bounds, strict=True):
            if bound.per_example is not None:
                record.extra_metrics[VAL_ELBO_WINDOW_PAIRED_SE] = bound.minus(best).standard_error

    def refresh_csv(self) -> None:
        """Write trials.csv if a trial has ended since, unless the last write was too short a time ago.

        Each write takes time in proportion to the number of trials, so one at each end would take, together,
        time in proportion to its square. With the pauses in between, the writes take at most a twentieth of
        the sweep. A crash in such a pause loses nothing: the journal has every event.
        """
        if self._csv_outdated and time.monotonic() >= self._next_csv_write:
            self.write_csv()

    def write_csv(self) -> Path:
        """Write trials.csv, one row per trial, atomically."""
        started = time.monotonic()
        rows = [
            {
                "trial_id": record.trial_id,
                "status": record.status,
                "seconds": round(record.seconds, 3),
                "updates": record.updates,
                OBJECTIVE: record.objective,
                "best_update": record.best_update,
                "rank": record.rank,
                "decision": record.decision,
                **record.params,
                **{name: value for name, value in sorted(record.metrics.items()) if name not in _NAMED},
                "reason": record.reason,
            }
            for record in self
        ]
        path = self._directory / "trials.csv"
        with replacing(path) as part:
            pd.DataFrame(rows).to_csv(part, index=False)
        ended = time.monotonic()
        self._csv_outdated, self._next_csv_write = False, ended + _PAUSE_PER_WRITE * (ended - started)
        return path

    def _now(self) -> float:
        return round(self.elapsed, 3)

    def _record(self, event: TrialEvent) -> None:
        self._journal.write(event)
        self._apply(event)

    def _apply(self, event: TrialEvent) -> None:
        """Update the records in memory with an event of the journal."""
        match event:
            case TrialBegan(trial_id, params):
                # JSON has lists only, parameters are tuples: the tracker compares their text.
                typed = {
                    name: tuple(value) if isinstance(value, list) else value for name, value in params.items()
                }
                self._records[trial_id] = TrialRecord(trial_id, typed)
            case TrialEvaluated(trial_id, updates, metrics):
                self._records[trial_id].evaluations[updates] = metrics
            case TrialEnded(trial_id, status, reason, seconds):
                record = self._records[trial_id]
                record.status, record.reason, record.seconds = status, reason, seconds
