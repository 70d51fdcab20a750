"""`make demo` beside itself before the issue that made it faster, at commit 5daa953, on the same machine.

Each turn is a sweep of the digits with a seed of its own, by both commits in turns; the older one is
checked out beside this one and runs in the same environment. The figures are the champion's on the test
split. Not measured in a clone without that commit.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.comparison import Options, Report
from benchmarks.contender import CPU_SECONDS, SECONDS, Figures
from benchmarks.programs import watch
from benchmarks.table import Unit, not_measured, row
from diffusion.metrics import TEST_PREFIX

TITLE = "The demo, before and after"
COMMIT = "5daa953"
WORK, PEER = "make demo after installation", f"itself at {COMMIT}"
WORKS = (WORK,)
ROOT = Path(__file__).parents[2]


def demo(code: Path, seed: int) -> Figures:
    """Seconds, and the champion's metrics on the test split."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(code / "workflows" / "tune.py"), "--data", "digits", "--name", "demo"]
        seen = watch([*command, "--seed", str(seed)], Path(folder))
        saved = json.loads((Path(folder) / "runs" / "demo" / "champion" / "config.json").read_text())
    metrics = saved["provenance"]["metrics"]
    return {SECONDS: seen.seconds, CPU_SECONDS: seen.cpu_seconds} | {
        name: value for name, value in metrics.items() if name.startswith(TEST_PREFIX)
    }


def run(options: Options) -> Report:
    report = Report()
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "cat-file", "-e", f"{COMMIT}^{{commit}}"], capture_output=True, check=False)
    if found.returncode:
        report.rows = [not_measured(WORK, PEER, unit, "1.5") for unit in (SECONDS, CPU_SECONDS)]
        return report
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(
            [*git, "worktree", "add", "--detach", str(before), COMMIT], check=True, capture_output=True
        )
        try:
            figures = [(demo(ROOT, seed), demo(before, seed)) for seed in range(options.repeats)]
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(before)], check=True)
    for unit in (SECONDS, CPU_SECONDS):
        sides = ([each[side][unit] for each in figures] for side in (0, 1))
        report.rows.append(row(WORK, PEER, Unit(unit), *sides, goal="1.5" if unit == SECONDS else ""))
    report.lines += [
        "",
        "| metric of the champion | after | before | difference | standard error |",
        "|---" * 5 + "|",
    ]
    for name in sorted(figures[0][0].keys() & figures[0][1].keys() - {SECONDS, CPU_SECONDS}):
        after, older = ([each[side][name] for each in figures] for side in (0, 1))
        differences = [new - old for new, old in zip(after, older, strict=True)]
        error = (
            statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        )
        cells = [statistics.mean(after), statistics.mean(older), statistics.mean(differences), error]
        report.lines.append(f"| {name} | {' | '.join(f'{cell:.4g}' for cell in cells)} |")
    return report
