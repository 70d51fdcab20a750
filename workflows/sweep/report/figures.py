"""The report's figures, each on one question; beside each stand its numbers as a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.evaluation.sampler_choice import SamplerChoice
from diffusion.metrics import (
    AUC,
    DISTANCE,
    OBJECTIVE,
    SAMPLE_AUC,
    SAMPLE_DISTANCE,
    VAL_MSE,
    VAL_MSE_AT_LOG_SNR,
)
from workflows.publishing.formatting import duration, with_error
from workflows.sweep.report.drawing import (
    COLOURS,
    GREY,
    WORST_TO_BEST,
    Plot,
    add_line,
    add_other_lines,
    add_points,
    bar_style,
    blended,
    new_figure,
    or_none,
    parameter_axis,
    plot_of,
    roles_text,
    set_robust_range,
    trial_label,
)
from workflows.sweep.report.importance import MIN_TRIALS, importances
from workflows.sweep.report.standings import Standings
from workflows.sweep.report.tables import Table, number_table
from workflows.sweep.trial_records import TrialRecord

_SAMPLER_STYLES = (("#0072b2", "circle"), ("#d55e00", "square"), ("#009e73", "diamond"), ("#cc79a7", "x"))
_CURVE_POINTS = 48
_MIN_FOR_CORRELATION = 5
_LIMITED = "The worst trials lie above the shown range; double-click to see all."


@dataclass(frozen=True)
class Chart:
    """Plots on one question, with what they say and their numbers.

    Attributes:
        title: what they are about.
        notes: how to read them and what they show, in sentences.
        plots: the plots; none if there is too little to plot, which a note says.
        tables: the numbers of the plots.
        has_marks: whether the plots show trials by marks without a legend of their own.
    """

    title: str
    notes: list[str]
    plots: list[Plot]
    tables: list[Table]
    has_marks: bool = False


def learning_curves(standings: Standings, correlations: Mapping[int, float]) -> Chart:
    """Objective of each trial by updates."""
    evaluated = [record for record in standings.records if record.evaluations]
    figure = new_figure("updates", _objective_title(standings))
    others = [record for record in evaluated if not standings.roles(record.trial_id)]
    add_other_lines(figure, [(each, sorted(each.evaluations), _objectives(each)) for each in others])
    for record in reversed(standings.protagonists):
        add_line(figure, standings, record, sorted(record.evaluations), _objectives(record))
    final = [record.objective for record in standings.records.ranked()]
    later = [value for record in standings.protagonists for value in _objectives(record)[1:]]
    everything = [value for record in evaluated for value in _objectives(record)]
    is_limited = set_robust_range(figure, [*final, *later], everything)
    notes = ["The marks are evaluations. Lower is better."]
    if is_limited:
        notes.append("Early and failed evaluations lie above the shown range; double-click to see all.")
    if correlations:
        values = ", ".join(f"{value:+.2f} at {update:,} updates" for update, value in correlations.items())
        notes.append(f"Rank correlation between objectives at a rung and the final ones: {values}.")
    else:
        notes.append("Too few trials finished to tell how well early objectives predict the final ones.")
    rows = [
        [
            record.trial_id,
            roles_text(standings, record),
            record.status,
            update,
            record.evaluations[update][OBJECTIVE],
        ]
        for record in standings.ordered
        for update in sorted(record.evaluations)
    ]
    table = number_table(
        "Every evaluation.", ["trial", "", "status", "updates", _objective_title(standings)], rows
    )
    text = f"Objective by updates of {len(evaluated)} trials. {_ending(standings)}"
    return Chart("Learning curves", notes, [plot_of(figure, text, is_wide=True)], [table])


def effects(standings: Standings, names: Sequence[str]) -> Chart:
    """Objective by the value of each searched parameter."""
    title, usable = "Effect of each parameter", standings.records.ranked()
    if not names:
        return Chart(title, ["Nothing was searched."], [], [])
    if len(usable) < 2:
        return Chart(title, ["A single trial with a usable model shows no effect."], [], [])
    objectives = [record.objective for record in usable]
    plots, is_limited = [], False
    for name in names:
        short = name.rsplit(".", 1)[-1]
        figure = new_figure(short, _objective_title(standings), height=280)
        values: list[Any] = [record.params.get(name) for record in usable]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        shown = [value if numeric else escape(str(value)) for value in values]
        add_points(figure, standings, usable, shown, objectives)
        is_limited = set_robust_range(figure, objectives, objectives)
        if numeric and values:
            figure.update_xaxes(**parameter_axis(values))
        figure.update_layout(showlegend=False)
        best = standings.records[standings.champion.trial_id].params.get(name)
        plots.append(plot_of(figure, f"Objective by {name}. The champion has {best}.", is_wide=False))
    notes = [
        "Each mark is a trial with a usable model. Lower is better. Hover for its name; the numbers are in "
        "the table of all trials."
    ]
    if is_limited:
        notes.append(_LIMITED)
    return Chart(title, notes, plots, [], has_marks=True)


def parameter_importance(standings: Standings, space: Mapping[str, tuple[Any, ...]]) -> Chart:
    """Share of the order of the trials that each searched parameter explains."""
    usable = standings.records.ranked()
    found = importances(usable, space)
    title = "Importance of each parameter"
    if found is None:
        reason = (
            f"It takes {MIN_TRIALS} trials with a usable model to tell; there are {len(usable)}."
            if len(usable) < MIN_TRIALS
            else "Not known: the trials do not differ in at least two parameters and in their objectives."
        )
        return Chart(title, [reason], [], [])
    names = list(found)[::-1]
    figure = new_figure("share of the variance of the trials' places", height=120 + 34 * len(names))
    figure.add_bar(
        orientation="h",
        x=[found[name].value for name in names],
        y=[escape(name.rsplit(".", 1)[-1]) for name in names],
        error_x={"type": "data", "array": [found[name].standard_error for name in names], "color": GREY},
        marker_color=COLOURS["mse"],
        hovertemplate="%{y}: %{x:.2f} ± %{error_x.array:.2f}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(rangemode="tozero")
    first, clear = next(iter(found)), [n for n, e in found.items() if e.value > 2.0 * e.standard_error]
    rows = [[name, with_error(each.value, each.standard_error)] for name, each in found.items()]
    notes = [
        f"By fANOVA over {len(usable)} trials: the share of the variance of their places by the objective "
        "that each parameter explains alone. Lines are one standard error, by the bootstrap over trials.",
        f"The most important one is {first}; {len(clear)} of {len(found)} exceed two standard errors.",
    ]
    table = number_table("Importance ± its standard error.", ["parameter", "share"], rows)
    return Chart(title, notes, [plot_of(figure, notes[1], is_wide=True)], [table])


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
    text = f"Log-SNR by timestep of {len(rows)} noise schedules. {_ending(standings)}"
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
    text = f"Mean squared error by log-SNR of {len(curves)} trials. {_ending(standings)}"
    return Chart(title, notes, [plot_of(figure, text, is_wide=True)], [table])


def mse_against_quality(standings: Standings) -> Chart:
    """What the trials are judged by, against the mean squared error, with rank correlations."""
    qualities = {
        SAMPLE_DISTANCE: "sample distance",
        SAMPLE_AUC: "sample AUC",
    }
    if standings.objective_name != VAL_MSE:
        qualities = {OBJECTIVE: _objective_title(standings), **qualities}
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
        notes.append(_LIMITED)
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


def cost(standings: Standings, elapsed: float) -> Chart:
    """Time that each trial took, best trial first.

    Args:
        standings: the trials.
        elapsed: seconds that the whole sweep took.
    """
    ordered = standings.ordered
    figure = new_figure("trial, best first", "minutes")
    for style in dict.fromkeys(bar_style(standings, record) for record in ordered):
        name, colour, pattern = style
        shown = [(i, r) for i, r in enumerate(ordered, start=1) if bar_style(standings, r) == style]
        figure.add_bar(
            x=[index for index, _ in shown],
            y=[record.seconds / 60.0 for _, record in shown],
            name=name,
            marker={
                "color": colour,
                "pattern": {"shape": pattern, "fgcolor": "#ffffff", "fillmode": "overlay"},
            },
            customdata=[
                [
                    escape(record.trial_id),
                    escape(record.status),
                    duration(record.seconds),
                    f"{record.updates:,}",
                ]
                for _, record in shown
            ],
            hovertemplate=(
                "trial %{customdata[0]}, %{customdata[1]}<br>%{customdata[2]} for %{customdata[3]} updates"
                "<extra></extra>"
            ),
        )
    figure.update_layout(barmode="overlay", bargap=0.2)
    figure.update_xaxes(tickformat="d", dtick=max(1, len(ordered) // 12))
    total = sum(record.seconds for record in ordered)
    notes = [
        f"The sweep took {duration(elapsed)} up to this page, with the comparison of finalists. The "
        f"times of its trials, of which several can run at once, add up to {duration(total)}; the champion's "
        f"took {duration(standings.records[standings.champion.trial_id].seconds)}."
    ]
    rows = [
        [
            record.trial_id,
            roles_text(standings, record),
            record.status,
            record.seconds,
            record.updates,
            1000.0 * record.seconds / record.updates if record.updates else None,
        ]
        for record in ordered
    ]
    table = number_table(
        "Measured once, without error.",
        ["trial", "", "status", "seconds", "updates", "seconds per 1,000 updates"],
        rows,
    )
    text = f"Minutes that each of {len(ordered)} trials took. {notes[0]}"
    return Chart("Cost", notes, [plot_of(figure, text, is_wide=True)], [table])


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


def _objectives(record: TrialRecord) -> list[float]:
    return [record.evaluations[update][OBJECTIVE] for update in sorted(record.evaluations)]


def _objective_title(standings: Standings) -> str:
    return f"objective, {standings.unit}" if standings.unit else f"objective: {standings.objective_name}"


def _ending(standings: Standings) -> str:
    roles = "; ".join(trial_label(standings, record) for record in standings.protagonists)
    return f"Marked are the {roles}. The numbers are in the table below."
