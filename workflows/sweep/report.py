"""Report of a finished sweep: report.html, a single page that needs nothing but a browser."""

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from diffusion.evaluation.sampler_choice import SamplerChoice
from diffusion.metrics import (
    AUC,
    DISTANCE,
    FLOOR,
    OBJECTIVE,
    SAMPLE_AUC,
    SAMPLE_DISTANCE,
    STANDARD_ERROR,
    VAL_ELBO_WINDOW_PAIRED_SE,
    VAL_MSE,
    VAL_SAMPLE_PREFIX,
)
from workflows.publishing.deployed_sampler import sampler_figure
from workflows.publishing.page import embedded, embedded_plot, write_page
from workflows.sweep.champion import Champion
from workflows.sweep.trial_records import TrialRecord, TrialRecords

_COLOURS = {"finished": "#0072b2", "stopped": "#e69f00", "pruned": "#999999"}
_OTHER_COLOUR = "#d55e00"


def write_report(
    directory: Path,
    records: TrialRecords,
    searched: Iterable[str],
    champion: Champion,
    correlations: Mapping[int, float],
) -> Path:
    """Write report.html into a sweep's folder and return its path.

    Pictures and plots are embedded, except the animation, which is shown from the champion's folder.

    Args:
        directory: folder of the sweep.
        records: records of the sweep's trials.
        searched: dotted names of the searched parameters.
        champion: champion of the sweep.
        correlations: rank correlation between the objectives at each rung and the final ones, by the rung's
            updates.
    """
    params = records[champion.trial_id].params
    objective, data_name, names = params["metrics.objective"], str(params["data.name"]), list(searched)
    rungs = ", ".join(f"{value:+.2f} at {rung} updates" for rung, value in correlations.items())
    body = [
        f"<h1>{escape(directory.name)}</h1>",
        f"<p>{_counts(records)}; data <code>{escape(data_name)}</code>; "
        f"ranked by <code>{objective}</code> (lower is better).</p>",
        f"<h2>Champion: trial {champion.trial_id}</h2>",
        _pictures(champion.directory),
        _why_this_model(champion, records),
        *_sampler_section(champion.samplers),
        _metrics_table(champion.metrics),
        "<h2>Trials</h2>",
        embedded_plot(_objective_curves(records, objective), "objective by updates"),
        embedded_plot(_objective_by_parameter(records, names, objective), "objective by parameter"),
        "<p class=note>Rank correlation between early and final objectives: "
        f"{rungs or 'too few trials finished to tell'}.</p>",
        embedded_plot(_objective_by_mse(records, objective), "objective by MSE"),
        "<p class=note>The mean squared error cannot be compared across schedules: a schedule that spends "
        "more steps at high noise scores lower with a worse model. It is shown for information only.</p>",
        _trials_table(records, names),
    ]
    return write_page(directory / "report.html", directory.name, body)


def _counts(records: TrialRecords) -> str:
    counts = pd.Series([record.status for record in records]).value_counts()
    return f"{len(records)} trials: " + ", ".join(f"{count} {status}" for status, count in counts.items())


def _pictures(folder: Path) -> str:
    """The champion's samples, its animation, and for images the nearest training images."""
    samples = embedded((folder / "samples.png").read_bytes(), "samples")
    animation = f"<img alt='noise becoming samples' src='{folder.name}/animation.gif'>"
    html = f"<div class=pictures>{samples} {animation}</div>"
    if (folder / "nearest.png").exists():
        pairs = embedded((folder / "nearest.png").read_bytes(), "samples and training images")
        html += f"<div>{pairs}</div><p class=note>Samples, each with the training image nearest to it.</p>"
    return html


def _why_this_model(champion: Champion, records: TrialRecords) -> str:
    """Why the champion was chosen, and what the mean squared error would have chosen."""
    lines = [f"{reason}." for reason in champion.reasons]
    by_mse = records.picked_by_mse()
    if by_mse == champion.trial_id:
        lines.append("The mean squared error would have picked the same trial.")
    elif by_mse:
        place = [record.trial_id for record in records.ranked()].index(by_mse) + 1
        confirmed = champion.confirmations.get(by_mse, {}).get(SAMPLE_DISTANCE)
        theirs = champion.confirmations[champion.trial_id].get(SAMPLE_DISTANCE, np.nan)
        distance = "" if confirmed is None else f", sample distance {confirmed:.4g} against {theirs:.4g}"
        lines.append(
            f"The mean squared error would have picked trial {by_mse}: place {place} of "
            f"{len(records.ranked())} by the objective{distance}."
        )
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h3>Why this model</h3><ul>{items}</ul>"


def _metrics_table(metrics: Mapping[str, float]) -> str:
    rows = []
    for name, value in sorted(metrics.items()):
        if name.endswith((STANDARD_ERROR, FLOOR)) or "mse_at" in name:
            continue
        error, floor = metrics.get(name + STANDARD_ERROR), metrics.get(name + FLOOR)
        cells = [
            f"{value:.4g}",
            "" if error is None else f"{error:.2g}",
            "" if floor is None else f"{floor:.4g}",
        ]
        rows.append(f"<tr><td>{name}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>metric</th><th>value</th><th>standard error</th><th>floor (real data)</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _trials_table(records: TrialRecords, names: list[str]) -> str:
    metric_names = [
        *(VAL_ELBO_WINDOW_PAIRED_SE, VAL_MSE, SAMPLE_DISTANCE, SAMPLE_AUC),
        *(VAL_SAMPLE_PREFIX + DISTANCE, VAL_SAMPLE_PREFIX + AUC),
    ]
    rows = [
        {
            "trial": record.trial_id,
            "status": record.status,
            "updates": record.updates,
            "seconds": record.seconds,
            "best update": record.best_update,
            OBJECTIVE: record.objective,
            "rank": record.rank,
            **{name: record.params[name] for name in names},
            **{name: record.metrics.get(name, np.nan) for name in metric_names},
        }
        for record in records
    ]
    table = pd.DataFrame(rows).sort_values(OBJECTIVE)
    html = table.to_html(index=False, float_format=lambda value: f"{value:.4g}", na_rep="", border=0)
    return f"<div class=wide>{html}</div>"


def _sampler_section(choice: SamplerChoice | None) -> list[str]:
    """Quality by network evaluations for each sampler; empty if it was not measured."""
    if choice is None:
        return []
    return [
        "<h3>Sampler</h3>",
        embedded_plot(sampler_figure(choice), "quality of the samples by network evaluations"),
        "<p class=note>Lower is better. Bars are one standard error; "
        f"each point is measured with {choice.num_samples} samples.</p>",
    ]


def _evaluated(records: TrialRecords) -> list[TrialRecord]:
    return [record for record in records if np.isfinite(record.objective)]


def _colour(record: TrialRecord) -> str:
    return _COLOURS.get(record.status, _OTHER_COLOUR)


def _objective_curves(records: TrialRecords, objective: str) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for record in _evaluated(records):
        updates = sorted(record.evaluations)
        values = [record.evaluations[update][OBJECTIVE] for update in updates]
        axes.plot(updates, values, color=_colour(record), marker=".", linewidth=1, alpha=0.8)
    axes.set(xlabel="updates", ylabel=objective)
    return figure


def _objective_by_parameter(records: TrialRecords, names: list[str], objective: str) -> Figure:
    evaluated = _evaluated(records)
    figure = Figure(figsize=(9, 2.6 * max(1, -(-len(names) // 3))), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 3), 3, index + 1)
        values: list[Any] = [record.params[name] for record in evaluated]
        are_numbers = all(isinstance(value, int | float) for value in values)
        axes.scatter(
            values if are_numbers else [str(value) for value in values],
            [record.objective for record in evaluated],
            c=[_colour(record) for record in evaluated],
            s=18,
        )
        if are_numbers and values and max(values) > 5 * min(values) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())  # minor labels would overlap
        axes.set_xlabel(name)
        axes.set_ylabel(objective if index % 3 == 0 else "")
    return figure


def _objective_by_mse(records: TrialRecords, objective: str) -> Figure:
    evaluated = [record for record in _evaluated(records) if VAL_MSE in record.metrics]
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(
        [record.metrics[VAL_MSE] for record in evaluated],
        [record.objective for record in evaluated],
        c=[_colour(record) for record in evaluated],
        s=18,
    )
    axes.set(xlabel=f"{VAL_MSE} (not comparable)", ylabel=objective)
    return figure
