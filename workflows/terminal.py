"""Progress of long tasks: a bar in a terminal, otherwise printed lines."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffusion.metrics import OBJECTIVE, SAMPLE_DISTANCE, TRAIN_MSE, VAL_MSE

_SECONDS_BETWEEN_LINES = 10.0


def display_path(path: Any) -> str:
    """A path relative to the working directory if it is inside it; any other location unchanged."""
    local = getattr(path, "path", path) if getattr(path, "is_local", True) else None
    if local is None:
        return str(path)
    return str(local.relative_to(Path.cwd()) if local.is_relative_to(Path.cwd()) else local)


def hide_columns(columns: dict[str, list[str]], optional: list[str], width: int) -> list[str]:
    """Remove columns until a table fits a terminal, and return their headings.

    Args:
        columns: cells by heading; changed here.
        optional: headings of those that may be removed, the last ones first.
        width: width of the terminal in characters.
    """
    hidden: list[str] = []
    while optional and 1 + sum(3 + max(map(len, [name, *cells])) for name, cells in columns.items()) > width:
        hidden.insert(0, optional.pop())
        del columns[hidden[0]]
    return hidden


def number(value: Any) -> str:
    """A number with three or four digits; a word as it is, and None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 0.1 else f"{value:.4g}"


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a spinner and a text on stderr while something runs, if that is a terminal."""
    console = Console(stderr=True)
    if console.is_terminal and not console.is_jupyter:
        with console.status(text):
            yield
    else:
        yield


class ProgressBar:
    """Context manager that shows a progress bar if the output is a terminal.

    Args:
        name: text before the bar.
        unit: text after the counts; may refer to `{task.fields[...]}`.
        total: number of steps in total.
        quiet: show and print nothing.
        fields: initial values of the fields that `unit` refers to.
    """

    def __init__(self, name: str, unit: str, total: int, *, quiet: bool = False, **fields: Any) -> None:
        self.console = Console(quiet=quiet)
        self._bar = Progress(
            TextColumn(name, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._total = total
        self._task = self._bar.add_task("", total=total, **fields)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def print(self, line: str) -> None:
        """Print a line without markup or highlighting, above the bar if there is one."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class TrainingProgress(ProgressBar):
    """Progress of one training run.

    Args:
        name: name of the run.
        num_updates: planned number of updates.
        quiet: show and print nothing.
    """

    def __init__(self, name: str, num_updates: int, *, quiet: bool = False) -> None:
        unit = "updates, {task.fields[speed]}"
        super().__init__(name, unit, num_updates, quiet=quiet, speed="starting the workers")
        self._speed_origin: tuple[float, int] | None = None  # time and number of updates at that time

    def progressed(self, updates: int) -> None:
        """Show that `updates` updates are done; fewer than before mean that the workers have restarted."""
        now = time.monotonic()
        if self._speed_origin is None or updates < self._speed_origin[1]:
            self._speed_origin = (now, updates)
        since, start = self._speed_origin
        speed = f"{(updates - start) / (now - since):.3g} per second" if updates > start else "starting"
        self._bar.update(self._task, completed=updates, speed=speed)

    def evaluated(self, updates: int, metrics: Mapping[str, float]) -> None:
        """Print the metrics of an evaluation."""
        seconds = time.monotonic() - self._started
        line = (
            f"[{seconds:4.0f} s] update {updates}/{self._total}: objective "
            f"{metrics[OBJECTIVE]:.4f}, train MSE {metrics[TRAIN_MSE]:.4g}, "
            f"val MSE {metrics[VAL_MSE]:.4g}"
        )
        if SAMPLE_DISTANCE in metrics:
            line += f", distance {metrics[SAMPLE_DISTANCE]:.4g}"
        self.print(line)


class SamplingProgress(ProgressBar):
    """Progress of drawing many samples; without a terminal, a line about every 10 seconds.

    Args:
        total: number of samples in total.
        missing: number of samples that are still to be drawn.
    """

    def __init__(self, total: int, missing: int) -> None:
        super().__init__("drawing", "samples", total)
        self._done = total - missing
        self._bar.update(self._task, completed=self._done)
        self._last_printed = self._started

    def __enter__(self) -> Self:
        if self._done:
            self.print(f"{self._done} of {self._total} samples already exist")
        return super().__enter__()

    def drawn(self, count: int) -> None:
        """Show that `count` more samples are drawn and saved."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        due = now - self._last_printed >= _SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and due and self._done < self._total:
            self.print(f"[{now - self._started:4.0f} s] {self._done}/{self._total} samples")
            self._last_printed = now
