"""Figures on the noise schedules: log-SNR by timestep, and the error by log-SNR."""

import math
from html import escape
from typing import Any

import numpy as np

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.metrics import (
    VAL_MSE_AT_LOG_SNR,
)
from workflows.sweep.report.chart import Chart, ending
from workflows.sweep.report.drawing import (
    GREY,
    WORST_TO_BEST,
    add_line,
    add_other_lines,
    blended,
    new_figure,
    plot_of,
    roles_text,
    trial_label,
)
from workflows.sweep.report.standings import Standings
from workflows.sweep.report.tables import number_table
from workflows.sweep.trial_records import TrialRecord

_CURVE_POINTS = 48


def schedules(standings: Standings) -> Chart:
    """Log-SNR of each trial's noise schedule by timestep, coloured by the trial's place."""
    ranked = [record.trial_id for record in standings.records.ranked()]
    figure = new_figure("t / T", "log-SNR (nats)")
    rows: list[list[Any]] = []
    failures = 0
    for record in reversed(standings.ordered):
        curve = _log_snr_curve(record)
        if curve is None:
            failures += 1
            continue
        times, log_snr, params = curve
        rows.insert(0, [record.trial_id, roles_text(standings, record), *params, log_snr[0], log_snr[-1]])
        if standings.roles(record.trial_id):
            continue
        is_ranked = record.trial_id in ranked
        quality = 1.0 - ranked.index(record.trial_id) / max(1, len(ranked) - 1) if is_ranked else 0.0
        figure.add_scatter(
            x=times,
            y=log_snr,
            mode="lines",
            line={
                "color": blended(quality) if is_ranked else GREY,
                "width": 1.5,
                "dash": "solid" if is_ranked else "dot",
            },
            name=escape(trial_label(standings, record)),
            hovertemplate="%{fullData.name}<br>t/T %{x:.2f}, log-SNR %{y:.2f}<extra></extra>",
            showlegend=False,
        )
    for record in reversed(standings.protagonists):
        curve = _log_snr_curve(record)
        if curve is not None:
            add_line(figure, standings, record, curve[0], curve[1], every=8)
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={
            "colorscale": [list(stop) for stop in WORST_TO_BEST],
            "cmin": 0.0,
            "cmax": 1.0,
            "color": [0.0],
            "showscale": True,
            "colorbar": {
                "tickvals": [0.0, 1.0],
                "ticktext": ["worst", "best"],
                "title": {"text": "by objective", "side": "right"},
                "thickness": 12,
            },
        },
        showlegend=False,
        hoverinfo="skip",
    )
    notes = [
        "log-SNR is log(alphas_cumprod / (1 - alphas_cumprod)): high where x_t is nearly the data, low where "
        "it is nearly noise. "
        "Lines are coloured by the trial's place by the objective, dotted grey if it has no model."
    ]
    if failures:
        notes.append(f"{failures} trials have a schedule that cannot be computed.")
    table = number_table(
        "The schedules, best trial first.",
        ["trial", "", "kind", "T", "beta_start", "beta_end", "log-SNR at t = 1", "log-SNR at T"],
        rows,
    )
    text = f"Log-SNR by timestep of {len(rows)} noise schedules. {ending(standings)}"
    return Chart("Noise schedules", notes, [plot_of(figure, text, is_wide=True)], [table])


def error_by_log_snr(standings: Standings) -> Chart:
    """Mean squared error of the noise by log-SNR, which can be compared across schedules."""
    curves = {record.trial_id: _errors_by_log_snr(record) for record in standings.ordered}
    curves = {trial_id: curve for trial_id, curve in curves.items() if curve}
    title = "Error by log-SNR"
    if not curves:
        return Chart(title, ["It was not measured."], [], [])
    figure = new_figure("log-SNR (nats)", "MSE of the noise")
    add_other_lines(
        figure,
        [
            (standings.records[trial_id], list(curve), list(curve.values()))
            for trial_id, curve in curves.items()
            if not standings.roles(trial_id)
        ],
    )
    for record in reversed(standings.protagonists):
        curve = curves.get(record.trial_id, {})
        add_line(figure, standings, record, list(curve), list(curve.values()))
    points = sorted({point for curve in curves.values() for point in curve})
    rows = [
        [trial_id, roles_text(standings, standings.records[trial_id]), *(curve.get(p) for p in points)]
        for trial_id, curve in curves.items()
    ]
    notes = [
        "At equal log-SNR the error can be compared across schedules, unlike its mean over timesteps. "
        "Low log-SNR is nearly pure noise. Lower is better; standard errors are not measured point by point."
    ]
    table = number_table(
        "MSE of the noise, no unit, by log-SNR.", ["trial", "", *(f"{point:g}" for point in points)], rows
    )
    text = f"Mean squared error by log-SNR of {len(curves)} trials. {ending(standings)}"
    return Chart(title, notes, [plot_of(figure, text, is_wide=True)], [table])


def _log_snr_curve(record: TrialRecord) -> tuple[list[float], list[float], list[Any]] | None:
    """Log-SNR of a trial's schedule at some of its timesteps as fractions of T, and its parameters."""
    values = {name: value for name, value in record.params.items() if name.startswith("schedule.")}
    try:
        config = Config().with_values(values | {"network.prediction_type": "v_prediction"}).schedule
        log_snr = config.build().log_snr
    except (InputError, ValueError):
        return None
    count = len(log_snr)
    indices = np.unique(np.linspace(0, count - 1, min(count, _CURVE_POINTS)).round().astype(int))
    finite = [index for index in indices if math.isfinite(log_snr[index])]
    if not finite:
        return None
    betas = [config.beta_start, config.beta_end] if config.uses_betas else [None, None]
    params = [config.kind, config.num_train_timesteps, *betas]
    return [(i + 1) / count for i in finite], [float(log_snr[i]) for i in finite], params


def _errors_by_log_snr(record: TrialRecord) -> dict[float, float]:
    found = {
        float(name.removeprefix(VAL_MSE_AT_LOG_SNR)): value
        for name, value in record.metrics.items()
        if name.startswith(VAL_MSE_AT_LOG_SNR) and math.isfinite(value)
    }
    return dict(sorted(found.items()))
