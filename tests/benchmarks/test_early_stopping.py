"""Replayed sweeps: which trials run to their end, and how often the best one does not."""

import numpy as np
import pytest

from benchmarks import early_stopping
from benchmarks.early_stopping import lost_and_trained
from benchmarks.judgement_report import replay
from workflows.sweep.asha import make_scheduler

POINTS = [1, 2, 4, 8]
# The order of 20 trials is the same at every point.
PARALLEL_CURVES = np.arange(20.0)[:, None] - np.array([0.0, 1.0, 2.0, 3.0]) / 10.0


@pytest.fixture(autouse=True)
def _few_sweeps(monkeypatch):
    for name, value in (("_NUM_POOLS", 10), ("_NUM_SWEEPS_OF_A_POOL", 10), ("_NUM_SWEEPS", 100)):
        monkeypatch.setattr(early_stopping, name, value)


def test_without_rungs_every_trial_is_trained_to_its_end():
    ends, trained = replay(PARALLEL_CURVES, POINTS, make_scheduler("off", POINTS), 2)
    assert ends.all() and trained == 1.0


def test_trials_that_get_worse_in_turn_are_stopped_at_once():
    """Two run at a time; the first of each pair at a rung has the trials before it to compare with."""
    ends, trained = replay(PARALLEL_CURVES, POINTS, make_scheduler("eager", POINTS), 2)
    assert list(np.flatnonzero(ends)) == [0]
    assert trained == pytest.approx((8 + 19) / (20 * 8))


def test_curves_that_keep_their_order_never_lose_the_best():
    for rule in ("off", "eager", "proven"):
        lost, bound, _ = lost_and_trained(PARALLEL_CURVES, POINTS, rule, 12)
        assert (lost, bound) == (0.0, 0.0)


def test_a_late_winner_is_lost_if_unproven_rungs_stop_trials():
    """The final order is the opposite of that at every rung."""
    curves = PARALLEL_CURVES.copy()
    curves[:, -1] *= -1.0
    lost, bound, trained = lost_and_trained(curves, POINTS, "eager", 12)
    assert lost > 0.5 and bound > 0.5 and trained < 0.7
    lost, bound, trained = lost_and_trained(curves, POINTS, "proven", 12)
    assert (lost, bound, trained) == (0.0, 0.0, 1.0)
