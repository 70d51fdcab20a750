"""Terminal output of a running sweep: a live table of trials, or one line per trial without a terminal."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from diffusion.metrics import OBJECTIVE, SAMPLE_DISTANCE, VAL_MSE
from workflows.sweep.trial_records import TrialRecord
from workflows.terminal import hide_columns, number

_MAX_ROWS = 24
_STYLES = {"running": "cyan", "finished": "green", "stopped": "yellow", "pruned": "magenta"}
_SHORT_NAMES = {
    "schedule.num_train_timesteps": "T",
    "schedule.beta_start": "beta_start",
    "schedule.beta_end": "beta_end",
    "network.time_embedding_size": "t-emb",
    "network.data_embedding_size": "x-emb",
    "network.hidden_size": "width",
    "network.num_blocks": "blocks",
    "training.learning_rate": "lr",
}


@dataclass
class _Row:
    params: Mapping[str, Any]
    status: str = "running"
    updates: int = 0
    objective: float | None = None
    mse: float | None = None
    distance: float | None = None


class SweepTable:
    """Live table of a sweep's trials; a context manager that shows it in the terminal.

    Args:
        name: name of the sweep.
        num_trials: number of planned trials, or None if only the time is limited.
        num_updates: optimizer steps of a complete training.
        quiet: show and print nothing.
    """

    def __init__(self, name: str, num_trials: int | None, num_updates: int, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        self._name, self._num_updates = name, num_updates
        self._of_total = "" if num_trials is None else f"/{num_trials}"
        self._rows: dict[str, _Row] = {}
        self._start_time = time.monotonic()
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=2)

    def __enter__(self) -> "SweepTable":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def print(self, line: str) -> None:
        """Print a line without interpreting markup in it."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def add(self, trial_id: str, params: Mapping[str, Any]) -> None:
        """Add a row for a trial that starts."""
        self._rows[trial_id] = _Row(params)

    def update(self, trial_id: str, updates: int, objective: float, metrics: Mapping[str, float]) -> None:
        """Show a trial's latest evaluation."""
        row = self._rows[trial_id]
        row.updates, row.objective = updates, objective
        row.mse, row.distance = metrics.get(VAL_MSE), metrics.get(SAMPLE_DISTANCE)

    def finish(self, trial_id: str, status: str, reason: str = "") -> None:
        """Show how a trial ended; `status` and `reason` are those of trials.csv."""
        row = self._rows[trial_id]
        row.status = status
        if not self.console.is_terminal:
            seconds = time.monotonic() - self._start_time
            params = ", ".join(f"{_short_name(key)} {number(value)}" for key, value in row.params.items())
            self.print(
                f"[{seconds:4.0f} s] trial {self._num_done()}{self._of_total} {status} after {row.updates} "
                f"updates: objective {number(row.objective)} ({params})"
            )
        if status == "failed":
            self.print(f"trial {trial_id} failed: {reason}")

    def restore(self, record: TrialRecord, names: Iterable[str]) -> None:
        """Add a row for a trial that ended in an earlier session.

        Args:
            record: record of the trial.
            names: dotted names of the searched parameters.
        """
        self.add(record.trial_id, {name: record.params[name] for name in names})
        self.update(record.trial_id, record.updates, record.objective, record.metrics)
        self._rows[record.trial_id].status = record.status

    def render(self) -> Table:
        """The table as it is now; of many trials, the running ones and the best."""
        seconds = int(time.monotonic() - self._start_time)
        table = Table(
            title=f"{self._name}: {self._num_done()}{self._of_total} trials done, "
            f"{seconds // 60}:{seconds % 60:02d}",
            caption="objective: lower is better; do not compare MSE",
            title_justify="left",
            caption_justify="left",
        )
        objectives = [row.objective for row in self._rows.values() if row.status in ("running", "finished")]
        best = min((objective for objective in objectives if objective is not None), default=None)
        shown = list(self._rows.items())
        if len(shown) > _MAX_ROWS:
            shown.sort(key=lambda item: (item[1].status != "running", item[1].objective or float("inf")))
            shown = shown[:_MAX_ROWS]
        keys = list(dict.fromkeys(key for row in self._rows.values() for key in row.params))
        columns = {"trial": [trial_id for trial_id, _ in shown]}
        columns |= {_short_name(key): [number(row.params.get(key)) for _, row in shown] for key in keys}
        columns |= {
            "updates": [f"{row.updates}/{self._num_updates}" for _, row in shown],
            OBJECTIVE: [number(row.objective) for _, row in shown],
            "val MSE": [number(row.mse) for _, row in shown],
            "distance": [number(row.distance) for _, row in shown],
            "status": [row.status for _, row in shown],
        }
        # The network's parameters say least about a trial; MSE says nothing about which is better.
        by_importance = sorted(keys, key=lambda key: key.startswith("network."))
        hidden = hide_columns(columns, [*map(_short_name, by_importance), "val MSE"], self.console.width)
        if hidden:
            table.caption = f"objective: lower is better; trials.csv also has {', '.join(hidden)}"
        for heading in columns:
            table.add_column(
                heading, justify="left" if heading in ("trial", "status") else "right", no_wrap=True
            )
        for index, (_, row) in enumerate(shown):
            cells = {heading: cells[index] for heading, cells in columns.items()}
            if row.objective is not None and row.objective == best:
                cells[OBJECTIVE] = f"[bold green]{cells[OBJECTIVE]}[/]"
            cells["status"] = f"[{_STYLES.get(row.status, 'red')}]{row.status}[/]"
            table.add_row(*cells.values())
        return table

    def _num_done(self) -> int:
        return sum(row.status != "running" for row in self._rows.values())


def _short_name(key: str) -> str:
    return _SHORT_NAMES.get(key, key.rsplit(".", 1)[-1])
