"""How well does a sweep judge its models?

    python -m benchmarks.judgement --folder /tmp/judgement --mnist ~/mnist10k
    python -m benchmarks.judgement --folder /tmp/judgement --data heart rings --budget-fraction 0.1
    python -m benchmarks.judgement --folder /tmp/judgement --data heart digits --training-seeds 4
    python -m benchmarks.judgement    # only the report, from the tables in benchmarks/results

Trains configs drawn from the default search space of tune.py to their end, on laws from which examples can
be drawn without end and on pictures; measures each as a sweep does, and by `benchmarks.judgement_truth` on
fresh examples. Whatever is already in the folder is kept, so the command can be interrupted, and be asked
for more configs, data and budgets later. Writes benchmarks/results/judgement/DATA-FRACTION.csv (every
trial), pairs/DATA-FRACTION.csv there (two trials as a sweep's confirmation compares them) and
benchmarks/results/judgement.md, which says of each table what was measured.

With `--training-seeds N` it trains the preset's own config with N seeds instead, and writes
benchmarks/results/judgement/seeds/DATA-FRACTION.csv: how far another seed alone moves what is judged by.

The defaults train 24 configs for each of ten data sets: 40 to 60 minutes of one core for each law of points,
hours for pictures. `--budget-fraction 0.1` trains a tenth of the preset's updates; run both for both tables.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.judgement_data import NAMES, POINTS, Array, JudgedData, prepare
from benchmarks.judgement_report import RESULTS, champion, resampled_sweeps, write_report
from benchmarks.judgement_truth import DigitFeatures, of_pictures, of_points
from benchmarks.parallel import run_jobs
from diffusion import metrics as names
from diffusion.config import Config
from diffusion.data.dataset import load_dataset
from diffusion.evaluation.distances import Estimate
from diffusion.evaluation.elbo_window import elbo_window
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features import fit_features
from diffusion.evaluation.measured_objective import MeasuredObjective
from diffusion.presets import preset
from diffusion.process.generate import generate
from diffusion.training.checkpoints import TrainedModel
from diffusion.training.loop import EvaluationResult, Training, TrainingDiverged
from workflows.cli.tune_options import SIZES_FOR_POINTS
from workflows.data.load import LoadedData
from workflows.sweep.confirmation import Confirmation
from workflows.sweep.decision import TRAINING_SEED_ERRORS, Comparison

NUM_CONFIGS = 24
WINDOW_ENDS = (1.0, 3.0, 5.0, 7.0, 9.0)
_SIDES = {"digits": 8, "mnist": 14, "colours": 14}
# Seeds that no trial of a sweep uses: of the samples that are confirmed, and of those that the truth judges.
_CONFIRMATION_SEED, TRUTH_SEED = 1_000_001, 1_000_002


def draw_values(points: bool, count: int) -> list[dict[str, Any]]:
    """Random values from the default search space of tune.py; the first of more are those of fewer."""
    rng, sizes_rng = np.random.default_rng(0), np.random.default_rng(1)
    drawn = []
    for _ in range(count):
        values: dict[str, Any] = {
            "schedule.num_train_timesteps": int(rng.choice([50, 100, 200, 500, 1000])),
            "schedule.beta_start": float(np.exp(rng.uniform(np.log(1e-5), np.log(1e-3)))),
            "schedule.beta_end": float(np.exp(rng.uniform(np.log(5e-3), np.log(0.3)))),
            "network.time_embedding_size": int(rng.choice([16, 32, 64, 128])),
            "training.learning_rate": float(np.exp(rng.uniform(np.log(3e-4), np.log(3e-3)))),
        }
        data_embedding_size = int(rng.choice([16, 32, 64]))
        if points:
            values["network.data_embedding_size"] = data_embedding_size
            for size, choices in SIZES_FOR_POINTS.items():
                values[f"network.{size}"] = int(sizes_rng.choice(choices))
        drawn.append(values)
    return drawn


def base_config(name: str, path: Path, budget_fraction: float) -> Config:
    """Config of all trials: the preset of a sweep, with a fraction of its updates."""
    config = preset(str(path), _SIDES.get(name))
    updates = max(1, round(config.training.num_updates * budget_fraction))
    return config.with_values({"training.num_updates": updates})


def train(config: Config, folder: Path) -> None:
    """Train a config and write its model and the metrics of each evaluation to a folder."""
    history: list[dict[str, Any]] = []

    def report(result: EvaluationResult) -> None:
        history.append({"update": result.updates, **result.metrics})
        if result.metrics[names.BEST_UPDATE] == result.updates:
            result.model.save(folder)

    folder.mkdir(parents=True, exist_ok=True)
    dataset = load_dataset(config.data)
    start = time.perf_counter()
    try:
        Training(config, dataset, report, features=fit_features(dataset, "auto")).run()
    except TrainingDiverged as error:
        print(f"{folder}: {error}", flush=True)
    tree = {"seconds": time.perf_counter() - start, "history": history}
    (folder / "history.json").write_text(json.dumps(tree))


def judge(folder: Path, data: JudgedData) -> dict[str, Any]:
    """Values of a trial by name: its parameters, what a sweep sees of it, and the truth.

    `rung N` is the best objective up to N updates, `elbo [-8, B]` the windowed bound to a log-SNR of B, and
    `truth NAME` a yardstick of `benchmarks.judgement_truth`.
    """
    tree = json.loads((folder / "history.json").read_text())
    history = tree["history"]
    row: dict[str, Any] = {"seconds": tree["seconds"]}
    model = TrainedModel.load(folder) if history else None
    if model is None or history[-1]["update"] != model.config.training.num_updates:
        return row  # it diverged
    flat = model.config.flat()
    row |= {name: value for name, value in flat.items() if name.startswith("schedule.")}
    searched = ("time_embedding_size", "hidden_size", "num_blocks")
    row |= {f"network.{name}": flat[f"network.{name}"] for name in searched}
    row["training.learning_rate"] = flat["training.learning_rate"]
    row |= {f"rung {entry['update']}": entry[names.BEST_OBJECTIVE] for entry in history}
    dataset = load_dataset(model.config.data)
    evaluator = Evaluator(model.config, dataset, fit_features(dataset, "auto"))
    metrics, bound = evaluator.held_out_losses(model.network)
    np.save(folder / "elbo.npy", bound.per_example)
    row |= metrics | {"parameters": sum(weight.numel() for weight in model.network.parameters())}
    row |= evaluator.sample_metrics(
        model.network,
        dataset.val[:],
        num_samples=2 * model.config.metrics.num_samples,
        seed=_CONFIRMATION_SEED,
    )
    low, row["window end"] = dataset.spec.log_snr_window
    for high in WINDOW_ENDS:
        bound = elbo_window(
            model.network,
            model.schedule,
            dataset.val[: model.config.metrics.num_examples],
            (low, high),
            prediction_type=model.config.prediction_type,
            clip=evaluator.clip,
        )
        row[f"elbo [-8, {high:g}]"] = bound.value
    samples = generate(model.network, model.table, dataset.spec.shape, len(data.fresh), seed=TRUTH_SEED)
    truth = truth_of(data)(dataset.raw(samples))
    return row | {f"truth {name}": value for name, value in truth.items()}


def truth_of(data: JudgedData) -> Callable[[Array], dict[str, float]]:
    """The yardsticks of `benchmarks.judgement_truth` for these data, of samples in data units."""
    if data.other is None:
        fresh = data.fresh.astype(np.float64)
        return lambda drawn: of_points(drawn, fresh)
    features = DigitFeatures(*data.other)
    return lambda drawn: of_pictures(np.nan_to_num(drawn).round().astype(np.uint8), data.fresh, features)


def run_trial(name: str, number: int, folder: Path, budget_fraction: float) -> None:
    """Train and judge one config, each unless its result is in the folder."""
    torch.set_num_threads(1)
    data = prepare(name, folder / "data", None)
    values = draw_values(name in POINTS, number + 1)[number]
    config = base_config(name, data.path, budget_fraction).with_values(values)
    trial = folder / f"{name}-{budget_fraction:g}" / f"{number:02d}"
    _train_and_judge({"trial": number}, config, data, trial)


def run_seed(name: str, seed: int, folder: Path, budget_fraction: float) -> None:
    """Train the preset's own config with a seed and judge it, unless its result is in the folder."""
    torch.set_num_threads(1)
    data = prepare(name, folder / "data", None)
    config = base_config(name, data.path, budget_fraction).with_values({"seed": seed})
    trial = folder / f"{name}-{budget_fraction:g}-seeds" / f"{seed:02d}"
    _train_and_judge({"seed": seed}, config, data, trial)


def _train_and_judge(key: dict[str, int], config: Config, data: JudgedData, trial: Path) -> None:
    if not (trial / "history.json").exists():
        train(config, trial)
    judgement = trial / "judgement.json"
    if not judgement.exists():
        judgement.write_text(json.dumps(key | judge(trial, data)))


def write_seeds(folder: Path, name: str, budget_fraction: float) -> None:
    """Write the table of the preset's own config with several seeds."""
    found = sorted((folder / f"{name}-{budget_fraction:g}-seeds").glob("*/judgement.json"))
    seeds = RESULTS / "seeds"
    seeds.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([json.loads(path.read_text()) for path in found])
    table.to_csv(seeds / f"{name}-{budget_fraction:g}.csv", index=False)


def write_table(folder: Path, name: str, budget_fraction: float) -> None:
    """Write the table of all trials of these data and this budget that are in the folder.

    `paired N` is the standard error of the difference of the objective to that of trial N.
    """
    found = sorted((folder / f"{name}-{budget_fraction:g}").glob("*/judgement.json"))
    RESULTS.mkdir(exist_ok=True)
    rows = [json.loads(path.read_text()) for path in found]
    files = [path.parent / "elbo.npy" for path in found]  # which those that diverged lack
    bounds = {file.parent.name: np.load(file) for file in files if file.exists()}
    for row in rows:
        own = bounds.get(f"{row['trial']:02d}")
        if own is not None:
            row |= {
                f"paired {int(other)}": float((own - bound).std(ddof=1) / np.sqrt(own.size))
                for other, bound in bounds.items()
            }
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / f"{name}-{budget_fraction:g}.csv", index=False)


def write_pairs(folder: Path, name: str, budget_fraction: float) -> None:
    """Write the differences of `measure_pairs`, which are measured unless the folder has them."""
    trials, table = folder / f"{name}-{budget_fraction:g}", RESULTS / f"{name}-{budget_fraction:g}.csv"
    kept = trials / "pairs.csv"
    if not kept.exists() or kept.stat().st_mtime < max(path.stat().st_mtime for path in trials.glob("*/*")):
        measured = measure_pairs(trials, pd.read_csv(table))
        if not measured:  # too few trials for a sweep, or all diverged
            return
        kept.write_text(pd.DataFrame(measured).to_csv(index=False))
    pairs = RESULTS / "pairs"
    pairs.mkdir(parents=True, exist_ok=True)
    (pairs / table.name).write_text(kept.read_text())


def measure_pairs(trials: Path, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Differences between trials as a sweep's confirmation measures them: one row for two trials and a round.

    They are those that the rule asks for in the sweeps of the report.

    Args:
        trials: has the model and the bound of each trial.
        table: the trials.
    """
    torch.set_num_threads(1)
    models = {str(int(path.parent.name)): path.parent for path in sorted(trials.glob("*/elbo.npy"))}
    if not models:
        return []
    dataset = load_dataset(TrainedModel.load(next(iter(models.values()))).config.data)
    seed_error = TRAINING_SEED_ERRORS[dataset.spec.kind]
    data = LoadedData(dataset, fit_features(dataset, "auto"))
    confirmation = Confirmation(data, seed_error, notify=lambda line: None)
    measured: dict[tuple[str, str, int], Comparison] = {}

    def distances(first: str, second: str, round: int) -> tuple[Mapping[str, Estimate], int]:
        for name in {first, second} - confirmation.metrics.keys():
            bound = np.load(models[name] / "elbo.npy")
            objective = MeasuredObjective(bound.mean(), per_example=bound)
            confirmation.add(name, TrainedModel.load(models[name]), objective)
        key = first, second, round
        if key not in measured:
            measured[key] = confirmation.compare(*key)
        return measured[key].distances, measured[key].num_samples

    for sweep, ends in resampled_sweeps(table):
        champion(sweep.iloc[ends], distances)
    return [
        {"first": first, "second": second, "round": round, names.NUM_SAMPLES: found.num_samples}
        | {metric: difference.value for metric, difference in found.distances.items()}
        | {metric + names.STANDARD_ERROR: each.standard_error for metric, each in found.distances.items()}
        for (first, second, round), found in sorted(measured.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps data, models and judgements; default: only report")
    parser.add_argument("--data", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--configs", type=int, default=NUM_CONFIGS)
    parser.add_argument(
        "--training-seeds", type=int, default=0, help="train the preset's config with N seeds"
    )
    parser.add_argument("--budget-fraction", type=float, nargs="+", default=[1.0])
    parser.add_argument("--mnist", type=Path, help="folder of digits, for mnist and colours")
    parser.add_argument("--processes", type=int, help="default: one per core")
    options = parser.parse_args()
    if options.folder is not None:
        for name in options.data:
            prepare(name, options.folder / "data", options.mnist)
        run, write, count = run_trial, write_table, options.configs
        if options.training_seeds:
            run, write, count = run_seed, write_seeds, options.training_seeds
        jobs = [
            (name, number, options.folder, fraction)
            for fraction in options.budget_fraction
            for number in range(count)
            for name in options.data
        ]
        run_jobs(
            run, jobs, options.processes, lambda name, _, folder, fraction: write(folder, name, fraction)
        )
        if not options.training_seeds:
            tables = itertools.product([options.folder], options.data, options.budget_fraction)
            run_jobs(write_pairs, list(tables), options.processes)
    print(write_report())


if __name__ == "__main__":
    main()
