"""Handling of Tune's events, and the start of a search."""

from types import SimpleNamespace

import cloudpickle
import pytest
from PIL import Image
from ray import tune

from diffusion.files import os_reason
from diffusion.presets import preset
from workflows.status import OUT_OF_MEMORY
from workflows.storage.storage import Storage
from workflows.sweep.table_view import SweepTable
from workflows.sweep.trial import TrialContext
from workflows.sweep.trial_records import INTERRUPTED, TrialRecords
from workflows.sweep.tuner import (
    OUT_OF_TIME,
    Search,
    SweepCallback,
    failure_reason,
    remaining_seconds,
    run_trials,
    storage_failure,
)
from workflows.training.worker_group import WorkerResources


class FakeTracker:
    """Stores how trials ended."""

    def __init__(self):
        self.ends = []

    def start_trial(self, *_):
        pass

    def log(self, *_):
        pass

    def end_trial(self, trial_id, status, reason):
        self.ends.append((trial_id, status, reason))


def sweep(tmp_path):
    tracker = FakeTracker()
    records = TrialRecords(tmp_path)
    callback = SweepCallback(records, tracker, SweepTable("s", 2, 10), {"seed": 0}, num_updates=10)
    return callback, records, tracker


def trial_of(tmp_path, trial_id="12345678"):
    return SimpleNamespace(trial_id=trial_id, config={}, error_file=str(tmp_path / "error.txt"))


def result(updates, status="running", reason=""):
    metrics = {"objective": 1.0}
    return {"status": status, "reason": reason, "updates": updates, "metrics": metrics, **metrics}


def test_a_complete_training_is_finished_and_a_shorter_one_stopped(tmp_path):
    callback, records, tracker = sweep(tmp_path)
    for trial_id, updates in (("a", 10), ("b", 5)):
        trial = trial_of(tmp_path, trial_id)
        callback.on_trial_start(0, [], trial)
        callback.on_trial_result(0, [], trial, result(updates))
        callback.on_trial_complete(0, [], trial)
    assert [(end[0], end[1]) for end in tracker.ends] == [("ta", "finished"), ("tb", "stopped")]
    assert records["ta"].params == {"seed": 0}


def test_a_diverged_trial_keeps_its_last_metrics_and_is_not_ranked(tmp_path):
    callback, records, tracker = sweep(tmp_path)
    trial = trial_of(tmp_path)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, result(5))
    callback.on_trial_result(0, [], trial, {**result(5, "diverged", "nan"), "objective": float("inf")})
    callback.on_trial_complete(0, [], trial)
    assert tracker.ends == [("t12345678", "diverged", "nan")]
    assert records["t12345678"].objective == 1.0 and records.ranked() == []


def test_a_failed_trial_is_recorded_with_the_last_line_of_its_error(tmp_path):
    callback, records, _ = sweep(tmp_path)
    trial = trial_of(tmp_path)
    callback.on_trial_start(0, [], trial)
    (tmp_path / "error.txt").write_text("Failure # 1\nTraceback ...\nValueError: no such thing\n\n")
    callback.on_trial_error(0, [], trial)
    assert (records["t12345678"].status, records["t12345678"].reason) == (
        "failed",
        "ValueError: no such thing",
    )
    assert "died" in failure_reason(SimpleNamespace(error_file=str(tmp_path / "missing")))


def test_trials_running_at_an_interruption_are_ended_and_left_to_run_again(tmp_path):
    callback, records, _ = sweep(tmp_path)
    for trial_id, updates in (("a", 5), ("b", 0)):
        trial = trial_of(tmp_path, trial_id)
        callback.on_trial_start(0, [], trial)
        if updates:
            callback.on_trial_result(0, [], trial, result(updates))
    assert callback.end_running_trials(INTERRUPTED)
    assert [record.status for record in records] == ["stopped", "failed"]
    assert all(record.unfinished for record in records)
    assert not callback.end_running_trials(INTERRUPTED)


def test_a_trial_that_ran_out_of_memory_runs_again_under_its_id(tmp_path):
    callback, records, tracker = sweep(tmp_path)
    trial = trial_of(tmp_path)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, {**result(0, OUT_OF_MEMORY), "objective": float("inf")})
    callback.on_trial_complete(0, [], trial)
    assert not tracker.ends and records["t12345678"].unfinished
    callback.match_unfinished_trials()
    retrial = trial_of(tmp_path, "87654321")
    callback.on_trial_start(0, [], retrial)
    callback.on_trial_result(0, [], retrial, result(10))
    callback.on_trial_complete(0, [], retrial)
    assert tracker.ends == [("t12345678", "finished", "")]
    assert [record.trial_id for record in records] == ["t12345678"]


def test_a_resumed_sweep_runs_unfinished_trials_under_their_old_ids(tmp_path):
    callback, records, _ = sweep(tmp_path)
    for trial_id, beta in (("a", 0.1), ("b", 0.2)):
        trial = trial_of(tmp_path, trial_id)
        trial.config = {"schedule.beta_end": beta}
        callback.on_trial_start(0, [], trial)
        if trial_id == "a":
            callback.on_trial_result(0, [], trial, result(10))
            callback.on_trial_complete(0, [], trial)
    # The driver is killed here; another one reads the journal.
    resumed, resumed_records, tracker = sweep(tmp_path)
    resumed.match_unfinished_trials()
    assert [record.trial_id for record in resumed_records if record.unfinished] == ["tb"]
    for trial_id, beta in (("c", 0.2), ("d", 0.3)):
        trial = trial_of(tmp_path, trial_id)
        trial.config = {"schedule.beta_end": beta}
        resumed.on_trial_start(0, [], trial)
        resumed.on_trial_result(0, [], trial, result(10))
        resumed.on_trial_complete(0, [], trial)
    assert [(trial_id, status) for trial_id, status, _ in tracker.ends] == [
        ("tb", "finished"),
        ("td", "finished"),
    ]
    assert [record.trial_id for record in TrialRecords(tmp_path)] == ["ta", "tb", "td"]


def test_a_sweep_interrupted_again_ends_unfinished_trials_that_it_did_not_reach(tmp_path):
    callback, *_ = sweep(tmp_path)
    callback.on_trial_start(0, [], trial_of(tmp_path, "a"))
    resumed, resumed_records, tracker = sweep(tmp_path)
    resumed.match_unfinished_trials()
    assert resumed.end_running_trials(INTERRUPTED)
    assert [trial_id for trial_id, *_ in tracker.ends] == ["ta"] and resumed_records["ta"].unfinished


def test_the_callback_is_pickled_without_its_connections(tmp_path):
    callback, *_ = sweep(tmp_path)
    assert type(cloudpickle.loads(cloudpickle.dumps(callback))) is tune.Callback


def test_the_folder_of_a_trial_holds_its_best_weights_and_the_tracker_every_picture(tmp_path):
    callback, records, tracker = sweep(tmp_path)
    trial, pictures = trial_of(tmp_path), []
    tracker.log_picture = lambda picture, step, trial_id: pictures.append((step, picture.getpixel((0, 0))))
    callback.on_trial_start(0, [], trial)
    for updates, best in ((3, 3), (6, 6), (10, 6)):
        folder = tmp_path / f"checkpoint-{updates}"
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "elbo_per_example.npy"):
            (folder / name).write_text(str(updates))
        Image.new("L", (1, 1), updates).save(folder / "samples.png")
        if updates == 3:
            Image.new("L", (1, 1), 255).save(folder / "untrained.png")
        report = result(updates)
        report["metrics"] |= {"best_update": best}
        callback.on_trial_result(0, [], trial, report)
        callback.on_checkpoint(0, [], trial, tune.Checkpoint.from_directory(folder))
    assert (records.folder("t12345678") / "model.safetensors").read_text() == "6"
    assert pictures == [(0, 255), (3, 3), (6, 6), (10, 10)]


@pytest.mark.parametrize(
    ("budget", "elapsed", "left"), [(None, 5.0, None), (60.0, 20.0, 40.0), (60.0, 90.0, 1.0)]
)
def test_trials_get_the_time_that_earlier_sessions_left(budget, elapsed, left):
    assert remaining_seconds(Search({}, "tpe", 0, 8, budget), elapsed) == left


def test_tune_is_told_the_time_budget(tmp_path, monkeypatch):
    seen = []

    class Tuner:
        def __init__(self, trainable, *, tune_config, run_config):
            seen.append(tune_config)

        def fit(self):
            pass

    monkeypatch.setattr(tune, "Tuner", Tuner)
    callback, records, _ = sweep(tmp_path)
    config = preset("heart")
    context = TrialContext(config, None, WorkerResources(1, 1, uses_gpus=False), {})
    for budget in (3600.0, None):
        search = Search({}, "tpe", 0, 8, budget)
        run_trials(context, search, records, Storage(str(tmp_path)), callback, verbose=False)
    assert 3590.0 < seen[0].time_budget_s <= 3600.0 and seen[1].time_budget_s is None


def test_trials_that_the_time_budget_cut_are_stopped_and_can_win(tmp_path):
    callback, records, _ = sweep(tmp_path)
    trial = trial_of(tmp_path)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, result(5))
    callback.end_running_trials(OUT_OF_TIME)
    record = records["t12345678"]
    assert (record.status, record.reason, record.unfinished) == ("stopped", OUT_OF_TIME, False)
    assert records.ranked() == [record]


@pytest.mark.parametrize(
    ("reason", "is_full"),
    [
        ("OSError: [Errno 28] No space left on device: '/disk/cut/tune/x'", True),
        ("OSError: [Errno 30] Read-only file system: '/disk/cut'", True),
        ("OSError: [Errno 28] No space left on device", True),
        ("PermissionError: [Errno 13] Permission denied: '/shared/cut'", True),
        ("OSError: AWS Error NETWORK_CONNECTION: no answer", True),
        ("FileNotFoundError: [Errno 2] No such file or directory: '/x'", False),
        ("ValueError: no such thing", False),
    ],
)
def test_a_trial_that_failed_because_the_disk_is_full_ends_the_sweep_and_runs_again(
    tmp_path, reason, is_full
):
    callback, records, tracker = sweep(tmp_path)
    trial = trial_of(tmp_path)
    callback.on_trial_start(0, [], trial)
    (tmp_path / "error.txt").write_text(f"Traceback ...\n{reason}\n")
    if is_full:
        with pytest.raises(OSError) as caught:
            callback.on_trial_error(0, [], trial)
        assert os_reason(caught.value) in reason and (caught.value.filename or "") in reason
    else:
        callback.on_trial_error(0, [], trial)
    assert (storage_failure(reason) is not None) == is_full
    assert [record.unfinished for record in records] == [is_full] and bool(tracker.ends) != is_full


def test_a_disk_that_is_full_for_the_journal_is_the_error_of_the_sweep(tmp_path, monkeypatch):
    """Tune has only the text of what callbacks raise."""

    def full(tuner):
        raise tune.TuneError(
            "Traceback ...\nOSError: [Errno 28] Error writing bytes to file. Detail: no space"
        )

    config = preset("heart")
    callback, records, _ = sweep(tmp_path)
    monkeypatch.setattr(tune.Tuner, "fit", full)
    context = TrialContext(config, None, WorkerResources(1, 1, uses_gpus=False), {})
    search = Search({}, "random", 0, 1)
    with pytest.raises(OSError) as caught:
        run_trials(context, search, records, Storage(str(tmp_path)), callback, verbose=False)
    assert caught.value.strerror == "No space left on device"


def test_an_evaluation_that_a_trial_repeats_on_another_node_is_logged_once(tmp_path):
    callback, records, tracker = sweep(tmp_path)
    logged = []
    tracker.log = lambda metrics, updates, trial_id: logged.append(updates)
    trial = trial_of(tmp_path)
    callback.on_trial_start(0, [], trial)
    for updates in (5, 5, 10):
        callback.on_trial_result(0, [], trial, result(updates))
    assert logged == [5, 10] == list(records["t12345678"].evaluations)
