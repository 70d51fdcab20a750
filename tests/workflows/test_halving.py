"""Early stopping at rungs that foretell the end."""

from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from workflows.halving import SuccessiveHalving

POINTS = [100, 200, 300, 400, 500, 600, 700, 800]


def tell(scheduler, trial_id, updates, objective, status="running"):
    result = {"updates": updates, "objective": objective, "status": status}
    return scheduler.on_trial_result(None, SimpleNamespace(trial_id=trial_id), result)


def test_rungs_double_up_to_the_end_which_is_none():
    scheduler = SuccessiveHalving(POINTS)
    for updates in POINTS:
        tell(scheduler, "a", updates, 1.0)
    assert [tell(scheduler, "b", updates, 2.0) for updates in POINTS] == [
        TrialScheduler.STOP if updates in (100, 200, 400) else TrialScheduler.CONTINUE for updates in POINTS
    ]


def test_one_evaluation_stops_nobody():
    scheduler = SuccessiveHalving([50])
    assert [tell(scheduler, name, 50, value) for name, value in (("a", 1.0), ("b", 9.0))] == [
        TrialScheduler.CONTINUE
    ] * 2


def test_of_many_trials_the_better_half_goes_on():
    values = np.random.default_rng(0).permutation(1000).astype(float)
    scheduler = SuccessiveHalving(POINTS)
    told = [tell(scheduler, str(number), 100, value) for number, value in enumerate(values)]
    went_on = [
        value for value, decision in zip(values, told, strict=True) if decision == TrialScheduler.CONTINUE
    ]
    assert len(went_on) == pytest.approx(500, abs=60)
    assert np.mean(went_on) < 300


def whole_trials(scheduler, early, late):
    """Trials of an earlier session, which nobody stopped."""
    for number, (first, last) in enumerate(zip(early, late, strict=True)):
        scheduler.observe(f"w{number}", {100: {"objective": first}, 800: {"objective": last}})


def test_a_rung_that_misleads_stops_nobody_while_a_good_one_does():
    misleading, good = SuccessiveHalving(POINTS), SuccessiveHalving(POINTS)
    whole_trials(misleading, [1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0])
    whole_trials(good, [1.0, 2.0, 3.0, 4.0, 5.0], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert misleading.rank_correlations() == {100: pytest.approx(-1.0)}
    assert good.rank_correlations() == {100: pytest.approx(1.0)}
    assert tell(misleading, "x", 100, 9.0) == TrialScheduler.CONTINUE
    assert tell(good, "x", 100, 9.0) == TrialScheduler.STOP


def test_the_rank_correlation_is_spearmans():
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    early, late = rng.normal(size=(2, 30))
    scheduler = SuccessiveHalving(POINTS)
    whole_trials(scheduler, early, late)
    assert scheduler.rank_correlations()[100] == pytest.approx(scipy.spearmanr(early, late).statistic)


def test_three_finished_trials_say_nothing_yet():
    scheduler = SuccessiveHalving(POINTS)
    whole_trials(scheduler, [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert scheduler.rank_correlations() == {}
    assert tell(scheduler, "x", 100, 9.0) == TrialScheduler.STOP


@pytest.mark.parametrize("status", ["pruned", "diverged"])
def test_what_ended_by_itself_is_not_stopped(status):
    scheduler = SuccessiveHalving(POINTS)
    tell(scheduler, "a", 100, 1.0)
    assert tell(scheduler, "b", 100, float("inf"), status) == TrialScheduler.CONTINUE
