"""What is made of Tune's events, and where a search starts."""

from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
from ray import tune

from workflows.console import SweepView
from workflows.records import INTERRUPTED, OUT_OF_MEMORY, TrialRecords
from workflows.tuning import Search, SweepCallback, _searcher, _why_it_failed


class Tracker:
    """Keeps the ends of trials that it is told of."""

    def __init__(self):
        self.ends = []

    def start_trial(self, *_):
        pass

    def log(self, *_):
        pass

    def end_trial(self, trial_id, status, reason):
        self.ends.append((trial_id, status, reason))


def sweep(tmp_path):
    tracker = Tracker()
    records = TrialRecords(tmp_path)
    callback = SweepCallback(records, tracker, SweepView("s", 2, 10), {"seed": 0}, num_updates=10)
    return callback, records, tracker


def trial_of(tmp_path, trial_id="12345678"):
    return SimpleNamespace(trial_id=trial_id, config={}, error_file=str(tmp_path / "error.txt"))


def result(updates, status="running", reason=""):
    figures = {"objective": 1.0}
    return {"status": status, "reason": reason, "updates": updates, "metrics": figures, **figures}


def test_a_whole_training_is_finished_and_a_shorter_one_stopped(tmp_path):
    callback, records, tracker = sweep(tmp_path)
    for trial_id, updates in (("a", 10), ("b", 5)):
        trial = trial_of(tmp_path, trial_id)
        callback.on_trial_start(0, [], trial)
        callback.on_trial_result(0, [], trial, result(updates))
        callback.on_trial_complete(0, [], trial)
    assert [(end[0], end[1]) for end in tracker.ends] == [("ta", "finished"), ("tb", "stopped")]
    assert records["ta"].params == {"seed": 0}


def test_a_diverged_trial_keeps_its_last_good_figures_and_cannot_win(tmp_path):
    callback, records, tracker = sweep(tmp_path)
    trial = trial_of(tmp_path)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, result(5))
    callback.on_trial_result(0, [], trial, {**result(5, "diverged", "nan"), "objective": float("inf")})
    callback.on_trial_complete(0, [], trial)
    assert tracker.ends == [("t12345678", "diverged", "nan")]
    assert records["t12345678"].objective == 1.0 and records.ranked() == []


def test_a_failed_trial_is_kept_with_the_last_line_of_its_error(tmp_path):
    callback, records, _ = sweep(tmp_path)
    trial = trial_of(tmp_path)
    callback.on_trial_start(0, [], trial)
    (tmp_path / "error.txt").write_text("Failure # 1\nTraceback ...\nValueError: no such thing\n\n")
    callback.on_trial_error(0, [], trial)
    assert (records["t12345678"].status, records["t12345678"].reason) == (
        "failed",
        "ValueError: no such thing",
    )
    assert "died" in _why_it_failed(SimpleNamespace(error_file=str(tmp_path / "missing")))


def test_what_still_ran_at_an_interruption_is_closed_and_waits_to_be_run_again(tmp_path):
    callback, records, _ = sweep(tmp_path)
    for trial_id, updates in (("a", 5), ("b", 0)):
        trial = trial_of(tmp_path, trial_id)
        callback.on_trial_start(0, [], trial)
        if updates:
            callback.on_trial_result(0, [], trial, result(updates))
    assert callback.end_running(INTERRUPTED)
    assert [record.status for record in records] == ["stopped", "failed"]
    assert all(record.unfinished for record in records)
    assert not callback.end_running(INTERRUPTED)


def test_a_trial_that_needs_its_gpu_alone_is_neither_over_nor_lost(tmp_path):
    callback, records, tracker = sweep(tmp_path)
    trial = trial_of(tmp_path)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, {**result(0, OUT_OF_MEMORY), "objective": float("inf")})
    callback.on_trial_complete(0, [], trial)
    assert not tracker.ends and records["t12345678"].unfinished
    callback.expect_unfinished()
    retrial = trial_of(tmp_path, "87654321")
    callback.on_trial_start(0, [], retrial)
    callback.on_trial_result(0, [], retrial, result(10))
    callback.on_trial_complete(0, [], retrial)
    assert tracker.ends == [("t12345678", "finished", "")]
    assert [record.trial_id for record in records] == ["t12345678"]


def test_a_sweep_that_goes_on_runs_what_was_cut_off_under_its_old_name(tmp_path):
    callback, records, _ = sweep(tmp_path)
    for trial_id, beta in (("a", 0.1), ("b", 0.2)):
        trial = trial_of(tmp_path, trial_id)
        trial.config = {"schedule.beta_end": beta}
        callback.on_trial_start(0, [], trial)
        if trial_id == "a":
            callback.on_trial_result(0, [], trial, result(10))
            callback.on_trial_complete(0, [], trial)
    # The driver is killed here; another one reads what is on the disk.
    later, kept, tracker = sweep(tmp_path)
    later.expect_unfinished()
    assert [record.trial_id for record in kept if record.unfinished] == ["tb"]
    for trial_id, beta in (("c", 0.2), ("d", 0.3)):
        trial = trial_of(tmp_path, trial_id)
        trial.config = {"schedule.beta_end": beta}
        later.on_trial_start(0, [], trial)
        later.on_trial_result(0, [], trial, result(10))
        later.on_trial_complete(0, [], trial)
    assert [(name, status) for name, status, _ in tracker.ends] == [("tb", "finished"), ("td", "finished")]
    assert [record.trial_id for record in TrialRecords(tmp_path)] == ["ta", "tb", "td"]


def test_a_sweep_interrupted_again_before_it_reached_what_was_cut_off_closes_it(tmp_path):
    callback, *_ = sweep(tmp_path)
    callback.on_trial_start(0, [], trial_of(tmp_path, "a"))
    later, kept, tracker = sweep(tmp_path)
    later.expect_unfinished()
    assert later.end_running(INTERRUPTED)
    assert [name for name, *_ in tracker.ends] == ["ta"] and kept["ta"].unfinished


def test_the_callback_leaves_its_connections_behind_when_tune_pickles_it(tmp_path):
    callback, *_ = sweep(tmp_path)
    assert type(cloudpickle.loads(cloudpickle.dumps(callback))) is tune.Callback


SPACE = {"training.learning_rate": (1e-4, 1e-2), "schedule.num_train_timesteps": (50, 1000)}


def searcher(records, algorithm="tpe", first=()):
    return _searcher(Search(SPACE, algorithm, 0, 8, None, first), records)


def test_the_first_points_are_tried_first_and_then_the_search_goes_its_own_way(tmp_path):
    points = [{"training.learning_rate": 1e-3 * n, "schedule.num_train_timesteps": 50} for n in (1, 2)]
    found = searcher(TrialRecords(tmp_path), first=points)
    suggested = [found.suggest(str(number)) for number in range(4)]
    assert suggested[:2] == points
    assert all(1e-4 <= each["training.learning_rate"] <= 1e-2 for each in suggested)


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_a_search_that_goes_on_knows_what_was_found_and_repeats_no_draw(tmp_path, algorithm):
    records = TrialRecords(tmp_path)
    before = searcher(records, algorithm)
    for number in range(12):
        point = before.suggest(str(number))
        records.begin(f"t{number}", point)
        if number < 11:
            records.evaluated(f"t{number}", 10, {"objective": point["training.learning_rate"]})
            records.end(f"t{number}", "finished", "", 1.0)
    after = searcher(TrialRecords(tmp_path), algorithm, first=[{"never": 0}])
    assert after.suggest("a") == {name: records["t11"].params[name] for name in SPACE}, "cut off: run first"
    fresh = [after.suggest(str(number))["training.learning_rate"] for number in range(6)]
    assert not set(fresh) & {record.params["training.learning_rate"] for record in records}
    if algorithm == "tpe":  # the lower the better, as eleven trials have shown
        assert np.median(fresh) < 2e-3


def test_what_failed_is_no_figure_for_the_search(tmp_path):
    records = TrialRecords(tmp_path)
    for number, status in enumerate(("failed", "pruned", "diverged")):
        records.begin(f"t{number}", {"training.learning_rate": 1e-3, "schedule.num_train_timesteps": 50})
        records.end(f"t{number}", status, "", 0.0)
    study = searcher(records)._ot_study
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3
