"""What a person sees of long work that has a length: a bar, or lines where there is no terminal."""

import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class BarView:
    """A context manager that keeps a bar on the screen of a terminal.

    Args:
        name: stands before the bar.
        unit: of what is done; may name `{task.fields[...]}`.
        total: to do.
        fields: the first values of what the unit names.
    """

    def __init__(self, name: str, unit: str, total: int, **fields: Any) -> None:
        self.console = Console()
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

    def say(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class TrainingView(BarView):
    """The progress of one training.

    Args:
        name: of the run.
        num_updates: planned.
    """

    def __init__(self, name: str, num_updates: int) -> None:
        super().__init__(name, "updates, {task.fields[speed]}", num_updates, speed="starting the workers")
        self._first: tuple[float, int] | None = None

    def progressed(self, updates: int) -> None:
        """So many updates are done."""
        now = time.monotonic()
        if self._first is None or updates < self._first[1]:
            self._first = (now, updates)
        since, start = self._first
        speed = f"{(updates - start) / (now - since):.3g} a second" if updates > start else "starting"
        self._bar.update(self._task, completed=updates, speed=speed)

    def evaluated(self, updates: int, metrics: Mapping[str, float]) -> None:
        """The model was evaluated."""
        seconds = time.monotonic() - self._started
        line = (
            f"[{seconds:4.0f} s] update {updates}/{self._total}: objective "
            f"{metrics['objective']:.4f}, train MSE {metrics['train/mse']:.4g}, "
            f"val MSE {metrics['val/mse']:.4g}"
        )
        if "sample/distance" in metrics:
            line += f", distance {metrics['sample/distance']:.4g}"
        self.say(line)


class BlockView(BarView):
    """The progress of drawing many samples; without a terminal, a line now and then.

    Args:
        total: samples wanted.
        missing: those that are still to be drawn.
    """

    def __init__(self, total: int, missing: int) -> None:
        super().__init__("drawing", "samples", total)
        self._done = total - missing
        self._bar.update(self._task, completed=self._done)
        self._said = self._started

    def __enter__(self) -> Self:
        if self._done:
            self.say(f"{self._done} of {self._total} samples are there already")
        return super().__enter__()

    def drawn(self, count: int) -> None:
        """So many more are drawn and kept."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        due = now - self._said >= _SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and due and self._done < self._total:
            self.say(f"[{now - self._started:4.0f} s] {self._done}/{self._total} samples")
            self._said = now
