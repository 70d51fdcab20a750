"""What a sweep records about its decision, and what it asks of the search; no trial runs here."""

import pandas as pd
import pytest

from diffusion.evaluation.distances import Estimate
from diffusion.presets import preset
from workflows.cli.tune_options import TuneOptions
from workflows.sweep.champion import Champion
from workflows.sweep.decision import Comparison, Finalist, decide
from workflows.sweep.run_sweep import make_search, record_decision, training_seed_error, trial_picks
from workflows.sweep.trial_records import TrialRecords


class FakeTracker:
    def __init__(self):
        self.tags, self.metrics, self.descriptions = {}, {}, {}

    def tag(self, tags, trial_id=None):
        self.tags.setdefault(trial_id, {}).update(tags)

    def describe(self, markdown, trial_id=None):
        self.descriptions[trial_id] = markdown

    def log(self, metrics, step, trial_id=None):
        self.metrics[trial_id, step] = metrics


@pytest.fixture
def decision():
    """Trial b has the closer samples, a the better objective."""
    finalists = [
        Finalist(name=name, objective=objective, distances={}, copies=False, cost=1.0)
        for name, objective in (("a", 1.0), ("b", 1.01))
    ]
    differences = {"distance": Estimate(0.3, 0.1), "auc": Estimate(0.2, 0.01)}
    return decide(finalists, lambda *_: Comparison(Estimate(-0.01, 0.05), differences, 40))


@pytest.fixture
def recorded(tmp_path, decision):
    def record(champion="b"):
        records, tracker = TrialRecords(tmp_path), FakeTracker()
        for trial_id in "abc":
            records.start(trial_id, {})
            mse = 0.1 if trial_id == "a" else 0.5
            records.add_evaluation(trial_id, 10, {"objective": 1.0, "val/mse": mse})
            records.end(trial_id, "finished", "", 1.0)
        confirmed = {
            name: {
                "sample/distance": 0.3,
                "sample/distance_se": 0.02,
                "sample/auc": 0.7,
                "sample/auc_se": 0.01,
            }
            for name in "ab"
        }
        reasons = tuple(decision.sentences()) if champion == "b" else ("b cannot be exported",)
        found = Champion(champion, 1.0, 10, {}, decision, reasons, confirmed, "f", tmp_path)
        record_decision(found, records, tracker)
        return pd.read_csv(records.write_csv()).set_index("trial_id"), tracker

    return record


SENTENCE = (
    "chosen over trial a, whose objective is better by 0.2 standard errors, since its 40 samples are closer "
    "to the data by sample/auc (20.0 standard errors) and sample/distance (3.0 standard errors)"
)


def test_trials_csv_has_rank_decision_and_confirmed_distances(recorded):
    table, _ = recorded()
    assert list(table["rank"]) == [2, 1, 3]
    assert table.loc["b", "decision"] == f"champion: {SENTENCE}."
    assert table.loc["a", "decision"] == f"trial b was {SENTENCE}"
    assert table.loc["c", "decision"] == "not among the finalists, since its objective is worse"
    columns = [f"val/sample_{name}" for name in ("distance", "distance_se", "auc", "auc_se")]
    assert list(table.loc["a", columns]) == [0.3, 0.02, 0.7, 0.01]
    assert table.loc["c", columns].isna().all()


def test_the_tracker_has_the_decision_at_the_sweep_and_at_each_finalist(recorded):
    _, tracker = recorded()
    assert tracker.tags[None] == {"champion": "b", "picked_by_mse": "a", "decision": f"{SENTENCE}."}
    assert tracker.tags["a"]["rank"] == "2" and SENTENCE in tracker.tags["a"]["decision"]
    assert tracker.metrics["b", 0]["rank"] == 1 and tracker.metrics["b", 0]["val/sample_auc_se"] == 0.01
    assert tracker.metrics["c", 0] == {"rank": 3}
    assert all(tracker.descriptions[each] == tracker.tags[each]["decision"] for each in "abc")


def test_the_sweeps_own_run_has_the_champions_metrics_under_the_same_names(recorded):
    _, tracker = recorded()
    own, champions = tracker.metrics[None, 0], tracker.metrics["b", 0]
    assert own["objective"] == 1.0 and own["val/mse"] == 0.5
    assert own.items() >= {name: value for name, value in champions.items() if name != "rank"}.items()


def test_the_picks_are_named():
    assert trial_picks("b", "a") == {"a": "lowest MSE", "b": "champion"}
    assert trial_picks("b", "b") == {"b": "champion, lowest MSE"}
    assert trial_picks("b", "") == {"b": "champion"}


def test_a_first_place_that_cannot_be_exported_is_recorded(recorded):
    table, tracker = recorded(champion="a")
    assert table.loc["b", "decision"] == "the best, but it cannot be exported"
    assert table.loc["a", "decision"] == "champion: b cannot be exported."
    assert tracker.tags[None]["champion"] == "a"


def test_the_search_gets_the_time_budget_and_the_number_of_trials():
    options = TuneOptions(data="heart", num_trials=7, time_budget="1h30m", seed=3)
    search = make_search(options, preset("heart"), {})
    assert (search.time_budget, search.num_trials, search.seed) == (5400.0, 7, 3)
    assert make_search(TuneOptions(data="heart"), preset("heart"), {}).time_budget is None


def test_the_training_seeds_error_is_known_for_the_elbo_only_unless_it_is_given():
    default, given = TuneOptions(data="heart"), TuneOptions(data="heart", training_seed_error=0.5)
    assert training_seed_error(default, "val/elbo_window", "image") == 0.001
    assert training_seed_error(default, "val/elbo_window", "points") == 0.007
    assert training_seed_error(default, "val/mse", "points") == 0.0
    for objective in ("val/mse", "val/elbo_window"):
        assert training_seed_error(given, objective, "points") == 0.5
