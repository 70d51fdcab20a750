"""Clocks of steps, lines of prose and columns of tables; no terminal is needed."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from workflows.sweep.table_view import SweepTable
from workflows.terminal import Steps, TrainingProgress, hide_columns, number, print_line


def terminal(width=40):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def test_only_the_clock_that_was_started_last_runs_and_the_one_before_goes_on_after_it():
    outer, inner = Steps(terminal()), Steps(terminal())
    outer.start("exporting")
    assert outer._live is not None
    inner.run_clock("starting Ray")
    assert outer._live is None and inner._live is not None
    inner.stop()
    assert outer._live is not None and inner._live is None
    outer.stop()
    assert outer._live is None and Steps._running == []
    outer.stop()  # again: nothing happens


def test_a_step_prints_its_line_once_and_a_clock_under_it():
    console = terminal()
    steps = Steps(console)
    steps.start("exporting [bold]it[/]")
    steps.stop()
    output = console.file.getvalue()
    assert output.startswith("exporting [bold]it[/]\n") and "0 s" in output


@pytest.mark.parametrize("quiet", [False, True])
def test_without_a_terminal_a_step_is_its_line(quiet):
    console = Console(file=io.StringIO(), quiet=quiet)
    steps = Steps(console)
    steps.start("exporting")
    steps.stop()
    assert console.file.getvalue() == ("" if quiet else "exporting\n")


def test_prose_is_broken_between_words_and_a_command_is_not():
    console = terminal(30)
    print_line(console, "  chosen since its samples are closer to the data")
    lines = console.file.getvalue().splitlines()
    assert [line.strip() for line in lines] == ["chosen since its samples are", "closer to the data"]
    assert lines[1].startswith("    ") and max(map(len, lines)) <= 30
    console = terminal(30)
    command = "next: python -m workflows.tune --resume --name a-long-name"
    print_line(console, command)
    assert console.file.getvalue() == f"{command}\n"
    console = Console(file=io.StringIO(), width=30)
    print_line(console, "x " * 30)
    assert console.file.getvalue().count("\n") == 1, "files have whole lines"


@pytest.mark.parametrize(
    ("width", "kept"),
    [(8, ["id"]), (14, ["id", "long"]), (20, ["id", "long", "b"]), (13, ["id", "b"])],
)
def test_columns_stay_in_the_order_of_their_importance_where_there_is_room(width, kept):
    columns = {"id": ["ab"], "long": ["12345"], "b": ["1"]}
    hidden = hide_columns(columns, ["long", "b"], width)
    assert list(columns) == kept and {*columns, *hidden} == {"id", "long", "b"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("cosine", "cosine"),
        (1000, "1000"),
        (20000.0, "20000"),
        (1.54321e-05, "1.54e-05"),
        (0.24171, "0.2417"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_the_digits_that_matter(value, text):
    assert number(value) == text


class BrokenStream(io.StringIO):
    """A closed terminal, a pipe without a reader, or a log on a full disk."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.refused = ""

    def write(self, text):
        self.refused += text
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(5, "EIO"), OSError(28, "ENOSPC"), BrokenPipeError(), ValueError(), RuntimeError()]
)
@pytest.mark.parametrize("view", [TrainingProgress, SweepTable])
def test_a_run_goes_on_without_its_output(monkeypatch, view, error):
    arguments = ("run", 10) if view is TrainingProgress else ("run", 2, 10)
    stream = BrokenStream(error)
    monkeypatch.setattr(sys, "stdout", stream)
    run = view(*arguments)
    with run:
        run.print("a line")
    run.step("exporting")
    run.end_step()
    assert "a line" in stream.refused and "exporting" in stream.refused, "each line is tried, and lost"


def test_a_run_goes_on_when_its_terminal_is_closed():
    """The same with a bar that a thread draws, which Rich writes by itself."""
    pty = pytest.importorskip("pty")
    script = (
        "import os, sys\n"
        "from workflows.terminal import TrainingProgress\n"
        "with TrainingProgress('run', 10) as view:\n"
        "    assert view.console.is_terminal\n"
        "    view.print('begun')\n"
        "    sys.stdin.read()\n"
        "    view.print('more')\n"
        "    view.step('exporting')\n"
        "    view.end_step()\n"
        "os._exit(7)\n"
    )
    controller, terminal_file = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=terminal_file,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(terminal_file)
    seen = b""
    while b"begun" not in seen:
        seen += os.read(controller, 1000)
    os.close(controller)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (7, b"")
