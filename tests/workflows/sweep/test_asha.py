"""Early stopping at rungs whose objectives predict the final ones."""

from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from workflows.sweep.asha import SuccessiveHalving, make_scheduler

POINTS = [100, 200, 300, 400, 500, 600, 700, 800]


def report_result(scheduler, trial_id, updates, objective, status="running"):
    result = {"updates": updates, "objective": objective, "status": status}
    return scheduler.on_trial_result(None, SimpleNamespace(trial_id=trial_id), result)


def at_once(points):
    """Stops trials at rungs of which nothing is known, too."""
    return make_scheduler("eager", points)


def test_rungs_double_and_the_end_of_training_is_not_a_rung():
    scheduler = at_once(POINTS)
    for updates in POINTS:
        report_result(scheduler, "a", updates, 1.0)
    assert [report_result(scheduler, "b", updates, 2.0) for updates in POINTS] == [
        TrialScheduler.STOP if updates in (100, 200, 400) else TrialScheduler.CONTINUE for updates in POINTS
    ]


def test_a_single_evaluation_stops_no_trial():
    scheduler = SuccessiveHalving([50])
    assert [report_result(scheduler, name, 50, value) for name, value in (("a", 1.0), ("b", 9.0))] == [
        TrialScheduler.CONTINUE
    ] * 2


def test_of_many_trials_the_better_half_continues():
    values = np.random.default_rng(0).permutation(1000).astype(float)
    scheduler = at_once(POINTS)
    decisions = [report_result(scheduler, str(number), 100, value) for number, value in enumerate(values)]
    continued = [
        value
        for value, decision in zip(values, decisions, strict=True)
        if decision == TrialScheduler.CONTINUE
    ]
    assert len(continued) == pytest.approx(500, abs=60)
    assert np.mean(continued) < 300


def test_a_trial_that_runs_again_is_not_compared_with_itself():
    """As after the end of its node or a lack of memory."""
    scheduler = at_once(POINTS)
    assert [report_result(scheduler, "a", 100, value) for value in (1.0, 5.0)] == [
        TrialScheduler.CONTINUE
    ] * 2
    assert report_result(scheduler, "b", 100, 4.0) == TrialScheduler.CONTINUE, "the later run counts"


def observe_finished(scheduler, early, final):
    """Add finished trials of an earlier session, given their objectives after 100 and 800 updates."""
    for number, (at_100, at_800) in enumerate(zip(early, final, strict=True)):
        scheduler.observe(f"w{number}", {100: {"objective": at_100}, 800: {"objective": at_800}})


def test_a_misleading_rung_stops_no_trial_while_a_predictive_one_does():
    misleading, predictive = SuccessiveHalving(POINTS), SuccessiveHalving(POINTS)
    observe_finished(misleading, [1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0])
    observe_finished(predictive, [1.0, 2.0, 3.0, 4.0, 5.0], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert misleading.rank_correlations() == {100: pytest.approx(-1.0)}
    assert predictive.rank_correlations() == {100: pytest.approx(1.0)}
    assert report_result(misleading, "x", 100, 9.0) == TrialScheduler.CONTINUE
    assert report_result(predictive, "x", 100, 9.0) == TrialScheduler.STOP


def test_an_eager_rung_that_has_been_shown_to_mislead_stops_no_trial():
    """Eager is about rungs of which nothing is known yet."""
    scheduler = at_once(POINTS)
    observe_finished(scheduler, [1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0])
    assert report_result(scheduler, "x", 100, 9.0) == TrialScheduler.CONTINUE


def test_a_trial_that_is_as_good_as_the_only_one_before_continues():
    scheduler = at_once(POINTS)
    assert [report_result(scheduler, name, 100, 1.0) for name in "ab"] == [TrialScheduler.CONTINUE] * 2


def test_the_rank_correlation_is_spearmans():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    early, final = rng.normal(size=(2, 30))
    scheduler = SuccessiveHalving(POINTS)
    observe_finished(scheduler, early, final)
    assert scheduler.rank_correlations()[100] == pytest.approx(stats.spearmanr(early, final).statistic)


def test_early_stopping_can_be_eager_or_off():
    stopped = {}
    for name in ("proven", "eager", "off"):
        scheduler = make_scheduler(name, POINTS)
        early = report_result(scheduler, "a", 100, 1.0), report_result(scheduler, "b", 100, 2.0)
        observe_finished(scheduler, [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
        stopped[name] = [
            decision == TrialScheduler.STOP for decision in (*early, report_result(scheduler, "x", 100, 9.0))
        ]
    assert stopped == {
        "proven": [False, False, True],
        "eager": [False, True, True],
        "off": [False, False, False],
    }


def test_three_finished_trials_are_too_few_for_a_correlation():
    scheduler = SuccessiveHalving(POINTS)
    observe_finished(scheduler, [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert scheduler.rank_correlations() == {}
    assert report_result(scheduler, "x", 100, 9.0) == TrialScheduler.CONTINUE
    observe_finished(scheduler, [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert report_result(scheduler, "y", 100, 9.0) == TrialScheduler.STOP


def test_a_rung_of_which_nothing_is_known_stops_nobody():
    scheduler = SuccessiveHalving(POINTS)
    decisions = {report_result(scheduler, str(n), 100, float(n)) for n in range(50)}
    assert decisions == {TrialScheduler.CONTINUE}


@pytest.mark.parametrize("status", ["pruned", "diverged"])
def test_a_trial_that_ended_by_itself_is_not_stopped(status):
    scheduler = at_once(POINTS)
    report_result(scheduler, "a", 100, 1.0)
    assert report_result(scheduler, "b", 100, float("inf"), status) == TrialScheduler.CONTINUE


def test_a_resumed_sweep_takes_the_objectives_of_the_best_weights():
    scheduler = at_once(POINTS)
    scheduler.observe(
        "a", {100: {"objective": 1.0, "best_objective": 1.0}, 200: {"objective": 3.0, "best_objective": 1.0}}
    )
    assert report_result(scheduler, "b", 200, 2.0) == TrialScheduler.STOP
