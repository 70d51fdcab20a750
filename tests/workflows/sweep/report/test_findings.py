"""What the report says follows from the decision and the measured values."""

from dataclasses import replace

import pytest

from diffusion.evaluation.distances import Estimate
from tests.workflows.sweep.report.conftest import TEST_METRICS, Trial
from workflows.sweep.decision import Decision
from workflows.sweep.report.findings import (
    advice,
    as_good_as_real,
    does_it_copy,
    what_mse_would_pick,
    why_it_won,
)

# The distance is known well enough to tell it from the floor.
EXACT = {
    "test/sample_distance": 0.04,
    "test/sample_distance_se": 0.01,
    "test/sample_distance_floor_se": 0.01,
}


@pytest.mark.parametrize(
    ("grounds", "words"),
    [
        (
            "samples",
            "closer to the data than those of the runner-up, trial second, by both measures: sample distance "
            "lower by 0.040 ± 0.010 (4.0 standard errors) and AUC lower by 0.0200 ± 0.0040 (5.0 standard "
            "errors), with 1,234 samples of each.",
        ),
        (
            "objective",
            "its objective is lower than that of the runner-up, trial second, by 1.00 ± 0.25 nats/dim (4.0 "
            "standard errors)",
        ),
        ("copying", "the runner-up, trial second, copies training examples and it does not."),
        ("finite", "the runner-up, trial second, are not finite."),
        ("cost", "as good as the runner-up, trial second, and costs 0.5 times as much per sample"),
        ("objective within its error", "the lower one, by 1.00 ± 0.25 nats/dim (4.0 standard errors)"),
    ],
)
def test_the_reason_names_what_decided_and_by_how_much(make_sweep, grounds, words):
    sentence = why_it_won(make_sweep(grounds=grounds).standings)
    assert sentence.startswith("Trial best won because ") and words in sentence


def test_one_distance_alone_is_the_one_that_tells_them_apart(make_sweep):
    sweep = make_sweep(grounds="one distance")
    (outcome,) = sweep.champion.decision.outcomes
    outcome.comparison.distances["auc"] = Estimate(0.001, 0.004)
    sentence = why_it_won(sweep.standings)
    assert "sample distance lower by 0.040 ± 0.010" in sentence and "AUC" not in sentence


def test_a_champion_without_a_rival_is_the_only_usable_one(make_sweep):
    sweep = make_sweep({"only": Trial(1.0, 0.1), "broken": Trial(None, status="failed")})
    assert why_it_won(sweep.standings) == "Trial only won because no other trial has a usable model."


def test_a_circle_and_a_model_that_cannot_be_exported_are_said(make_sweep):
    sweep = make_sweep()
    decision = sweep.champion.decision
    (outcome,) = decision.outcomes
    circle = replace(outcome, winner="second", loser="best")
    sweep.champion = replace(
        sweep.champion, decision=Decision(decision.ranking, decision.finalists, (circle,))
    )
    assert "although trial second beats it" in why_it_won(sweep.standings)
    sweep.champion = replace(sweep.champion, trial_id="second", decision=decision)
    sentence = why_it_won(sweep.standings)
    assert sentence.startswith("Trial second won because trial best, which is better, cannot be exported")
    assert sweep.standings.runner_up == "best"


def test_the_pick_of_mse_is_named_with_its_place_and_how_much_worse_it_is(make_sweep):
    assert what_mse_would_pick(make_sweep().standings) == (
        "val/mse would have picked trial lowmse, number 3 of 4 by the objective: its objective is higher by "
        "2 nats/dim, its sample distance 0.500 ± 0.020 against 0.100 ± 0.010."
    )


def test_mse_that_picks_the_champion_or_was_not_measured_is_said(make_sweep):
    same = make_sweep({"best": Trial(1.0, 0.1), "second": Trial(2.0, 0.2)}, name="same")
    assert what_mse_would_pick(same.standings) == "val/mse would have picked the same trial, best."
    unknown = make_sweep({"best": Trial(1.0), "second": Trial(2.0)}, name="unknown")
    assert "was not measured" in what_mse_would_pick(unknown.standings)


@pytest.mark.parametrize(
    ("changes", "kind", "headline"),
    [
        ({"test/sample_auc": 0.51, **EXACT}, "good", "As good as real data by sample distance and AUC"),
        (EXACT, "bad", "As good as real data by sample distance, but not by AUC"),
        (
            {"test/sample_distance": 0.5},
            "bad",
            "Not as good as real data, neither by sample distance nor by AUC",
        ),
        ({"test/sample_auc_floor": float("nan"), **EXACT}, "good", "As good as real data by sample distance"),
        (
            {"test/sample_auc": 0.5},
            "unknown",
            "Too few samples to say whether it is as good as real data",
        ),
        (
            {"test/sample_auc": 0.5, "test/sample_auc_se": 0.0, "test/sample_auc_floor_se": 0.0, **EXACT},
            "unknown",
            "Too few samples to say whether it is as good as real data",
        ),
        ({"test/sample_distance_se": 0.5}, "bad", "Not as good as real data by AUC"),
    ],
)
def test_samples_are_as_good_as_real_data_if_they_differ_within_two_errors(changes, kind, headline):
    verdict = as_good_as_real(TEST_METRICS | changes)
    assert (verdict.kind, verdict.headline) == (kind, headline)
    assert "1,000 samples" in verdict.detail and "±" in verdict.detail


def test_without_metrics_there_is_no_verdict():
    assert as_good_as_real({}).kind == "unknown"
    assert does_it_copy({}).kind == "unknown"


def test_copying_is_said_in_words():
    assert does_it_copy(TEST_METRICS).headline == "Does not copy training examples"
    copies = TEST_METRICS | {"test/sample_copied": 0.4, "test/sample_copied_p": 1e-9}
    verdict = does_it_copy(copies)
    assert (verdict.kind, verdict.headline) == ("bad", "Copies training examples")
    assert "40.0%" in verdict.detail
    assert does_it_copy(TEST_METRICS | {"test/sample_copied_detectable": 0.5}).kind == "unknown"


def test_the_advice_follows_from_the_measurements(make_sweep):
    sweep = make_sweep()
    space = {"training.learning_rate": (1e-4, 1e-2)}
    falling, end = advice(sweep.standings, space)
    assert "still fell by 1 nats/dim" in falling and "longer than 20 updates" in falling
    assert "learning_rate, 0.0001, is at the lower end" in end
    assert advice(sweep.standings, {"training.learning_rate": (1e-5, 1e-2)}) == [falling]
    copies = {"test/sample_copied": 0.4, "test/sample_copied_p": 1e-9}
    sweep.champion = replace(sweep.champion, metrics=TEST_METRICS | copies)
    assert advice(sweep.standings, {})[0].startswith("It copies training examples: train on more data")
    sweep.records["best"].evaluations[20]["objective"] = 5.0
    assert len(advice(sweep.standings, {})) == 1, "it no longer fell"
    sweep.champion = replace(sweep.champion, metrics=TEST_METRICS)
    evaluations = sweep.records["best"].evaluations
    evaluations |= {20: {"objective": 1.0}, 30: {"objective": 1.0 - 1e-4}}
    sweep.champion = replace(sweep.champion, objective=1.0 - 1e-4)
    assert advice(sweep.standings, {}) == [], "hardly"
