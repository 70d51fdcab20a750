"""A sweep on one page: report.html, which needs nothing but a browser."""

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from diffusion.files import replacing
from workflows.champion import Champion
from workflows.records import TrialRecord, TrialRecords

_COLOURS = {"finished": "#0072b2", "stopped": "#e69f00", "pruned": "#999999"}
_OTHER_COLOUR = "#d55e00"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; vertical-align: top; margin: .3rem 0 } .wide { overflow-x: auto }
.pictures img { max-height: 26rem } p.note { color: #666 }
"""


def write_report(
    directory: Path,
    records: TrialRecords,
    searched: Iterable[str],
    champion: Champion,
    correlations: Mapping[int, float],
) -> Path:
    """Write report.html into a sweep's folder; the animation is shown from the champion's folder beside it.

    Args:
        directory: of the sweep.
        records: of its trials.
        searched: dotted names of what was searched.
        champion: of the sweep.
        correlations: of the objectives at each rung with the last ones, by updates.
    """
    objective = records[champion.trial_id].params["metrics.objective"]
    names, data = list(searched), str(records[champion.trial_id].params["data.name"])
    rungs = ", ".join(f"{value:+.2f} at {rung} updates" for rung, value in correlations.items())
    body = [
        f"<h1>{escape(directory.name)}</h1>",
        f"<p>{_counts(records)}; data <code>{escape(data)}</code>; "
        f"judged by <code>{objective}</code> (lower is better).</p>",
        f"<h2>Champion: trial {champion.trial_id}</h2>",
        _pictures(champion.directory),
        _figures(champion.metrics),
        "<h2>Trials</h2>",
        _picture(_curves(records, objective), "objective by updates"),
        _picture(_parameters(records, names, objective), "objective by parameter"),
        "<p class=note>Rank correlation of early objectives with the last ones: "
        f"{rungs or 'too few trials finished to say'}.</p>",
        _picture(_against_mse(records, objective), "objective against MSE"),
        "<p class=note>The mean squared error cannot be compared across schedules: one that spends more "
        "steps at high noise scores lower with a worse model. It is shown, and decides nothing.</p>",
        _table(records, names),
    ]
    path = directory / "report.html"
    with replacing(path) as part:
        part.write_text(
            f"<!doctype html><meta charset=utf-8><title>{escape(directory.name)}</title>"
            f"<style>{_STYLE}</style>{''.join(body)}\n"
        )
    return path


def _counts(records: TrialRecords) -> str:
    counts = pd.Series([record.status for record in records]).value_counts()
    return f"{len(records)} trials: " + ", ".join(f"{count} {status}" for status, count in counts.items())


def _pictures(folder: Path) -> str:
    drawn = _embedded((folder / "samples.png").read_bytes(), "samples")
    moving = f"<img alt='noise becoming samples' src='{folder.name}/animation.gif'>"
    html = f"<div class=pictures>{drawn} {moving}</div>"
    if (folder / "nearest.png").exists():
        pairs = _embedded((folder / "nearest.png").read_bytes(), "samples and training images")
        html += f"<div>{pairs}</div><p class=note>Samples, each with the training image nearest to it.</p>"
    return html


def _figures(metrics: Mapping[str, float]) -> str:
    rows = []
    for name, value in sorted(metrics.items()):
        if name.endswith(("_se", "_floor")) or "mse_at" in name:
            continue
        error, floor = metrics.get(f"{name}_se"), metrics.get(f"{name}_floor")
        cells = [
            f"{value:.4g}",
            "" if error is None else f"{error:.2g}",
            "" if floor is None else f"{floor:.4g}",
        ]
        rows.append(f"<tr><td>{name}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>figure</th><th>value</th><th>standard error</th><th>floor: real data</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _table(records: TrialRecords, names: list[str]) -> str:
    columns = ["val/elbo_window_paired_se", "val/mse", "sample/distance", "val/confirmed_distance"]
    rows = [
        {
            "trial": record.trial_id,
            "status": record.status,
            "updates": record.updates,
            "seconds": record.seconds,
            "objective": record.objective,
            **{name: record.params[name] for name in names},
            **{name: record.metrics.get(name, np.nan) for name in columns},
        }
        for record in records
    ]
    table = pd.DataFrame(rows).sort_values("objective")
    html = table.to_html(index=False, float_format=lambda value: f"{value:.4g}", na_rep="", border=0)
    return f"<div class=wide>{html}</div>"


def _evaluated(records: TrialRecords) -> list[TrialRecord]:
    return [record for record in records if np.isfinite(record.objective)]


def _colour(record: TrialRecord) -> str:
    return _COLOURS.get(record.status, _OTHER_COLOUR)


def _curves(records: TrialRecords, objective: str) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for record in _evaluated(records):
        updates = sorted(record.evaluations)
        values = [record.evaluations[each]["objective"] for each in updates]
        axes.plot(updates, values, color=_colour(record), marker=".", linewidth=1, alpha=0.8)
    axes.set(xlabel="updates", ylabel=objective)
    return figure


def _parameters(records: TrialRecords, names: list[str], objective: str) -> Figure:
    shown = _evaluated(records)
    figure = Figure(figsize=(9, 2.6 * max(1, -(-len(names) // 3))), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 3), 3, place + 1)
        values: list[Any] = [record.params[name] for record in shown]
        numbers = all(isinstance(value, int | float) for value in values)
        axes.scatter(
            values if numbers else [str(value) for value in values],
            [record.objective for record in shown],
            c=[_colour(record) for record in shown],
            s=18,
        )
        if numbers and values and max(values) > 5 * min(values) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())  # their labels would cover each other
        axes.set_xlabel(name)
        axes.set_ylabel(objective if place % 3 == 0 else "")
    return figure


def _against_mse(records: TrialRecords, objective: str) -> Figure:
    shown = [record for record in _evaluated(records) if "val/mse" in record.metrics]
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(
        [record.metrics["val/mse"] for record in shown],
        [record.objective for record in shown],
        c=[_colour(record) for record in shown],
        s=18,
    )
    axes.set(xlabel="val/mse (not comparable)", ylabel=objective)
    return figure


def _picture(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _embedded(buffer.getvalue(), title)


def _embedded(png: bytes, title: str) -> str:
    return f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
