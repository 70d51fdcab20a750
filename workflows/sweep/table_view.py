"""Terminal output of a running sweep: a live table of trials, or one line per trial without a terminal."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.live import Live
from rich.table import Table

from diffusion.metrics import OBJECTIVE, SAMPLE_DISTANCE, VAL_MSE
from workflows.sweep.trial_records import TrialRecord
from workflows.terminal import RunConsole, Steps, hide_columns, number, print_line

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
# Two parameters in one column: heading, and the separator of their values.
_PAIRS = {
    ("beta_start", "beta_end"): ("betas", "–"),
    ("t-emb", "x-emb"): ("t/x-emb", "/"),
    ("width", "blocks"): ("width x blocks", " x "),
}
# The columns that a narrow terminal shows first; other parameters follow, and MSE comes last, since it says
# nothing about which trial is better.
_MOST_IMPORTANT = ("T", "lr", "betas", "beta_start", "beta_end", "distance")


@dataclass
class _Row:
    params: Mapping[str, Any]
    status: str = "running"
    updates: int = 0
    objective: float | None = None
    mse: float | None = None
    distance: float | None = None
    is_earlier: bool = False  # whether it ended in an earlier session

    @property
    def is_usable(self) -> bool:
        """Whether it may become the champion as it is."""
        return self.status in ("running", "finished", "stopped") and self.objective is not None


class SweepTable:
    """Live table of a sweep's trials; a context manager that shows it in the terminal.

    Args:
        name: name of the sweep.
        num_trials: number of planned trials, or None if only the time is limited.
        num_updates: optimizer steps of a complete training.
        folder: the sweep's folder, as it is shown to the user; empty: not shown.
        quiet: show and print nothing.
    """

    def __init__(
        self, name: str, num_trials: int | None, num_updates: int, *, folder: str = "", quiet: bool = False
    ) -> None:
        self.console = RunConsole(quiet=quiet)
        self._name, self._num_trials, self._num_updates = name, num_trials, num_updates
        self._of_total = "" if num_trials is None else f"/{num_trials}"
        self._folder = folder
        self._rows: dict[str, _Row] = {}
        self._start_time = time.monotonic()
        self._max_seconds: float | None = None
        self._steps = Steps(self.console)
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=2)

    def __enter__(self) -> "SweepTable":
        self.end_step()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def print(self, line: str) -> None:
        """Print a line without interpreting markup in it."""
        self.end_step()
        print_line(self.console, line)

    def step(self, line: str) -> None:
        """Print a line about a step that takes seconds, before or after the trials."""
        self._steps.start(line)

    def end_step(self) -> None:
        """End the last step, if there is one."""
        self._steps.stop()

    def limit_time(self, seconds: float | None) -> None:
        """Say after how many seconds from now the trials are stopped; None: never."""
        elapsed = time.monotonic() - self._start_time
        self._max_seconds = None if seconds is None else elapsed + seconds

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
            best, left = self.best(), self._time_left()
            notes = [
                f"best so far {best}" if best and best != trial_id else "",
                left,
            ]
            self.print(
                f"[{seconds:4.0f} s] trial {self._num_done()}{self._of_total} {trial_id} {status} after "
                f"{row.updates} updates: objective {number(row.objective)} ({params})"
                + "".join(f"; {note}" for note in notes if note)
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
        row = self._rows[record.trial_id]
        row.status, row.is_earlier = record.status, True

    def best(self) -> str:
        """ID of the trial with the lowest objective so far; empty before the first evaluation."""
        usable = {trial_id: row.objective for trial_id, row in self._rows.items() if row.is_usable}
        finite = {key: value for key, value in usable.items() if value is not None and math.isfinite(value)}
        return min(finite, key=finite.__getitem__) if finite else ""

    def render(self) -> Table:
        """The table as it is now; of many trials, the running ones and the best."""
        seconds = int(time.monotonic() - self._start_time)
        best, left = self.best(), self._time_left()
        shown = list(self._rows.items())
        if len(shown) > _MAX_ROWS:
            shown.sort(key=lambda item: (item[1].status != "running", item[1].objective or float("inf")))
            shown = shown[:_MAX_ROWS]
        columns = {"trial": [trial_id for trial_id, _ in shown]}
        columns |= self._param_columns([row for _, row in shown])
        columns |= {
            OBJECTIVE: [number(row.objective) for _, row in shown],
            "distance": [number(row.distance) for _, row in shown],
            "val MSE": [number(row.mse) for _, row in shown],
            "status": [self._status(row) for _, row in shown],
        }
        fixed = ("trial", OBJECTIVE, "status")
        optional = [heading for heading in columns if heading not in (*fixed, "val MSE")]
        optional.sort(key=lambda each: (*_MOST_IMPORTANT, each).index(each))
        hidden = hide_columns(columns, [*optional, "val MSE"], self.console.width)
        notes = [
            f"best so far: {best}, objective {number(self._rows[best].objective)}" if best else "",
            "objective: lower is better; do not compare MSE" if "val MSE" in columns else "",
            f"previews: {self._folder}/trials/ID/samples.png" if self._folder and best else "",
            f"trials.csv also has {', '.join(hidden)}" if hidden else "",
        ]
        table = Table(
            title=f"{self._name}: {self._num_done()}{self._of_total} trials, {_clock(seconds)}"
            + (f", {left}" if left else ""),
            caption="\n".join(note for note in notes if note),
            title_justify="left",
            caption_justify="left",
        )
        for heading in columns:
            table.add_column(
                heading, justify="left" if heading in ("trial", "status") else "right", no_wrap=True
            )
        for index, (trial_id, row) in enumerate(shown):
            cells = {heading: cells[index] for heading, cells in columns.items()}
            if trial_id == best:
                cells = {key: f"[bold green]{cells[key]}[/]" for key in cells}
            cells["status"] = f"[{_STYLES.get(row.status, 'red')}]{columns['status'][index]}[/]"
            table.add_row(*cells.values())
        return table

    def _param_columns(self, rows: list[_Row]) -> dict[str, list[str]]:
        """Cells of the searched parameters by heading; two that belong together share a column."""
        keys = list(dict.fromkeys(key for row in self._rows.values() for key in row.params))
        columns = {_short_name(key): [number(row.params.get(key)) for row in rows] for key in keys}
        for (first, second), (heading, separator) in _PAIRS.items():
            if first in columns and second in columns:
                both = zip(columns.pop(first), columns.pop(second), strict=True)
                columns[heading] = ["-" if pair == ("-", "-") else separator.join(pair) for pair in both]
        return columns

    def _status(self, row: _Row) -> str:
        """Status of a trial, and how much of its training it has done unless that is all or nothing."""
        if row.status == "finished" or not row.updates:
            return row.status
        return f"{row.status} {row.updates / self._num_updates:.0%}"

    def _num_done(self) -> int:
        return sum(row.status != "running" for row in self._rows.values())

    def _time_left(self) -> str:
        """About how long the trials go on, by the updates per second so far; empty if that is unknown."""
        elapsed = time.monotonic() - self._start_time
        here = [row for row in self._rows.values() if not row.is_earlier]
        updates = sum(row.updates for row in here)
        seconds = math.inf
        if self._num_trials is not None and updates:
            ended = [row.updates for row in self._rows.values() if row.status != "running"]
            typical = sum(ended) / len(ended) if ended else self._num_updates
            waiting = max(0, self._num_trials - len(self._rows))
            running = sum(self._num_updates - row.updates for row in here if row.status == "running")
            seconds = (waiting * typical + running) * elapsed / updates
        if self._max_seconds is not None:
            seconds = min(seconds, max(0.0, self._max_seconds - elapsed))
        if not math.isfinite(seconds) or self._num_done() == self._num_trials:
            return ""
        return f"about {_clock(int(seconds))} left"


def _clock(seconds: int) -> str:
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def _short_name(key: str) -> str:
    return _SHORT_NAMES.get(key, key.rsplit(".", 1)[-1])
