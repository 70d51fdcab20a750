"""What a person sees while many samples are drawn: a bar, or now and then a line."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class BlockView:
    """A context manager that keeps the bar on the screen.

    Args:
        total: samples wanted.
        missing: those that are still to be drawn.
    """

    def __init__(self, total: int, missing: int) -> None:
        self.console = Console()
        self._bar = Progress(
            TextColumn("drawing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._total, self._done = total, total - missing
        self._task = self._bar.add_task("", total=total, completed=self._done)
        self._started = self._said = time.monotonic()

    def __enter__(self) -> "BlockView":
        if self._done:
            self.say(f"{self._done} of {self._total} samples are there already")
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def drawn(self, count: int) -> None:
        """So many more are drawn and kept."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        due = now - self._said >= _SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and due and self._done < self._total:
            self.say(f"[{now - self._started:4.0f} s] {self._done}/{self._total} samples")
            self._said = now
