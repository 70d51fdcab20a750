"""What a person sees while a sweep runs: one live table, or a line a trial where there is no terminal."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from workflows.records import TrialRecord

_MOST_ROWS = 24
_STYLES = {"running": "cyan", "finished": "green", "stopped": "yellow", "pruned": "magenta"}
_SHORT = {
    "schedule.num_train_timesteps": "T",
    "schedule.beta_start": "beta_start",
    "schedule.beta_end": "beta_end",
    "network.time_embedding_size": "t-emb",
    "network.data_embedding_size": "x-emb",
    "training.learning_rate": "lr",
}


def readable(path: Any) -> str:
    """A path relative to the working directory where that is shorter, another location as it is."""
    local = getattr(path, "path", path) if getattr(path, "is_local", True) else None
    if local is None:
        return str(path)
    return str(local.relative_to(Path.cwd()) if local.is_relative_to(Path.cwd()) else local)


@dataclass
class _Row:
    params: Mapping[str, Any]
    status: str = "running"
    updates: int = 0
    objective: float | None = None
    mse: float | None = None
    distance: float | None = None


class SweepView:
    """The table of a sweep's trials; a context manager that keeps it on the screen.

    Args:
        name: of the sweep.
        num_trials: planned, or None where only the time is limited.
        num_updates: of a whole training.
    """

    def __init__(self, name: str, num_trials: int | None, num_updates: int) -> None:
        self.console = Console()
        self._name, self._num_updates = name, num_updates
        self._of = "" if num_trials is None else f"/{num_trials}"
        self._rows: dict[str, _Row] = {}
        self._started = time.monotonic()
        self._live = Live(get_renderable=self._table, console=self.console, refresh_per_second=2)

    def __enter__(self) -> "SweepView":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def started(self, trial_id: str, params: Mapping[str, Any]) -> None:
        """A trial begins."""
        self._rows[trial_id] = _Row(params)

    def known(self, record: TrialRecord, names: Iterable[str]) -> None:
        """A trial that came to its end in an earlier session; `names` are those of what is searched."""
        self.started(record.trial_id, {name: record.params[name] for name in names})
        self.progressed(record.trial_id, record.updates, record.objective, record.metrics)
        self._rows[record.trial_id].status = record.status

    def progressed(self, trial_id: str, updates: int, objective: float, metrics: Mapping[str, float]) -> None:
        """A trial was evaluated."""
        row = self._rows[trial_id]
        row.updates, row.objective = updates, objective
        row.mse, row.distance = metrics.get("val/mse"), metrics.get("sample/distance")

    def ended(self, trial_id: str, status: str, reason: str = "") -> None:
        """A trial is over; `status` and `reason` as in trials.csv."""
        row = self._rows[trial_id]
        row.status = status
        if not self.console.is_terminal:
            over = sum(row.status != "running" for row in self._rows.values())
            seconds = time.monotonic() - self._started
            params = ", ".join(f"{_short(key)} {_number(value)}" for key, value in row.params.items())
            self.say(
                f"[{seconds:4.0f} s] trial {over}{self._of} {status} after {row.updates} updates: "
                f"objective {_number(row.objective)} ({params})"
            )
        if status == "failed":
            self.say(f"trial {trial_id} failed: {reason}")

    def _table(self) -> Table:
        over = sum(row.status != "running" for row in self._rows.values())
        seconds = int(time.monotonic() - self._started)
        table = Table(
            title=f"{self._name}: {over}{self._of} trials over, {seconds // 60}:{seconds % 60:02d}",
            caption="objective: lower is better; do not compare MSE",
            title_justify="left",
            caption_justify="left",
        )
        able = [row.objective for row in self._rows.values() if row.status in ("running", "finished")]
        best = min((objective for objective in able if objective is not None), default=None)
        keys = list(dict.fromkeys(key for row in self._rows.values() for key in row.params))
        for heading in ("trial", *map(_short, keys), "updates", "objective", "val MSE", "distance", "status"):
            table.add_column(
                heading, justify="left" if heading in ("trial", "status") else "right", no_wrap=True
            )
        shown = list(self._rows.items())
        if len(shown) > _MOST_ROWS:
            shown.sort(key=lambda item: (item[1].status != "running", item[1].objective or float("inf")))
            shown = shown[:_MOST_ROWS]
        for trial_id, row in shown:
            objective = _number(row.objective)
            table.add_row(
                trial_id,
                *(_number(row.params.get(key)) for key in keys),
                f"{row.updates}/{self._num_updates}",
                f"[bold green]{objective}[/]"
                if row.objective is not None and row.objective == best
                else objective,
                _number(row.mse),
                _number(row.distance),
                f"[{_STYLES.get(row.status, 'red')}]{row.status}[/]",
            )
        return table


def _short(key: str) -> str:
    return _SHORT.get(key, key.rsplit(".", 1)[-1])


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 0.1 else f"{value:.4g}"
