"""Which figure should a sweep choose its denoiser by?

    python -m benchmarks.objective_trials --data heart --output /tmp/trials/heart
    python -m benchmarks.objective --data heart --trials /tmp/trials/heart
    python -m benchmarks.objective --data heart                      # the tables anew, from the .csv

Draws samples of every trained trial by several samplers, measures them by several distances to the test
split, and asks how well each candidate objective, taken on the validation split, ranks the trials by them:
Spearman's correlation with a bootstrap interval over the trials, and the regret of its pick. No distance is
counted below the floor, so trials that are as good as real data tie. Writes
benchmarks/results/objective-NAME.csv (every trial) and objective-NAME.md.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from benchmarks.objective_trials import NUM_SEEDS, base_config
from diffusion.checkpoints import TrainedModel
from diffusion.data import Dataset, load_dataset
from diffusion.evaluation import Evaluator
from diffusion.feature_fitting import fit_features, with_features
from diffusion.generation import deployed_table, generate
from diffusion.likelihood import elbo_window
from diffusion.metrics import (
    Estimate,
    energy_distance,
    frechet_distance,
    kernel_distance,
    sliced_wasserstein_distance,
)
from diffusion.sampling import SamplerName
from diffusion.sources import short_name

SAMPLERS: tuple[SamplerName, ...] = ("ddpm", "ddim", "dpmpp_2m")
WINDOWS = (
    *((-8.0, high) for high in (8.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0)),
    (-6.0, 3.0),
    (-4.0, 3.0),
    (-2.0, 3.0),
)
OBJECTIVE = "elbo [-8, 3]"  # what val/elbo_window is for these data
BOOTSTRAPS = 2000
RESULTS = Path(__file__).parent / "results"
_JUDGE_SEED = 77


def distances(dataset: Dataset, samples: torch.Tensor) -> dict[str, Estimate]:
    """Of normalised samples to the test split; images also by features that no label made."""
    reference = dataset.test[:]
    if not bool(samples.isfinite().all()):
        samples = torch.full_like(samples, 1e3)  # as bad as can be, and still a number
    if dataset.spec.kind == "points":
        return {
            "energy": energy_distance(samples, reference),
            "sliced_wasserstein": Estimate(sliced_wasserstein_distance(samples, reference), 0.0),
        }
    found = {}
    for features in (dataset.features, fit_features(dataset, "random")):
        assert features is not None
        both = [features(torch.from_numpy(dataset.raw(each))) for each in (samples, reference)]
        suffix = "" if features.name == "classifier" else f"_{features.name}"
        found[f"kid{suffix}"] = kernel_distance(*both)
        found[f"frechet{suffix}"] = frechet_distance(*both)
    return found


def judge(data: str, folder: Path) -> dict[str, Any]:
    """A trial's candidate objectives and distances, by name."""
    torch.set_num_threads(1)
    dataset = with_features(load_dataset(base_config(data, None).data), "auto")
    model = TrainedModel.load(folder)
    history = json.loads((folder / "history.json").read_text())
    number, seed = folder.name.split("-")
    row: dict[str, Any] = {"trial": int(number), "seed": int(seed)}
    if not history or history[-1]["update"] != model.config.training.num_updates:
        return row  # it diverged
    flat = model.config.flat()
    row |= {name: flat[name] for name in flat if name.startswith("schedule.") or "embedding_size" in name}
    row["training.learning_rate"] = flat["training.learning_rate"]
    last = history[-1]
    for name in ("val/mse", "val/bits_per_dim", "val/nats_per_dim", "sample/distance"):
        if name in last:
            row[name] = last[name]
    row |= {f"rung {entry['update']}": entry["val/elbo_window"] for entry in history}
    row |= dict(_windows(model, dataset))
    for sampler in SAMPLERS:
        config = model.config.with_values({"sampler.name": sampler})
        table = deployed_table(
            config.sampler, model.schedule, dataset.spec.clip, model.config.prediction_type
        )
        count = num_samples(dataset)
        samples = generate(model.network, table, dataset.spec.shape, count, seed=_JUDGE_SEED)
        row |= {f"{name} {sampler}": found.value for name, found in distances(dataset, samples).items()}
    return row


def num_samples(dataset: Dataset) -> int:
    """As many as the training split, which the floors are taken of, has; at most 1,000 images."""
    return min(len(dataset.train), 5000 if dataset.spec.kind == "points" else 1000)


def _windows(model: TrainedModel, dataset: Dataset) -> Iterator[tuple[str, float]]:
    """The windowed ELBO over several windows, from one measurement over all of them."""
    examples = dataset.val[:512]
    clip = Evaluator(model.config, dataset).clip
    found = elbo_window(
        model.network,
        model.schedule,
        examples,
        (-10.0, 8.0),
        prediction_type=model.config.prediction_type,
        clip=clip,
    )
    moment = float(examples.double().square().mean())
    for low, high in WINDOWS:
        log_snr = np.linspace(low, high, 2001)
        a = 1.0 / (1.0 + np.exp(-log_snr))
        inside = np.interp(log_snr, found.log_snr, found.errors)
        below, above = log_snr < found.log_snr[0], log_snr > found.log_snr[-1]
        errors = np.where(below, a**2 + a * (1.0 - a) * moment, np.where(above, 1.0, inside))
        yield f"elbo [{low:g}, {high:g}]", float(0.5 * np.trapezoid(errors, log_snr))


def baselines(dataset: Dataset) -> dict[str, dict[str, Estimate]]:
    """Distances of what needs no denoiser: training data, and a Gaussian fitted to it."""
    count, train = num_samples(dataset), dataset.train[:20_000]
    flat = train.flatten(1).double()
    covariance = torch.cov(flat.T) + 1e-9 * torch.eye(flat.shape[1])
    noise = torch.randn(count, flat.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gaussian = flat.mean(dim=0) + noise @ torch.linalg.cholesky(covariance).T
    gaussian = gaussian.clamp(*dataset.spec.clip).float().reshape(count, *train.shape[1:])
    return {
        "training data": distances(dataset, train[:count]),
        "fitted Gaussian": distances(dataset, gaussian),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's, with the 95% interval of a bootstrap over the trials."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(x), size=len(x)) for _ in range(BOOTSTRAPS)]
    values = [spearmanr(x[rows], y[rows]).statistic for rows in draws if np.ptp(y[rows]) > 0.0]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(spearmanr(x, y).statistic), float(low), float(high)


def champion(table: pd.DataFrame) -> int:
    """Row of the one that tune.py chooses: of the best three by the objective the nearest to the data."""
    objective, distance = table[OBJECTIVE].to_numpy(), table["sample/distance"].to_numpy()
    finalists = np.argsort(objective)[:3]
    return int(finalists[np.argmin(distance[finalists])])


def lowest(candidate: str) -> Callable[[pd.DataFrame], int]:
    """Row of the one with the lowest figure."""
    return lambda table: int(np.argmin(table[candidate].to_numpy()))


def regret(
    table: pd.DataFrame, pick: Callable[[pd.DataFrame], int], distance: np.ndarray, floor: float
) -> tuple[float, float]:
    """Distance of the pick over the best's, less 1, nothing counted below the floor; and its 90% quantile.

    The quantile is over sweeps of half as many trials, drawn without replacement.
    """

    def of(rows: np.ndarray) -> float:
        held = np.maximum(distance[rows], floor)
        return float(held[pick(table.iloc[rows])] / held.min() - 1.0)

    rng = np.random.default_rng(0)
    halves = [of(rng.choice(len(distance), len(distance) // 2, replace=False)) for _ in range(BOOTSTRAPS)]
    return of(np.arange(len(distance))), float(np.quantile(halves, 0.9))


def reliability(table: pd.DataFrame, column: str, floor: float) -> float:
    """Share of the variance of log distances that is the configs', not the training seeds' (ICC(1)).

    No objective's correlation with the distances of single trainings can be expected above its root.
    """
    wide = table[table.groupby("trial")["seed"].transform("nunique") == NUM_SEEDS]
    values = wide.pivot(index="trial", columns="seed", values=column).to_numpy()
    values = np.log(np.maximum(values, floor))
    between = NUM_SEEDS * values.mean(axis=1).var(ddof=1)
    within = values.var(axis=1, ddof=1).mean()
    return float(max(between - within, 0.0) / (between + (NUM_SEEDS - 1) * within))


def agreement(once: pd.DataFrame, judged: list[tuple[str, str]]) -> list[str]:
    """Distances against distances, as lines of a table: other features, other samplers, other measures."""
    names = [f"{kind} {sampler}" for kind, sampler in judged]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name in names:
        cells = [f"{spearmanr(once[name], once[other]).statistic:+.2f}" for other in names]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def report(name: str, table: pd.DataFrame, dataset: Dataset) -> str:
    """The whole judgement in Markdown."""
    base = baselines(dataset)
    # Unbiased distances of real data lie about 0: below their standard error nothing can be told apart.
    floors = {kind: max(found.value, found.standard_error) for kind, found in base["training data"].items()}
    complete = table.dropna(subset=[OBJECTIVE])
    once = complete[complete["seed"] == 0]
    candidates = [
        column for column in once if column.startswith(("val/", "elbo [")) or column == "sample/distance"
    ]
    judged = [(kind, sampler) for kind in floors for sampler in SAMPLERS]
    header = "| objective | " + " | ".join(f"{kind}, {sampler}" for kind, sampler in judged) + " |"
    rule = "|---" * (len(judged) + 1) + "|"
    correlations, regrets = [header, rule], [header, rule]
    for candidate in candidates:
        cells = []
        for kind, sampler in judged:
            x, y = once[candidate].to_numpy(), once[f"{kind} {sampler}"].to_numpy()
            value, low, high = correlation(x, np.maximum(y, floors[kind]))
            cells.append(f"{value:+.2f} ({low:+.2f}..{high:+.2f})")
        correlations.append(f"| `{candidate}` | " + " | ".join(cells) + " |")
    picks = {"tune.py's champion": champion} | {f"`{name}`": lowest(name) for name in candidates}
    for label, pick in picks.items():
        cells = []
        for kind, sampler in judged:
            whole, half = regret(once, pick, once[f"{kind} {sampler}"].to_numpy(), floors[kind])
            cells.append(f"{100 * whole:.0f}% ({100 * half:.0f}%)")
        regrets.append(f"| {label} | " + " | ".join(cells) + " |")
    others = [header.replace("objective", ""), rule]
    rows = {
        "training data (the floor)": [base["training data"][kind].value for kind, _ in judged],
        "best trial": [once[f"{kind} {sampler}"].min() for kind, sampler in judged],
        "tune.py's champion": [once.iloc[champion(once)][f"{kind} {sampler}"] for kind, sampler in judged],
        "median trial (a random pick)": [once[f"{kind} {sampler}"].median() for kind, sampler in judged],
        "seeds' defaults": [
            once.loc[once["trial"] == 0, f"{kind} {sampler}"].iloc[0] for kind, sampler in judged
        ],
        "fitted Gaussian": [base["fitted Gaussian"][kind].value for kind, _ in judged],
        "trials at the floor": [
            float((once[f"{kind} {sampler}"] <= floors[kind]).sum()) for kind, sampler in judged
        ],
        "share of variance not the training seeds'": [
            reliability(complete, f"{kind} {sampler}", floors[kind]) for kind, sampler in judged
        ],
    }
    others += [
        f"| {label} | " + " | ".join(f"{value:.4g}" for value in values) + " |"
        for label, values in rows.items()
    ]
    rungs = [column for column in once if column.startswith("rung ")]
    num_updates = rungs[-1].split()[1]
    early = [
        f"| {column[5:]} | {spearmanr(once[column], once[rungs[-1]]).statistic:+.2f} |" for column in rungs
    ]
    failed = len(table) - len(complete)
    return "\n".join(
        [
            f"# What to choose a denoiser of {name} by",
            "",
            f"{len(once)} configs of {num_updates} updates, every {len(once) // 6 or 1}th of them trained "
            f"with {NUM_SEEDS} seeds; "
            f"{num_samples(dataset)} samples by each sampler at the deployed number of steps against "
            f"{len(dataset.test)} test examples; {failed} trainings diverged. Objectives are taken on the "
            f"validation split. `python -m benchmarks.objective`.",
            "",
            "## Spearman's correlation with the distance (95% bootstrap interval)",
            *correlations,
            "",
            "## Regret of the pick (90% quantile over sweeps of half as many trials)",
            "Distance over the best trial's, less 1; no distance is counted below the floor. tune.py's",
            f"champion is the one with the least `sample/distance` of the three with the least "
            f"`{OBJECTIVE}`.",
            "",
            *regrets,
            "",
            "## Distances",
            *others,
            "",
            "## How far the distances agree (Spearman over the trials)",
            *agreement(once, judged),
            "",
            "## The objective at each evaluation against its last value",
            "| updates | Spearman |",
            "|---|---|",
            *early,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--trials", type=Path)
    parser.add_argument("--name", help="of the files with the results; default: the data's")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    config = base_config(options.data, None)
    dataset = with_features(load_dataset(config.data), "auto")
    name = options.name or short_name(config.data)
    file = RESULTS / f"objective-{name}.csv"
    if options.trials is not None:
        folders = sorted(path.parent for path in options.trials.glob("*/history.json"))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
            rows = list(pool.map(judge, [options.data] * len(folders), folders))
        pd.DataFrame(rows).sort_values(["seed", "trial"]).to_csv(file, index=False)
    text = report(name, pd.read_csv(file), dataset)
    (RESULTS / f"objective-{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
