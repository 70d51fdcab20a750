"""Figures on the quality of samples: against the mean squared error, and by number of steps."""

import math
from collections.abc import Sequence
from html import escape

from scipy.stats import spearmanr

from diffusion.evaluation.sampler_choice import SamplerChoice
from diffusion.metrics import (
    AUC,
    DISTANCE,
    OBJECTIVE,
    SAMPLE_AUC,
    SAMPLE_DISTANCE,
    VAL_MSE,
)
from workflows.publishing.formatting import with_error
from workflows.sweep.report.chart import LIMITED, Chart, objective_title
from workflows.sweep.report.drawing import (
    GREY,
    Plot,
    add_points,
    new_figure,
    or_none,
    plot_of,
    set_robust_range,
)
from workflows.sweep.report.standings import Standings
from workflows.sweep.report.tables import number_table

_SAMPLER_STYLES = (("#0072b2", "circle"), ("#d55e00", "square"), ("#009e73", "diamond"), ("#cc79a7", "x"))
_MIN_FOR_CORRELATION = 5


def mse_against_quality(standings: Standings) -> Chart:
    """What the trials are judged by, against the mean squared error, with rank correlations."""
    qualities = {
        SAMPLE_DISTANCE: "sample distance",
        SAMPLE_AUC: "sample AUC",
    }
    if standings.objective_name != VAL_MSE:
        qualities = {OBJECTIVE: objective_title(standings), **qualities}
    plots: list[Plot] = []
    rows: list[tuple[str, int, str]] = []
    is_limited = False
    for metric, label in qualities.items():
        known = [
            (record, record.metrics[VAL_MSE], value)
            for record in standings.records.ranked()
            if math.isfinite(record.metrics.get(VAL_MSE, math.nan))
            and math.isfinite(
                value := record.objective
                if metric == OBJECTIVE
                else standings.sample_metrics(record.trial_id).get(metric, math.nan)
            )
        ]
        if not known:
            continue
        records, mse, values = (list(each) for each in zip(*known, strict=True))
        figure = new_figure(VAL_MSE, label, height=320)
        add_points(figure, standings, records, mse, values)
        is_limited = set_robust_range(figure, values, values) or is_limited
        figure.update_layout(showlegend=False)
        correlation = rank_correlation(mse, values)
        rows.append((label, len(known), correlation))
        plots.append(
            plot_of(figure, f"{label} by {VAL_MSE}. Rank correlation: {correlation}.", is_wide=False)
        )
    if not plots:
        return Chart("MSE against quality", [f"{VAL_MSE} was not measured."], [], [])
    notes = [
        f"If {VAL_MSE} could rank the trials, the marks would rise from left to right. It cannot be compared "
        "across schedules: a schedule that spends more steps at high noise scores lower with a worse model."
    ]
    notes += [f"Rank correlation with {label}: {text} ({count} trials)." for label, count, text in rows]
    if is_limited:
        notes.append(LIMITED)
    return Chart("MSE against quality", notes, plots, [], has_marks=True)


def sampler_quality(choice: SamplerChoice | None) -> Chart:
    """Quality of the champion's samples by the number of network evaluations, for each sampler."""
    title = "Quality by number of steps, for each sampler"
    if choice is None:
        return Chart(title, ["Not measured, since values of the sampler were given."], [], [])
    names = list(dict.fromkeys(each.name for each in choice.measured))
    evaluations = sorted({each.network_evaluations for each in choice.measured})
    plots = []
    for metric, label in ((DISTANCE, "sample distance"), (AUC, "sample AUC")):
        figure = new_figure("network evaluations per sample", label, height=340)
        for index, name in enumerate(names):
            line = [each for each in choice.measured if each.name == name]
            colour, symbol = _SAMPLER_STYLES[index % len(_SAMPLER_STYLES)]
            figure.add_scatter(
                x=[each.network_evaluations for each in line],
                y=[or_none(getattr(each, metric)) for each in line],
                error_y={"type": "data", "array": [or_none(getattr(each, f"{metric}_se")) for each in line]},
                mode="lines+markers",
                name=escape(name),
                line={"color": colour, "width": 2},
                marker={"symbol": symbol, "size": 8},
                hovertemplate=(
                    "%{fullData.name}, %{x} evaluations<br>%{y:.4g} ± %{error_y.array:.2g}<extra></extra>"
                ),
            )
        for chosen, text, symbol in (
            (choice.fast, "fast", "square-open"),
            (choice.deployed, "deployed", "circle-open"),
        ):
            if chosen is not None and math.isfinite(getattr(chosen, metric)):
                figure.add_scatter(
                    x=[chosen.network_evaluations],
                    y=[getattr(chosen, metric)],
                    mode="markers",
                    name=text,
                    marker={"symbol": symbol, "size": 18, "color": GREY, "line": {"width": 3}},
                    hovertemplate=f"{text}: {escape(str(chosen))}<extra></extra>",
                )
        figure.update_xaxes(type="log", tickvals=evaluations, ticktext=[str(each) for each in evaluations])
        text = f"{label} by network evaluations for {', '.join(names)}. Deployed: {choice.deployed}."
        plots.append(plot_of(figure, text, is_wide=False))
    rows = [
        [
            each.name,
            each.num_steps,
            each.network_evaluations,
            with_error(each.distance, each.distance_se),
            with_error(each.auc, each.auc_se),
            "deployed" if each == choice.deployed else "fast" if each == choice.fast else "",
        ]
        for each in choice.measured
    ]
    table = number_table(
        "± is one standard error.",
        ["sampler", "steps", "network evaluations", "distance", "AUC", "chosen"],
        rows,
    )
    notes = [f"{line[0].upper()}{line[1:]}." for line in choice.sentences()]
    notes.append(
        f"Lower is better. Each point is measured with {choice.num_samples:,} samples; bars are one standard "
        "error."
    )
    return Chart(title, notes, plots, [table])


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> str:
    """Spearman's rank correlation with its 95% interval, in words.

    Source of the interval: Bonett and Wright, 2000, Eq. 3.
    """
    if len(x) < _MIN_FOR_CORRELATION:
        return f"not known, as it takes {_MIN_FOR_CORRELATION} trials"
    if len(set(x)) < 2 or len(set(y)) < 2:
        return "not known, as all values are equal"
    value = float(spearmanr(x, y).statistic)
    if abs(value) > 1.0 - 1e-12:
        return f"{value:+.2f} (the same order)" if value > 0.0 else f"{value:+.2f} (the opposite order)"
    error = math.sqrt((1.0 + value**2 / 2.0) / (len(x) - 3))
    low, high = (math.tanh(math.atanh(value) + sign * 1.96 * error) for sign in (-1.0, 1.0))
    return f"{value:+.2f}, 95% interval {low:+.2f} to {high:+.2f}"
