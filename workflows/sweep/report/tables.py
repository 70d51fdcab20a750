"""Tables of the report: the models side by side, all trials, the champion's parameters and metrics."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusion.evaluation.copying import copying_verdict
from diffusion.evaluation.distances import Estimate
from diffusion.metrics import (
    COPIED,
    FLOOR,
    NETWORK_EVALUATIONS,
    NUM_SAMPLES,
    SAMPLE_AUC,
    SAMPLE_DISTANCE,
    SAMPLE_PREFIX,
    STANDARD_ERROR,
    VAL_MSE,
    VAL_MSE_AT_LOG_SNR,
    VAL_PREFIX,
)
from workflows.cli.search_space import format_values, is_range
from workflows.publishing.formatting import MISSING, duration, with_error
from workflows.sweep.report.standings import ROLE_NAMES, Role, Standings, estimate
from workflows.sweep.trial_records import TrialRecord

_COPYING_WORDS = {"copies": "copies", "no sign": "no sign", "too little data": "too little data to say"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what is shown.
        value: what the column is sorted by; empty sorts last.
        detail: a second line, smaller.
    """

    text: str
    value: str | float = ""
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: what its head shows.
        note: what it means.
        is_text: whether its cells are words, not numbers.
    """

    title: str
    note: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names the row.

    Attributes:
        caption: what it shows.
        columns: its columns.
        rows: its rows, as many cells as there are columns.
    """

    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class TrialRow:
    """A trial in the leaderboard.

    Attributes:
        record: its record.
        roles: the parts that it plays.
        cells: its cells, after those of the picture and of its name.
    """

    record: TrialRecord
    roles: list[Role]
    cells: list[Cell]


def number_table(caption: str, titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """A table of plain values; floats have four significant digits, None an empty cell."""
    return Table(
        caption,
        [Column(title) for title in titles],
        [[Cell("" if value is None else _plain(value)) for value in row] for row in rows],
    )


def side_by_side(standings: Standings) -> Table:
    """The champion, the choice of the mean squared error and the runner-up, measure by measure."""
    records = standings.protagonists
    ids = [record.trial_id for record in records]
    samples = [standings.sample_metrics(each) for each in ids]
    sizes = [standings.network_size(each) for each in ids]
    unit = f", {standings.unit}" if standings.unit else ""
    titles = [f"{_role_text(standings.roles(each))}: trial {each}" for each in ids]
    confirmed = samples[0]

    def measured(label: str, cells: Iterable[str], real: str = "") -> list[Cell]:
        return [Cell(label), *map(Cell, cells), Cell(real)]

    def of_samples(label: str, name: str) -> list[Cell]:
        values = [_value(estimate(each, name)) for each in samples]
        return measured(label, values, _value(estimate(confirmed, name + FLOOR), ""))

    differences = ["" if each == ids[0] else _value(standings.objective_from_champion(each)) for each in ids]
    rows = [
        measured("place among the finalists", [_text(_rank(standings, each), "no finalist") for each in ids]),
        measured(
            f"objective ({standings.objective_name}{unit})",
            [_value(standings.objective(each)) for each in ids],
        ),
        measured(
            f"objective, difference from the champion{' (' + standings.unit + ')' if unit else ''}",
            differences,
        ),
        of_samples("sample distance", SAMPLE_DISTANCE),
        of_samples("sample AUC (0.5 is best)", SAMPLE_AUC),
        measured("copies training examples", [_copying(each) for each in samples]),
        measured(
            "samples three times closer to one training example than to the next",
            [_percent(each.get(SAMPLE_PREFIX + COPIED)) for each in samples],
            _percent(confirmed.get(SAMPLE_PREFIX + COPIED + FLOOR), ""),
        ),
        measured(f"{VAL_MSE} (not comparable)", [_value(_mse(record)) for record in records]),
        measured(
            "samples measured", [_text(_count(each.get(SAMPLE_PREFIX + NUM_SAMPLES))) for each in samples]
        ),
        measured(
            "network evaluations per sample",
            [_text(_count(each.get(SAMPLE_PREFIX + NETWORK_EVALUATIONS))) for each in samples],
        ),
        measured("parameters of the network", [_text(_count(size)) for size in sizes]),
        measured("weights of update", [f"{record.best_update:,}" for record in records]),
        measured("training time", [duration(record.seconds) for record in records]),
    ]
    known = [row for row in rows if any(cell.text not in ("", MISSING) for cell in row[1:])]
    columns = [Column("measure", is_text=True), *map(Column, titles), Column("real data")]
    caption = (
        "Lower is better for objective, distance, AUC and MSE. ± is one standard error. Distance, AUC and "
        "MSE have no unit."
    )
    return Table(caption, columns, known)


def leaderboard(standings: Standings, names: list[str]) -> tuple[list[Column], list[TrialRow]]:
    """All trials, best first, with what decides in the first columns.

    Args:
        standings: the trials.
        names: dotted names of the searched parameters.

    Returns:
        The columns after those of the picture and of the trial's name, and the rows.
    """
    unit = f" ({standings.unit})" if standings.unit else ""
    columns = [
        Column("place", "finalists by the rule for the champion, the others by their objective"),
        Column(
            f"objective{unit}",
            f"{standings.objective_name}; lower is better. Below it the difference from the champion ± its "
            "standard error, on the same examples and noise",
        ),
        Column(
            "sample distance", "kernel distance of the samples to the data; lower is better, real data have 0"
        ),
        Column("sample AUC", "how well a classifier tells samples from data; 0.5 not at all, 1 always"),
        Column("status", "how the trial ended", is_text=True),
        *(Column(name.rsplit(".", 1)[-1], name) for name in names),
        Column(VAL_MSE, "mean squared error of the noise; not comparable across schedules"),
        Column("time", "from start to end; below it the updates of the weights that the model has"),
    ]
    return columns, [_trial_row(standings, record, names) for record in standings.ordered]


def parameters(standings: Standings, space: Mapping[str, tuple[Any, ...]]) -> Table:
    """The champion's parameters: the searched ones first, with what was searched."""
    params = standings.records[standings.champion.trial_id].params
    rows = [
        [
            Cell(name),
            Cell(_plain(params.get(name))),
            Cell(f"{values[0]:g} to {values[-1]:g}" if is_range(name) else format_values(values)),
        ]
        for name, values in space.items()
    ]
    columns = [Column("parameter", is_text=True), Column("champion"), Column("searched", is_text=True)]
    return Table("What was searched.", columns, rows)


def fixed_parameters(standings: Standings, space: Mapping[str, tuple[Any, ...]]) -> Table:
    """The champion's other parameters, which all trials have in common."""
    params = standings.records[standings.champion.trial_id].params
    rows = [[Cell(name), Cell(_plain(value))] for name, value in params.items() if name not in space]
    columns = [Column("parameter", is_text=True), Column("value", is_text=True)]
    return Table("The same in all trials.", columns, rows)


def metrics(values: Mapping[str, float]) -> Table:
    """All metrics of the champion with their standard errors and floors."""
    rows = []
    for name, value in sorted(values.items()):
        if name.endswith((STANDARD_ERROR, FLOOR)) or VAL_MSE_AT_LOG_SNR.removeprefix(VAL_PREFIX) in name:
            continue
        floor = estimate(values, name + FLOOR)
        error = values.get(name + STANDARD_ERROR)
        rows.append([Cell(name), Cell(with_error(value, error)), Cell(_value(floor, ""))])
    columns = [Column("metric", is_text=True), Column("value ± standard error"), Column("floor (real data)")]
    return Table(
        "val/... on the validation split with fresh seeds, test/... once on the test split.", columns, rows
    )


def _trial_row(standings: Standings, record: TrialRecord, names: list[str]) -> TrialRow:
    trial_id = record.trial_id
    difference = Estimate(math.nan, math.nan)
    is_usable = standings.place_by_objective(trial_id) is not None
    if is_usable and trial_id != standings.champion.trial_id:
        difference = standings.objective_from_champion(trial_id)
    cells = [
        _cell(standings.ordered.index(record) + 1 if is_usable else None),
        _cell(standings.objective(trial_id).value, detail=_signed(difference)),
        *(_measured_cell(standings, trial_id, name) for name in (SAMPLE_DISTANCE, SAMPLE_AUC)),
        Cell(record.status, record.status, record.reason),
        *(_cell(record.params.get(name), digits=3) for name in names),
        _cell(record.metrics.get(VAL_MSE), digits=3),
        Cell(
            duration(record.seconds), record.seconds, f"{record.best_update:,} upd." if record.updates else ""
        ),
    ]
    return TrialRow(record, standings.roles(trial_id), cells)


def _measured_cell(standings: Standings, trial_id: str, name: str) -> Cell:
    """A metric of a trial's samples with its error; with a star if it was not confirmed."""
    found = estimate(standings.sample_metrics(trial_id), name)
    star = "" if standings.is_confirmed(trial_id) else "*"
    value, _, error = _value(found, "").partition(" ± ")
    if not value:
        return Cell("")
    return Cell(value if error else value + star, found.value, f"± {error}{star}" if error else "")


def _cell(value: Any, detail: str = "", digits: int = 4) -> Cell:
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return Cell("")
    return Cell(_plain(value, digits), value if isinstance(value, int | float) else str(value), detail)


def _plain(value: Any, digits: int = 4) -> str:
    """A value of a parameter or metric in a few characters, floats with so many significant digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, list | tuple):
        return format_values(value)
    return str(value)


def _rank(standings: Standings, trial_id: str) -> int | None:
    ranking = standings.champion.decision.ranking
    return ranking.index(trial_id) + 1 if trial_id in ranking else None


def _role_text(roles: Iterable[Role]) -> str:
    return " and ".join(ROLE_NAMES[role] for role in roles)


def _copying(metrics: Mapping[str, float]) -> str:
    return _COPYING_WORDS[copying_verdict(metrics)] if SAMPLE_PREFIX + COPIED in metrics else MISSING


def _mse(record: TrialRecord) -> Estimate:
    return estimate(record.metrics, VAL_MSE)


def _value(value: Estimate, missing: str = MISSING) -> str:
    return with_error(value.value, value.standard_error, missing)


def _percent(value: float | None, missing: str = MISSING) -> str:
    return missing if value is None else f"{100.0 * value:.1f}%"


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _text(value: object, missing: str = MISSING) -> str:
    return missing if value is None else str(value)


def _signed(value: Estimate) -> str:
    text = _value(value, "")
    return f"+{text}" if value.value > 0.0 else text
