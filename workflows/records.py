"""What is known of each trial: kept in memory, in a journal, in trials.csv and in one folder a trial."""

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffusion.files import replacing
from workflows.journal import Journal, read_journal
from workflows.snapshot import FILES as SNAPSHOT_FILES

_FILE = "journal.jsonl"
INTERRUPTED = "the sweep was interrupted"
OUT_OF_MEMORY = "out of memory"  # a status while it waits to be run again


@dataclass
class TrialRecord:
    """One trial.

    Attributes:
        trial_id: its name in every file and in MLflow.
        params: every parameter under its dotted name.
        status: running, then finished | stopped | pruned | failed | diverged.
        seconds: from start to end.
        evaluations: metrics by name, by the updates that they were taken after; `objective` among them.
        reason: why it was pruned, stopped or failed.
        figures: what is found out about it after its end, by metric name.
    """

    trial_id: str
    params: dict[str, Any]
    status: str = "running"
    seconds: float = 0.0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """Optimizer steps at the last evaluation."""
        return max(self.evaluations, default=0)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation, and `figures`."""
        return {**self.evaluations.get(self.updates, {}), **self.figures}

    @property
    def objective(self) -> float:
        """Of the last evaluation; lower is better."""
        return self.metrics.get("objective", math.nan)

    @property
    def unfinished(self) -> bool:
        """Whether it is to be run when the sweep goes on."""
        return self.status in ("running", OUT_OF_MEMORY) or self.reason == INTERRUPTED


class TrialRecords:
    """The trials of one sweep, in the order of their start; those of an earlier session among them.

    Args:
        directory: the sweep's folder.

    Attributes:
        seconds_before: that earlier sessions took.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._records: dict[str, TrialRecord] = {}
        self.seconds_before = 0.0
        for event in read_journal(directory / _FILE):
            self._replay(event)
            self.seconds_before = event["at"]
        self._journal = Journal(directory / _FILE)
        self._started = time.monotonic()

    def __getitem__(self, trial_id: str) -> TrialRecord:
        return self._records[trial_id]

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    @property
    def ids(self) -> set[str]:
        """Of all trials."""
        return set(self._records)

    @property
    def elapsed(self) -> float:
        """Seconds that this session and those before it took."""
        return self.seconds_before + time.monotonic() - self._started

    def begin(self, trial_id: str, params: Mapping[str, Any]) -> None:
        """A trial starts, or one that did not come to its end starts anew."""
        self._note(event="begin", trial_id=trial_id, params=dict(params))

    def evaluated(self, trial_id: str, updates: int, metrics: Mapping[str, float]) -> None:
        """A trial was evaluated."""
        self._note(event="evaluated", trial_id=trial_id, updates=updates, metrics=dict(metrics))

    def end(self, trial_id: str, status: str, reason: str, seconds: float) -> None:
        """A trial is over."""
        self._note(event="end", trial_id=trial_id, status=status, reason=reason, seconds=seconds)

    def folder(self, trial_id: str) -> Path:
        """Where a trial's config, weights and picture stand."""
        return self._directory / "trials" / trial_id

    def keep_files(self, trial_id: str, checkpoint: Path) -> None:
        """Copy a trial's newest model out of Tune's checkpoint."""
        folder = self.folder(trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        for name in SNAPSHOT_FILES:
            with replacing(folder / name) as part:
                shutil.copyfile(checkpoint / name, part)

    def ranked(self) -> list[TrialRecord]:
        """Trials that may win, best objective first: the finished ones, or the stopped if none is."""
        for status in ("finished", "stopped"):
            found = [record for record in self if record.status == status and np.isfinite(record.objective)]
            if found:
                return sorted(found, key=lambda record: record.objective)
        return []

    def add_paired_errors(self) -> None:
        """Standard error of each ELBO's difference to the best trial's.

        All trials are measured on the same examples with the same noise, so their differences are
        known far better than their values.
        """
        ranked = self.ranked()
        if not ranked:
            return
        best = np.load(self.folder(ranked[0].trial_id) / "elbo_per_example.npy")
        for record in self:
            path = self.folder(record.trial_id) / "elbo_per_example.npy"
            if record.status in ("finished", "stopped") and path.exists():
                difference = np.load(path) - best
                record.figures["val/elbo_window_paired_se"] = float(
                    difference.std(ddof=1) / np.sqrt(difference.size)
                )

    def write_csv(self) -> Path:
        """Write trials.csv, one row a trial; the file appears whole or not at all."""
        rows = [
            {
                "trial_id": record.trial_id,
                "status": record.status,
                "seconds": round(record.seconds, 3),
                "updates": record.updates,
                "objective": record.objective,
                **record.params,
                **dict(sorted(record.metrics.items())),
                "reason": record.reason,
            }
            for record in self
        ]
        path = self._directory / "trials.csv"
        with replacing(path) as part:
            pd.DataFrame(rows).to_csv(part, index=False)
        return path

    def _note(self, **event: Any) -> None:
        self._journal.write({**event, "at": round(self.elapsed, 3)})
        self._replay(event)

    def _replay(self, event: Mapping[str, Any]) -> None:
        trial_id = event["trial_id"]
        match event["event"]:
            case "begin":
                self._records[trial_id] = TrialRecord(trial_id, dict(event["params"]))
            case "evaluated":
                self._records[trial_id].evaluations[event["updates"]] = dict(event["metrics"])
            case "end":
                record = self._records[trial_id]
                record.status, record.reason = event["status"], event["reason"]
                record.seconds = event["seconds"]
