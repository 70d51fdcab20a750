"""What is known of each trial: kept in memory, in trials.csv and in one folder a trial."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffusion.files import replacing
from workflows.snapshot import FILES as SNAPSHOT_FILES


@dataclass
class TrialRecord:
    """One trial.

    Attributes:
        trial_id: Tune's id.
        params: every parameter under its dotted name.
        status: running, then finished | stopped | pruned | failed | diverged.
        seconds: from start to end.
        updates: optimizer steps at the last evaluation.
        objective: there; lower is better.
        metrics: there, by metric name.
        reason: why it was pruned, failed or diverged.
    """

    trial_id: str
    params: dict[str, Any]
    status: str = "running"
    seconds: float = 0.0
    updates: int = 0
    objective: float = float("nan")
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""


class TrialRecords:
    """The trials of one sweep, in the order of their start.

    Args:
        directory: the sweep's folder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._records: dict[str, TrialRecord] = {}

    def __getitem__(self, trial_id: str) -> TrialRecord:
        return self._records[trial_id]

    def __iter__(self) -> Any:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: TrialRecord) -> None:
        """Begin a record."""
        self._records[record.trial_id] = record

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
        """Standard error of each objective's difference to the best one's.

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
                record.metrics["val/elbo_window_paired_se"] = float(
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
