"""What is made of Tune's events, and where a search starts."""

from types import SimpleNamespace

import cloudpickle
from ray import tune

from workflows.console import SweepView
from workflows.records import TrialRecords
from workflows.tuning import SweepCallback, _search, _why_it_failed


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
    return {"status": status, "reason": reason, "updates": updates, "objective": 1.0, "metrics": {}}


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


def test_what_still_ran_at_an_interruption_is_closed(tmp_path):
    callback, records, _ = sweep(tmp_path)
    for trial_id, updates in (("a", 5), ("b", 0)):
        trial = trial_of(tmp_path, trial_id)
        callback.on_trial_start(0, [], trial)
        if updates:
            callback.on_trial_result(0, [], trial, result(updates))
    assert callback.end_interrupted()
    assert [record.status for record in records] == ["stopped", "failed"]
    assert not callback.end_interrupted()


def test_the_callback_leaves_its_connections_behind_when_tune_pickles_it(tmp_path):
    callback, *_ = sweep(tmp_path)
    assert type(cloudpickle.loads(cloudpickle.dumps(callback))) is tune.Callback


def test_the_configs_own_values_come_first_where_the_space_holds_them():
    searched = {"training.learning_rate": (1e-4, 1e-2), "schedule.num_train_timesteps": (50, 1000)}
    flat = {"training.learning_rate": 1e-3, "schedule.num_train_timesteps": 1000}
    assert _search(flat, searched, 0)._points_to_evaluate == [flat]
    assert not _search(flat | {"schedule.num_train_timesteps": 7}, searched, 0)._points_to_evaluate
    assert _search(flat, {}, 0) is None
