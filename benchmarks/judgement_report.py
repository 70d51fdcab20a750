"""The report of `benchmarks.judgement`, from the tables of trials that it wrote."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffusion import metrics as names
from diffusion.evaluation.copying import copying_verdict
from diffusion.evaluation.distances import Estimate
from workflows.sweep.asha import SuccessiveHalving
from workflows.sweep.decision import (
    MAX_ROUNDS,
    TRAINING_SEED_ERRORS,
    Comparison,
    Finalist,
    choose_finalists,
    decide,
    with_training_seed,
)

FILE = Path(__file__).parent / "results" / "judgement.md"
RESULTS = FILE.with_suffix("")
_SWEEP_SIZE, _NUM_SWEEPS, _BOOTSTRAPS = 12, 400, 1000
# Of `sample/...`, what is no distance; and what is better the higher it is.
_NO_DISTANCE = (
    *("_se", "_floor", "network_evaluations", "nn_train", "nn_heldout", "copied", "copied_p"),
    *("copied_detectable", "worst_column"),
    *("num_samples", "num_reference", "num_heldout"),
)
_HIGHER_IS_BETTER = ("precision", "recall")

Pick = Callable[[pd.DataFrame], int]


def write_report() -> str:
    """Write judgement.md from every table in benchmarks/results/judgement, and return it."""
    tables = {path.stem: pd.read_csv(path) for path in sorted(RESULTS.glob("*.csv"))}
    text = "\n".join(
        [
            "# How well a sweep judges its models",
            "",
            "Written by `python -m benchmarks.judgement` from the tables of trials in `judgement/`; what is",
            "not listed here has not been measured. Configs are random ones of the default search space,",
            "each trained to its end. The truth compares samples of the deployed sampler with fresh",
            "examples that no sweep saw, by the yardsticks of `benchmarks/judgement_truth.py`.",
            "",
            *_what_was_measured(tables),
            *_positions(tables),
            *_overview(tables),
            *_training_seeds(),
            *(line for name, table in tables.items() for line in _correlations(name, table)),
        ]
    )
    FILE.write_text(text)
    return text


def truths(table: pd.DataFrame) -> pd.DataFrame:
    """The yardsticks of the trials, one a column."""
    found = table[[column for column in table if column.startswith("truth ")]]
    return found.rename(columns=lambda column: column.removeprefix("truth "))


def candidates(table: pd.DataFrame) -> pd.DataFrame:
    """Everything that trials could be ranked by, lower is better, one a column."""
    found = {}
    for column in table:
        if column in (names.VAL_ELBO_WINDOW, names.VAL_MSE) or column.startswith("elbo ["):
            found[column] = table[column]
        elif column.startswith(names.SAMPLE_PREFIX) and not column.endswith(_NO_DISTANCE):
            sign = -1.0 if column.endswith(_HIGHER_IS_BETTER) else 1.0
            found[column] = sign * table[column]
    return pd.DataFrame(found)


def positions(truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where each trial lies between the best one (0) and the median (1), by the mean of the yardsticks.

    Each yardstick counts in units of its own distance from the best to the median trial. No trial need be the
    best by all of them, so their mean is measured from its own best to its own median.

    Args:
        truth: [trials, yardsticks], lower is better.
    """
    return _from_best_to_median(_from_best_to_median(truth).mean(axis=1))


def _from_best_to_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    best, median = values.min(axis=0), np.median(values, axis=0)
    return (values - best) / (median - best)


def replay(
    curves: NDArray[np.float64], points: list[int], scheduler: SuccessiveHalving, parallel: int = 1
) -> tuple[NDArray[np.bool_], float]:
    """Run a sweep of these trials in this order.

    Args:
        curves: [trials, points] objectives.
        points: number of updates at each evaluation.
        scheduler: stops trials.
        parallel: number of trials that run at a time.

    Returns:
        [trials], which ran to their end; and the fraction of all updates that were trained.
    """
    waiting, running = list(range(len(curves))), list[int]()
    ends, place = np.zeros(len(curves), dtype=bool), np.zeros(len(curves), dtype=int)
    while waiting or running:
        while waiting and len(running) < parallel:
            running.append(waiting.pop(0))
        for trial in list(running):
            updates = points[place[trial]]
            ends[trial] = updates == points[-1]
            result = {
                "updates": updates,
                names.OBJECTIVE: curves[trial, place[trial]],
                "status": "finished" if ends[trial] else "running",
            }
            decision = scheduler.on_trial_result(None, SimpleNamespace(trial_id=str(trial)), result)
            if ends[trial] or decision == scheduler.STOP:
                running.remove(trial)
            place[trial] += 1
    trained = np.array([points[last - 1] for last in place])
    return ends, float(trained.mean() / points[-1])


def finished(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Which trials a sweep that runs them in this order, one after the other, trains to their end."""
    rungs = {int(column.split()[1]): table[column] for column in table if column.startswith("rung ")}
    points = sorted(rungs)
    curves = np.stack([rungs[updates].to_numpy() for updates in points], axis=1)
    return replay(curves, points, SuccessiveHalving(points))[0]


Distances = Callable[[str, str, int], tuple[Mapping[str, Estimate], int] | None]
"""Function (first, second, round) with the differences of the distances of two trials' samples, first minus
second, by name, and the number of samples of each; None where they have not been measured."""


def champion(table: pd.DataFrame, distances: Distances | None = None) -> int:
    """Row that tune.py ships by `workflows.sweep.decision`.

    Args:
        table: the trials.
        distances: differences as a sweep's confirmation measures them. Where there are none: one confirmation
            of each trial, with errors as of independent samples, which are larger than the paired ones, and
            without further samples; where a sweep tells two finalists apart by either, this does not.
    """
    rows = {str(trial): row for trial, (_, row) in zip(table["trial"], table.iterrows(), strict=True)}
    values = {name: row[names.VAL_ELBO_WINDOW] for name, row in rows.items()}

    kind = "image" if names.SAMPLE_PREFIX + "pixel_auc" in table else "points"

    def objective(first: str, second: str) -> Estimate:
        error = rows[first][f"paired {second}"]
        return with_training_seed(Estimate(values[first] - values[second], error), TRAINING_SEED_ERRORS[kind])

    def distance(name: str, metric: str) -> Estimate:
        column = names.SAMPLE_PREFIX + metric
        return Estimate(rows[name][column], rows[name][column + names.STANDARD_ERROR])

    def unpaired(first: str, second: str, metric: str) -> Estimate:
        one, other = distance(first, metric), distance(second, metric)
        return Estimate(one.value - other.value, math.hypot(one.standard_error, other.standard_error))

    def compare(first: str, second: str, round: int) -> Comparison:
        found = None if distances is None else distances(first, second, round)
        if found is None:
            differences = {metric: unpaired(first, second, metric) for metric in (names.DISTANCE, names.AUC)}
            found = differences, int(rows[first][names.SAMPLE_PREFIX + names.NUM_SAMPLES])
        return Comparison(objective(first, second), *found)

    best = min(values, key=lambda name: values[name])
    finalists = [
        Finalist(
            name=name,
            objective=values[name],
            distances={metric: distance(name, metric) for metric in (names.DISTANCE, names.AUC)},
            copies=copying_verdict(rows[name].to_dict()) == "copies",
            cost=rows[name][names.SAMPLE_PREFIX + names.NETWORK_EVALUATIONS] * rows[name]["parameters"],
        )
        for name in choose_finalists({name: objective(name, best) for name in rows})
    ]
    return list(rows).index(decide(finalists, compare, 0 if distances is None else MAX_ROUNDS).champion)


def recorded(pairs: pd.DataFrame) -> Distances:
    """Differences from a table of `write_pairs` of `benchmarks.judgement`.

    A round that is not in it is answered by the one before: the rule has changed since the table was written.
    """
    found: dict[tuple[str, str, int], tuple[dict[str, Estimate], int]] = {}
    for pair in pairs.to_dict("records"):
        for sign, (first, second) in ((1.0, ("first", "second")), (-1.0, ("second", "first"))):
            differences = {
                metric: Estimate(sign * pair[metric], pair[metric + names.STANDARD_ERROR])
                for metric in (names.DISTANCE, names.AUC)
            }
            key = str(pair[first]), str(pair[second]), int(pair["round"])
            found[key] = differences, int(pair[names.NUM_SAMPLES])

    def distances(first: str, second: str, round: int) -> tuple[Mapping[str, Estimate], int] | None:
        rounds = (found.get((first, second, each)) for each in range(round, -1, -1))
        return next((each for each in rounds if each is not None), None)

    return distances


def resampled_sweeps(table: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, NDArray[np.int64]]]:
    """Sweeps drawn from the trials, the same ones at each call, each with the rows that ran to their end.

    None if there are too few trials.
    """
    table = _complete(table)
    size = min(_SWEEP_SIZE, round(0.75 * len(table)))
    rng = np.random.default_rng(0)
    for _ in range(_NUM_SWEEPS if size >= 4 else 0):
        sweep = table.iloc[rng.choice(len(table), size, replace=False)].reset_index(drop=True)
        yield sweep, np.flatnonzero(finished(sweep))


def _lowest(column: str) -> Pick:
    return lambda table: int(np.argmin(table[column].to_numpy()))


_PICKS: dict[str, Pick] = {
    "the champion": champion,
    "the objective's": _lowest(names.VAL_ELBO_WINDOW),
    "`sample/distance`'s": _lowest(names.SAMPLE_DISTANCE),
    "`sample/auc`'s": _lowest(names.SAMPLE_AUC),
    "`val/mse`'s": _lowest(names.VAL_MSE),
}


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """The trials that did not diverge."""
    return table.dropna(subset=[names.VAL_ELBO_WINDOW]).reset_index(drop=True)


def _what_was_measured(tables: dict[str, pd.DataFrame]) -> list[str]:
    lines = [
        "## What was measured",
        "| data | fraction of the default updates | updates | configs | diverged | window's end | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, table in tables.items():
        data, fraction = name.rsplit("-", 1)
        updates = max(int(column.split()[1]) for column in table if column.startswith("rung "))
        end = table["window end"].iloc[0] if "window end" in table else np.nan
        lines.append(
            f"| {data} | {fraction} | {updates} | {len(table)} | {len(table) - len(_complete(table))} "
            f"| {end:.2f} | {table['seconds'].sum() / 60.0:.0f} |"
        )
    return [*lines, ""]


def _positions(tables: dict[str, pd.DataFrame]) -> list[str]:
    """Table of where the picks lie, over resampled sweeps."""
    lines = [
        "## Where the pick lies between the best and the median trial",
        "0 is the sweep's best trial by the mean of the yardsticks, each in units of its own distance from",
        "best to median trial; 1 is the median trial, what a blind draw gives. Median, and 5% to 95%, of",
        f"{_NUM_SWEEPS} sweeps drawn from the configs without replacement, in random order, with early",
        "stopping; best and median are those of all the sweep's trials, had each been trained to its end.",
        "The champion is chosen by tune.py's rule: with pairs, from the differences that its confirmation",
        "measures, further samples included; without, from each trial's own distances, whose errors are",
        "larger.",
        "",
        "| data | configs | a sweep | pairs | " + " | ".join(_PICKS) + " |",
        "|---" * (len(_PICKS) + 4) + "|",
    ]
    for name, table in tables.items():
        pairs = RESULTS / "pairs" / f"{name}.csv"
        distances = recorded(pd.read_csv(pairs)) if pairs.exists() else None
        picks = _PICKS | {"the champion": partial(champion, distances=distances)}
        found: dict[str, list[float]] = {pick: [] for pick in picks}
        size = 0
        for sweep, ends in resampled_sweeps(table):
            size, position = len(sweep), positions(truths(sweep).to_numpy())
            for label, pick in picks.items():
                found[label].append(float(position[ends[pick(sweep.iloc[ends])]]))
        if not size:
            continue
        cells = [
            "{1:.2f} ({0:.2f}..{2:.2f})".format(*np.quantile(each, [0.05, 0.5, 0.95]))
            for each in found.values()
        ]
        measured = "no" if distances is None else "yes"
        lines.append(
            f"| {name} | {len(_complete(table))} | {size} | {measured} | " + " | ".join(cells) + " |"
        )
    return [*lines, ""]


def _training_seeds() -> list[str]:
    """Standard deviations over training seeds of the preset's own config."""
    lines = [
        "## How far another training seed moves a model",
        "Standard deviation over trainings of the preset's own config that differ in their seed alone.",
        "",
        "| data | seeds | `val/elbo_window` | `sample/distance` | `sample/auc` | truth |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((RESULTS / "seeds").glob("*.csv")):
        table = _complete(pd.read_csv(path))
        spreads = table[[names.VAL_ELBO_WINDOW, names.SAMPLE_DISTANCE, names.SAMPLE_AUC]].std(ddof=1)
        of_truth = ", ".join(f"{name} {value:.2g}" for name, value in truths(table).std(ddof=1).items())
        cells = " | ".join(f"{value:.2g}" for value in spreads)
        lines.append(f"| {path.stem} | {len(table)} | {cells} | {of_truth} |")
    return [*lines, ""] if len(lines) > 5 else []


def _overview(tables: dict[str, pd.DataFrame]) -> list[str]:
    """Correlations of what a sweep chooses by with the truth, one line a table."""
    columns = (names.VAL_ELBO_WINDOW, names.SAMPLE_DISTANCE, names.SAMPLE_AUC, names.VAL_MSE)
    lines = [
        "## Spearman's correlation with the truth, in short",
        "The truth is the mean of the yardsticks as above. Of all trials, each trained to its end, with the",
        "90% interval of a bootstrap over them. `both` is the mean rank by `val/elbo_window` and",
        "`sample/auc`, by which no sweep orders its trials yet. The last column says what can be expected:",
        "the mean correlation of a single yardstick with the mean of the others. Where it is low, yardsticks",
        "look at different things, or cannot tell most models from the data, and chance orders those.",
        "",
        "| data | trials | " + " | ".join(f"`{column}`" for column in columns) + " | both | a yardstick |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for name, table in tables.items():
        table = _complete(table)
        truth = truths(table).to_numpy()
        mean = positions(truth)
        both = table[names.VAL_ELBO_WINDOW].rank() + table[names.SAMPLE_AUC].rank()
        ranked_by = [*(table[column] for column in columns), both]
        cells = [_with_interval(values.to_numpy(), mean) for values in ranked_by]
        cells.append(f"{agreement(truth):+.2f}")
        lines.append(f"| {name} | {len(table)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def agreement(truth: NDArray[np.float64]) -> float:
    """Mean Spearman correlation of each yardstick with the mean of the others: truth [trials, yardsticks]."""
    found = [
        _spearman(truth[:, column], positions(np.delete(truth, column, axis=1)))
        for column in range(truth.shape[1])
    ]
    return float(np.mean(found))


def _correlations(name: str, table: pd.DataFrame) -> list[str]:
    """Spearman's correlations of the candidates with the yardsticks, for one table of trials."""
    table = _complete(table)
    by_name = truths(table)
    truth = by_name.to_numpy()
    mean = positions(truth)
    better = by_name.rank().mean(axis=1).rank(method="first") <= len(table) / 2
    groups = {
        "all": np.ones(len(table), dtype=bool),
        "better half": better.to_numpy(),
        "finished": finished(table),
    }
    ranges = [f"{column} {each.min():.3g} to {each.max():.3g}" for column, each in by_name.items()]
    lines = [
        f"## {name}: Spearman's correlation with the truth",
        f"Best to worst trial: {', '.join(ranges)}. Cells: correlation with the mean of the yardsticks (90%",
        "interval of a bootstrap over the trials), lowest with a single one. The better half is that of the",
        "yardsticks' mean rank; finished are those that early stopping lets finish, in the order they were",
        "drawn in.",
        "",
        "| ranked by | " + " | ".join(f"{group} ({rows.sum()})" for group, rows in groups.items()) + " |",
        "|---" * (len(groups) + 1) + "|",
    ]
    for column, candidate in candidates(table).items():
        values = candidate.to_numpy()
        cells = [
            f"{_with_interval(values[rows], mean[rows])}, {_spearman(values[rows], truth[rows]).min():+.2f}"
            for rows in groups.values()
        ]
        lines.append(f"| `{column}` | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _with_interval(values: NDArray[np.float64], mean: NDArray[np.float64]) -> str:
    """Correlation with the mean of the yardsticks, and its 90% interval of a bootstrap over the trials."""
    if len(values) < 4:
        return "-"
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(values), size=len(values)) for _ in range(_BOOTSTRAPS)]
    low, high = np.nanquantile([_spearman(values[rows], mean[rows])[0] for rows in draws], [0.05, 0.95])
    return f"{_spearman(values, mean)[0]:+.2f} ({low:+.2f}..{high:+.2f})"


def _spearman(values: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlation of the ranks of values [trials] with those of truth, [trials] or [trials, yardsticks]."""
    ranks = pd.DataFrame(np.column_stack([values, truth])).rank().to_numpy()
    with np.errstate(invalid="ignore"):
        return np.corrcoef(ranks.T)[0, 1:]
