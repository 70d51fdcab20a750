"""Start-up: from the start of the process to the first update, and to the help of a command.

The first update is that of the heart's training with the tutorial's settings, on both sides in a fresh
process.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.comparison import Comparison, Options, Report, measure
from benchmarks.comparisons.heart import AS_IT_IS, ours, tutorial
from benchmarks.contender import CPU_SECONDS, MEMORY, SECONDS, Contender, Measure, timed
from benchmarks.table import Unit, row

TITLE = "Start-up"
FIRST_UPDATE = "start-up: import to first update"
LIMIT, LIMIT_SECONDS = "half a second", 0.5
ROOT = Path(__file__).parents[2]
COMMANDS = {
    "tune.py": ["workflows/tune.py"],
    "train.py": ["workflows/train.py"],
    "export.sampler": ["-m", "export.sampler"],
    "export.to_onnx": ["-m", "export.to_onnx"],
}
WORKS = (FIRST_UPDATE, *(f"{name} --help" for name in COMMANDS))


def help_of(command: list[str]) -> Measure:
    """A command's --help, in a process of its own."""
    return lambda: {
        SECONDS: timed(
            lambda: subprocess.run(
                [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, check=True
            )
        )[SECONDS]
    }


def run(options: Options) -> Report:
    report = Report()
    units = [Unit(SECONDS, goals={AS_IT_IS: "1"}), Unit(CPU_SECONDS), Unit(MEMORY)]
    report.add(
        Comparison(FIRST_UPDATE, {"ours": ours(1, 0)}, {AS_IT_IS: {AS_IT_IS: tutorial(1, 0)}}, units),
        options.repeats,
    )
    print("--help", flush=True)
    contenders = {
        name: Contender("benchmarks.comparisons.startup:help_of", {"command": command})
        for name, command in COMMANDS.items()
    }
    for name, figures in measure(contenders, options.repeats).items():
        seconds = [each[SECONDS] for each in figures]
        limits = [LIMIT_SECONDS] * len(seconds)
        report.rows.append(row(f"{name} --help", LIMIT, Unit(SECONDS), seconds, limits, goal="1"))
    return report
