"""Progress of long tasks: a bar in a terminal, otherwise printed lines."""

import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any, ClassVar, Self, cast

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.spinner import Spinner
from rich.text import Text

from diffusion.errors import printable
from diffusion.files import relative_path
from diffusion.metrics import OBJECTIVE, SAMPLE_DISTANCE, TRAIN_MSE, VAL_MSE

_SECONDS_BETWEEN_LINES = 10.0
_WIDTH_FOR_NAME, _WIDTH_FOR_BAR = 80, 100  # characters of a terminal; numbers are shown in narrower ones


def display_path(path: Any) -> str:
    """A path relative to the working directory if it is inside it; any other location unchanged."""
    local = getattr(path, "path", path) if getattr(path, "is_local", True) else None
    return str(path if local is None else relative_path(local))


def hide_columns(columns: dict[str, list[str]], optional: list[str], width: int) -> list[str]:
    """Remove columns until a table fits a terminal, and return their headings.

    Args:
        columns: cells by heading; changed here.
        optional: headings of those that may be removed, the most important ones first; each stays if there
            is room for it beside more important ones.
        width: width of the terminal in characters.
    """
    needed = {name: 3 + max(map(len, [name, *cells])) for name, cells in columns.items()}
    room = width - 1 - sum(size for name, size in needed.items() if name not in optional)
    hidden = []
    for name in optional:
        if needed[name] <= room:
            room -= needed[name]
        else:
            hidden.append(name)
            del columns[name]
    return hidden


def number(value: Any) -> str:
    """A number with three or four digits, or all of a whole one; a word as it is, and None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 0.1 else f"{value:.4g}"


def print_line(console: Console, line: str) -> None:
    """Print a line without markup; in a terminal, break prose between words, but no command.

    What names of files and classes hold to control the terminal is shown as escapes.
    """
    line = "\n".join(map(printable, line.split("\n")))
    if console.is_terminal and len(line) > console.width and "python -m " not in line:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        line = textwrap.fill(
            line,
            console.width,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class RunConsole(Console):
    """Console of a run, which goes on without its output.

    A terminal may be closed, the reader of a pipe may end, and the disk of a log may be full.
    """

    @property
    def file(self) -> IO[str]:
        """The stream that is written to; a failure of it is ignored."""
        return cast(IO[str], _LossyStream(super().file))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file


class _LossyStream:
    """A stream whose failures are ignored."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        """Write a text, or lose it."""
        # ValueError: the stream is closed. RuntimeError: a signal, which prints, has interrupted a write.
        with suppress(OSError, ValueError, RuntimeError):
            self._stream.write(text)

    def flush(self) -> None:
        """Flush what is written, or lose it."""
        with suppress(OSError, ValueError, RuntimeError):
            self._stream.flush()


class Steps:
    """Prints a line for each step that takes seconds; in a terminal, a clock runs under the last one.

    Only the clock that was started last is shown: it may belong to a part of another step.

    Args:
        console: console to print to.
    """

    _running: "ClassVar[list[Steps]]" = []

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text, self._started = "", 0.0
        self._live: Live | None = None

    def start(self, line: str) -> None:
        """Print a line about a step that starts, which ends the one before."""
        self.stop()
        print_line(self._console, line)
        self.run_clock("")

    def run_clock(self, text: str) -> None:
        """Show a text with a clock until `stop`, if this is a terminal."""
        if not self._console.is_terminal or self._console.is_jupyter or self._console.quiet:
            return
        for steps in self._running[-1:]:
            steps._hide()
        self._text, self._started = text, time.monotonic()
        self._running.append(self)
        self._show()

    def stop(self) -> None:
        """End the step, if there is one: its clock disappears, and its line stays."""
        self._hide()
        if self in self._running:
            self._running.remove(self)
            for steps in self._running[-1:]:
                steps._show()

    def _show(self) -> None:
        spinner = Spinner("dots")

        def render() -> Spinner:
            spinner.update(text=Text(f"{self._text} {time.monotonic() - self._started:.0f} s".strip()))
            return spinner

        self._live = Live(
            get_renderable=render,
            console=self._console,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()

    def _hide(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


@contextmanager
def waiting(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a text and a clock on stderr while something runs, if that is a terminal.

    Args:
        text: what runs.
        quiet: show nothing.
    """
    steps = Steps(RunConsole(stderr=True, quiet=quiet))
    steps.run_clock(text)
    try:
        yield
    finally:
        steps.stop()


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
        self.console = RunConsole(quiet=quiet)
        self._steps = Steps(self.console)
        width = self.console.width
        self._bar = Progress(
            SpinnerColumn(),
            *([TextColumn(name, markup=False)] if width >= _WIDTH_FOR_NAME else []),
            *([BarColumn(bar_width=None)] if width >= _WIDTH_FOR_BAR else []),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            expand=True,
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
        self._steps.stop()
        print_line(self.console, line)

    def step(self, line: str) -> None:
        """Print a line about a step that takes seconds, when there is no bar any more."""
        self._steps.start(line)

    def end_step(self) -> None:
        """End the last step, if there is one."""
        self._steps.stop()


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
        speed = f"{(updates - start) / (now - since):.3g}/s" if updates > start else "starting"
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
