"""How often does early stopping end the trial that would have become the best, and what does it save?

    python -m benchmarks.early_stopping --folder /tmp/curves --data heart rings digits
    python -m benchmarks.early_stopping    # only the report, from the tables in benchmarks/results

Trains configs drawn from the default search space of tune.py to their end, records the objective at each
evaluation (benchmarks/results/early_stopping/DATA.csv), and replays sweeps of them with the rules
of `--early-stopping`. Whatever is already in the folder is kept. Writes benchmarks/results/early_stopping.md.
"""

import argparse
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from benchmarks.judgement import base_config, draw_values, train
from benchmarks.judgement_data import NAMES, POINTS, prepare
from benchmarks.judgement_report import replay
from benchmarks.parallel import run_jobs
from diffusion.metrics import BEST_OBJECTIVE
from workflows.cli.tune_options import EarlyStopping
from workflows.sweep.asha import make_scheduler

RESULTS = Path(__file__).parent / "results" / "early_stopping"
NUM_CONFIGS = 40
SWEEPS = (12, 24)
PARALLEL = 2  # trials at a time
_NUM_SWEEPS, _NUM_POOLS, _NUM_SWEEPS_OF_A_POOL = 1000, 100, 60


def record(name: str, number: int, folder: Path) -> None:
    """Train one config and write its history, unless it is in the folder."""
    torch.set_num_threads(1)
    trial = folder / name / f"{number:02d}"
    if (trial / "history.json").exists():
        return
    config = base_config(name, prepare(name, folder / "data", None).path, 1.0)
    # Samples are not needed, and would take longer than the training of points.
    values = draw_values(name in POINTS, number + 1)[number] | {"metrics.num_samples": 6}
    train(config.with_values(values), trial)


def write_curves(folder: Path, name: str) -> None:
    """Write the table of the data's curves: a row a trial, the best objective up to each evaluation."""
    rows = []
    for path in sorted((folder / name).glob("*/history.json")):
        history = json.loads(path.read_text())["history"]
        rows.append({str(entry["update"]): entry[BEST_OBJECTIVE] for entry in history})
    RESULTS.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(RESULTS / f"{name}.csv", index=False)


def lost_and_trained(
    curves: NDArray[np.float64],
    points: list[int],
    rule: EarlyStopping,
    size: int,
) -> tuple[float, float, float]:
    """Share of sweeps that lose their best trial, its upper 95% bound, and the share of updates trained.

    The bound is the 95th percentile over pools of curves drawn with replacement from those recorded.
    """
    rng, shares, costs = np.random.default_rng(0), [], []
    for pool_number in range(_NUM_POOLS + 1):
        count = len(curves)
        pool = rng.integers(count, size=count) if pool_number else np.arange(count)
        lost = []
        for _ in range(_NUM_SWEEPS_OF_A_POOL if pool_number else _NUM_SWEEPS):
            drawn = curves[rng.choice(pool, size, replace=False)]
            ends, cost = replay(drawn, points, make_scheduler(rule, points), PARALLEL)
            final = drawn[:, -1]
            lost.append(not ends.any() or final[ends].min() > final.min())
            costs.append(cost)
        shares.append(float(np.mean(lost)))
    return shares[0], float(np.quantile(shares[1:], 0.95)), float(np.mean(costs))


def write_report() -> Path:
    """Write the comparison of the rules for every recorded table."""
    lines = [
        "# Early stopping, replayed",
        "",
        "Written by `python -m benchmarks.early_stopping` from the curves in `early_stopping/`: configs",
        "drawn from the default search space, trained to their end. Sweeps run two trials at a time. `lost`:",
        "share of sweeps in which the trial with the best final objective was stopped, and the upper 95%",
        "bound over pools of curves drawn with replacement. `trained`: share of all updates.",
        "",
        "| data | curves | trials | rule | lost | at most (95%) | trained |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.csv")):
        table = pd.read_csv(path).dropna()
        points, curves = [int(column) for column in table], table.to_numpy()
        for size in SWEEPS:
            for rule in get_args(EarlyStopping)[:2]:  # off loses nothing
                lost, bound, cost = lost_and_trained(curves, points, rule, size)
                shares = f"{lost:.1%} | {bound:.1%} | {cost:.0%}"
                lines.append(f"| {path.stem} | {len(curves)} | {size} | {rule} | {shares} |")
    report = RESULTS.with_suffix(".md")
    report.write_text("\n".join(lines) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps data and curves; default: only report")
    parser.add_argument("--data", nargs="+", choices=NAMES, default=["heart", "rings", "digits"])
    parser.add_argument("--configs", type=int, default=NUM_CONFIGS)
    parser.add_argument("--mnist", type=Path, help="folder of digits, for mnist and colours")
    parser.add_argument("--processes", type=int, help="default: one per core")
    options = parser.parse_args()
    if options.folder is not None:
        for name in options.data:
            prepare(name, options.folder / "data", options.mnist)
        jobs = [(name, number, options.folder) for name in options.data for number in range(options.configs)]
        run_jobs(record, jobs, options.processes, lambda name, _, folder: write_curves(folder, name))
    print(write_report())


if __name__ == "__main__":
    main()
