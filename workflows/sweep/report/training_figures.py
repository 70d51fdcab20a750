"""Figures on the trainings: learning curves, effect and importance of parameters, and cost."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diffusion.metrics import (
    OBJECTIVE,
)
from workflows.publishing.formatting import duration, with_error
from workflows.sweep.report.chart import LIMITED, Chart, ending, objective_title
from workflows.sweep.report.drawing import (
    COLOURS,
    GREY,
    add_line,
    add_other_lines,
    add_points,
    bar_style,
    new_figure,
    parameter_axis,
    plot_of,
    roles_text,
    set_robust_range,
)
from workflows.sweep.report.importance import MIN_TRIALS, importances
from workflows.sweep.report.standings import Standings
from workflows.sweep.report.tables import number_table
from workflows.sweep.trial_records import TrialRecord


def learning_curves(standings: Standings, correlations: Mapping[int, float]) -> Chart:
    """Objective of each trial by updates."""
    evaluated = [record for record in standings.records if record.evaluations]
    figure = new_figure("updates", objective_title(standings))
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
        "Every evaluation.", ["trial", "", "status", "updates", objective_title(standings)], rows
    )
    text = f"Objective by updates of {len(evaluated)} trials. {ending(standings)}"
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
        figure = new_figure(short, objective_title(standings), height=280)
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
        notes.append(LIMITED)
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


def _objectives(record: TrialRecord) -> list[float]:
    return [record.evaluations[update][OBJECTIVE] for update in sorted(record.evaluations)]
