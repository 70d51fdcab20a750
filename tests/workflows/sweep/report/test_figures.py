"""Figures of the report: what they show and say, and that their numbers stand beside them."""

import json
import math

import pytest

from diffusion.evaluation.sampler_choice import MeasuredSampler, choose_sampler
from tests.workflows.sweep.report.conftest import SPACE, Trial
from workflows.sweep.report import quality_figures, schedule_figures, training_figures
from workflows.sweep.report.importance import importances


def traces(plot):
    return json.loads(plot.json)["data"]


def names(plot):
    return [trace.get("name") for trace in traces(plot)]


def test_the_champion_is_marked_in_every_figure_of_trials(make_sweep):
    standings = make_sweep().standings
    charts = [
        training_figures.learning_curves(standings, {}),
        training_figures.effects(standings, list(SPACE)),
        schedule_figures.schedules(standings),
        schedule_figures.error_by_log_snr(standings),
        quality_figures.mse_against_quality(standings),
        training_figures.cost(standings, 100.0),
    ]
    for chart in charts:
        assert chart.plots
        for plot in chart.plots:
            assert "champion: trial best" in names(plot), chart.title
            assert plot.text


def test_learning_curves_say_how_well_rungs_predict(make_sweep):
    standings = make_sweep().standings
    chart = training_figures.learning_curves(standings, {100: 0.5, 2000: -0.25})
    assert any("+0.50 at 100 updates, -0.25 at 2,000 updates" in note for note in chart.notes)
    assert "Too few trials" in training_figures.learning_curves(standings, {}).notes[-1]
    (table,) = chart.tables
    assert len(table.rows) == 8, "two evaluations of each of the four trials that have any"


def test_a_trial_that_ended_badly_has_no_point_and_does_not_break_figures(make_sweep):
    trials = {
        "best": Trial(1.0, 0.2),
        "nan": Trial(math.nan, math.nan, status="diverged"),
        "inf": Trial(math.inf),
    }
    standings = make_sweep(trials).standings
    for chart in (training_figures.learning_curves(standings, {}), schedule_figures.schedules(standings)):
        for plot in chart.plots:
            assert "NaN" not in plot.json and "Infinity" not in plot.json


def test_a_schedule_that_cannot_be_built_is_left_out_and_said(make_sweep):
    trials = {"best": Trial(1.0), "bad": Trial(None, status="pruned", params={"schedule.kind": "gone"})}
    chart = schedule_figures.schedules(make_sweep(trials).standings)
    assert "1 trials have a schedule that cannot be computed." in chart.notes
    assert len(chart.tables[0].rows) == 1


def test_schedules_fall_from_the_data_to_noise(make_sweep):
    chart = schedule_figures.schedules(make_sweep().standings)
    lines = [trace for trace in traces(chart.plots[0]) if trace.get("mode", "").startswith("lines")]
    assert len(lines) == 5
    for line in lines:
        assert line["x"][-1] == 1.0 and sorted(line["y"], reverse=True) == line["y"]


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], "+1.00 (the same order)"),
        ([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], "-1.00 (the opposite order)"),
        ([1, 2, 3, 4], [1, 2, 3, 4], "not known, as it takes 5 trials"),
        ([1, 2, 3, 4, 5], [1, 1, 1, 1, 1], "not known, as all values are equal"),
    ],
)
def test_rank_correlations_in_words(x, y, words):
    assert quality_figures.rank_correlation(x, y) == words


def test_a_rank_correlation_has_its_interval():
    text = quality_figures.rank_correlation([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 8, 7])
    value, low, high = (float(word.rstrip(",")) for word in text.split() if word[0] in "+-")
    assert low < value < high <= 1.0 and value == pytest.approx(0.976, abs=5e-3)


def test_mse_in_the_opposite_order_is_said(make_sweep, many):
    chart = quality_figures.mse_against_quality(make_sweep(many).standings)
    assert "Rank correlation with objective, nats/dim: -1.00 (the opposite order) (30 trials)." in chart.notes


def test_without_mse_there_is_no_figure_of_it(make_sweep):
    chart = quality_figures.mse_against_quality(
        make_sweep({"best": Trial(1.0), "second": Trial(2.0)}).standings
    )
    assert not chart.plots and chart.notes == ["val/mse was not measured."]


def test_the_parameter_that_decides_is_the_important_one(make_sweep, many):
    standings = make_sweep(many).standings
    found = importances(standings.records.ranked(), SPACE)
    assert list(found) == ["training.learning_rate", "schedule.kind"]
    first, second = found.values()
    assert first.value > 0.8 and first.value - second.value > 3 * first.standard_error
    chart = training_figures.parameter_importance(standings, SPACE)
    assert "The most important one is training.learning_rate" in chart.notes[1]


def test_importance_is_not_made_up_from_few_or_equal_trials(make_sweep, many):
    few = make_sweep(dict(list(many.items())[:9]), name="few").standings
    chart = training_figures.parameter_importance(few, SPACE)
    assert not chart.plots and "there are 9" in chart.notes[0]
    assert importances(few.records.ranked() * 2, {"schedule.kind": SPACE["schedule.kind"]}) is None


def test_samplers_have_their_choices_marked_and_their_errors():
    measured = [
        MeasuredSampler("ddpm", 20, 20, 0.3, 0.01, 0.7, 0.01),
        MeasuredSampler("ddim", 10, 10, 0.5, 0.01, 0.8, 0.01),
        MeasuredSampler("ddim", 20, 20, math.inf, math.nan, math.nan, math.nan),
    ]
    choice = choose_sampler(measured, num_samples=321)
    chart = quality_figures.sampler_quality(choice)
    assert "321 samples" in chart.notes[-1] and len(chart.plots) == 2
    for plot in chart.plots:
        assert {"ddpm", "ddim", "deployed"} <= set(names(plot)) and "NaN" not in plot.json
    assert not quality_figures.sampler_quality(None).plots


def test_many_trials_make_few_traces(make_sweep, many):
    """One for each status, not one for each trial."""
    standings = make_sweep(many).standings
    assert len(traces(training_figures.learning_curves(standings, {}).plots[0])) == 1 + len(
        standings.protagonists
    )


def test_the_axis_of_a_parameter_has_ticks_that_do_not_overlap():
    from workflows.sweep.report.drawing import parameter_axis

    axis = parameter_axis([1e-5 * 1.3**n for n in range(20)])
    assert axis["type"] == "log" and 2 <= len(axis["tickvals"]) <= 6
    assert parameter_axis([64, 128, 64])["tickvals"] == [64, 128]
    assert parameter_axis([0.5, 0.6]) == {}
