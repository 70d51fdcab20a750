"""Overhead of a sweep in addition to the training of its trials.

    python -m benchmarks.sweep_overhead --num-trials 200        # about five minutes on 2 cores

Runs `workflows/tune.py` with very short trials, two at a time, and compares the wall time per trial with that
of the same training in a plain process. Records the memory of the driver. Writes
benchmarks/results/sweep-overhead-N.md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SHORT = {
    "training.num_updates": 40,
    "training.num_evaluations": 2,
    "metrics.num_samples": 64,
    "metrics.num_examples": 64,
}
_OVER = re.compile(r"\[ *(\d+) s\] trial (\d+)/")


def train_bare() -> None:
    """Print the seconds of ten such trainings, after a first one; runs in its own process."""
    import torch

    from diffusion.data.dataset import load_dataset
    from diffusion.presets import preset
    from diffusion.training.loop import Training

    torch.set_num_threads(1)
    config = preset("heart").with_values(SHORT)
    dataset, seconds = load_dataset(config.data), []
    for _ in range(11):
        started = time.perf_counter()
        Training(config, dataset, lambda progress: None).run()
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds[1:]))


def watch(command: list[str], folder: Path) -> tuple[list[str], list[tuple[float, float]]]:
    """Run the sweep; return its output lines, and (seconds, MB) of the driver's memory twice per second."""
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        driver, started, memory = psutil.Process(process.pid), time.monotonic(), []
        while process.poll() is None:
            memory.append((time.monotonic() - started, driver.memory_info().rss / 1e6))
            time.sleep(0.5)
    lines = log.read_text().splitlines()
    if process.returncode:
        raise SystemExit("\n".join(lines[-10:]))
    return lines, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-trials", type=int, default=200)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        train_bare()
        return
    bare = subprocess.run(
        [sys.executable, "-m", "benchmarks.sweep_overhead", "--bare"], capture_output=True, check=True
    )
    alone = statistics.median(json.loads(bare.stdout))
    flags = [part for name, value in SHORT.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = [sys.executable, str(ROOT / "workflows" / "tune.py"), "--data", "heart", "--name", "many"]
        command += ["--num-trials", str(options.num_trials), "--search.algorithm", "random", *flags]
        lines, memory = watch(command, folder)
        trials = pd.read_csv(folder / "runs" / "many" / "trials.csv")
        size = (folder / "mlflow.db").stat().st_size / 1e6
    ends = sorted(int(match[1]) for match in map(_OVER.match, lines) if match)
    slots = 2
    quarter = len(ends) // 4
    each = slots * (ends[-1] - ends[0]) / (len(ends) - slots)
    first = slots * (ends[quarter] - ends[0]) / max(1, quarter)
    last = slots * (ends[-1] - ends[-1 - quarter]) / max(1, quarter)
    begun, over = at(memory, ends[0]), at(memory, ends[-1])
    text = f"""# Overhead of a sweep

{len(trials)} trials of {SHORT["training.num_updates"]} updates on the heart, {slots} at a time on
{os.cpu_count()} cores. `python -m benchmarks.sweep_overhead --num-trials {options.num_trials}`.

| | |
|---|---|
| a training in a bare process | {alone:.2f} s |
| a trial, its share of the wall time | {each:.2f} s |
| overhead of a trial | {each - alone:.2f} s |
| a trial among the first quarter, the last quarter | {first:.2f} s, {last:.2f} s |
| before the first trial was over | {ends[0]} s |
| after the last one (confirmation, export, pictures) | {memory[-1][0] - ends[-1]:.0f} s |
| driver's memory after the first trial, at the end of the last | {begun}, {over} |
| MLflow's database | {size:.1f} MB |
"""
    (RESULTS / f"sweep-overhead-{options.num_trials}.md").write_text(text)
    print(text)


def at(memory: list[tuple[float, float]], second: float) -> str:
    """Memory at a given second of the sweep, which started shortly after the process."""
    return f"{next((mb for when, mb in memory if when >= second), memory[-1][1]):.0f} MB"


if __name__ == "__main__":
    main()
