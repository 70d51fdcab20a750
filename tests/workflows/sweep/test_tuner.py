"""Handling of Tune's events, and the start of a search."""

import signal
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
        self.ends, self.started = [], []

    def start_trial(self, trial_id, params):
        self.started.append(trial_id)

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
    assert tracker.started == ["ta"], "the tracker may not have it: the driver was killed"


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


@pytest.fixture
def tuners(monkeypatch):
    """The arguments of each of Tune's tuners, which run no trial unless `fit` of the fixture does."""

    class Tuners(list):
        fit = staticmethod(lambda: None)

    seen = Tuners()

    class Tuner:
        def __init__(self, trainable, *, tune_config, run_config):
            seen.append(SimpleNamespace(trainable=trainable, tune_config=tune_config, run_config=run_config))

        def fit(self):
            seen.fit()

    monkeypatch.setattr(tune, "Tuner", Tuner)
    return seen


def run(tmp_path, callback, records, search, num_updates=10, checkpoints=None, gpus_per_worker=1.0):
    """Call `run_trials` for trials of one worker."""
    config = preset("heart").with_values({"training.num_updates": num_updates})
    resources = WorkerResources(1, 1, uses_gpus=gpus_per_worker < 1.0, gpus_per_worker=gpus_per_worker)
    context = TrialContext(config, None, resources, {}, checkpoints)
    return run_trials(context, search, records, Storage(str(tmp_path)), callback, verbose=False)


def run_trial_to_the_end(callback, trial, *updates):
    callback.on_trial_start(0, [], trial)
    for each in updates:
        callback.on_trial_result(0, [], trial, result(each))
    callback.on_trial_complete(0, [], trial)


def test_tune_is_told_the_time_budget(tmp_path, tuners):
    callback, records, _ = sweep(tmp_path)
    for budget in (3600.0, None):
        run(tmp_path, callback, records, Search({}, "tpe", 0, 8, budget))
    assert 3590.0 < tuners[0].tune_config.time_budget_s <= 3600.0
    assert tuners[1].tune_config.time_budget_s is None


def test_a_resumed_sweep_runs_what_is_missing_and_what_had_not_ended(tmp_path, tuners):
    callback, *_ = sweep(tmp_path)
    for trial_id in "abc":
        run_trial_to_the_end(callback, trial_of(tmp_path, trial_id), 10)
    callback.on_trial_start(0, [], trial_of(tmp_path, "d"))  # the driver is killed here
    resumed, records, _ = sweep(tmp_path)
    run(tmp_path, resumed, records, Search({}, "random", 0, 8))
    assert tuners[0].tune_config.num_samples == 8 - 3, "the fourth runs again"


@pytest.mark.parametrize(("num_ended", "was_interrupted"), [(2, True), (3, False)])
def test_a_sweep_was_interrupted_if_trials_are_missing(tmp_path, tuners, num_ended, was_interrupted):
    callback, records, _ = sweep(tmp_path)

    def fit():
        for number in range(num_ended):
            run_trial_to_the_end(callback, trial_of(tmp_path, f"a{number}"), 10)
        if num_ended < 3:
            callback.on_trial_start(0, [], trial_of(tmp_path, "cut"))

    tuners.fit = fit
    assert run(tmp_path, callback, records, Search({}, "random", 0, 3))[0] == was_interrupted
    assert sum(record.unfinished for record in records) == 3 - num_ended


def test_early_stopping_knows_the_trials_of_earlier_sessions(tmp_path, tuners):
    """Four that ended in the order of their first objectives, and one that did not end."""
    callback, records, _ = sweep(tmp_path)
    for number, trial_id in enumerate("abcde"):
        trial = trial_of(tmp_path, trial_id)
        callback.on_trial_start(0, [], trial)
        for updates in range(1, 11 if trial_id < "e" else 2):
            callback.on_trial_result(0, [], trial, objective_of(updates, number))
        if trial_id < "e":
            callback.on_trial_complete(0, [], trial)
    resumed, records, _ = sweep(tmp_path)
    _, correlations = run(tmp_path, resumed, records, Search({}, "random", 0, 8))
    assert correlations == {rung: pytest.approx(1.0) for rung in (1, 2, 4, 8)}


def objective_of(updates, value):
    metrics = {"objective": float(value)}
    return {"status": "running", "reason": "", "updates": updates, "metrics": metrics, **metrics}


def test_only_trials_with_checkpoints_are_started_again_by_tune(tmp_path, tuners):
    """One without would begin from scratch, under the same ID and with its metrics logged twice."""
    callback, records, _ = sweep(tmp_path)
    run(tmp_path, callback, records, Search({}, "random", 0, 8))
    run(tmp_path, callback, records, Search({}, "random", 0, 8), checkpoints=Storage(str(tmp_path / "kept")))
    failures = [each.run_config.failure_config.max_failures for each in tuners]
    assert failures[0] == 0 < failures[1]


def test_trials_that_ran_out_of_memory_run_again_with_a_whole_gpu(tmp_path, tuners):
    callback, records, _ = sweep(tmp_path)

    def fit():
        trial = trial_of(tmp_path, f"a{len(tuners)}")
        if len(tuners) == 1:
            callback.on_trial_start(0, [], trial)
            callback.on_trial_result(0, [], trial, {**result(0, OUT_OF_MEMORY), "objective": float("inf")})
            callback.on_trial_complete(0, [], trial)
        else:
            run_trial_to_the_end(callback, trial, 10)

    tuners.fit = fit
    run(tmp_path, callback, records, Search({}, "random", 0, 1), gpus_per_worker=0.25)
    assert [each.tune_config.num_samples for each in tuners] == [1, 1]
    assert [(record.trial_id, record.status) for record in records] == [("ta1", "finished")]


def test_the_handlers_of_signals_are_restored_after_the_trials(tmp_path, tuners):
    """Tune leaves its own, which ignores the next Ctrl-C."""
    callback, records, _ = sweep(tmp_path)
    tuners.fit = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(tmp_path, callback, records, Search({}, "random", 0, 1))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_every_trial_has_an_id_of_its_own(tmp_path):
    """Also two with the same parameters, and one to which Tune gives an ID that an earlier session had."""
    callback, *_ = sweep(tmp_path)
    callback.on_trial_start(0, [], trial_of(tmp_path, "a"))  # the driver is killed here
    resumed, records, _ = sweep(tmp_path)
    resumed.match_unfinished_trials()
    for trial_id, updates in (("b", (5, 10)), ("c", (10,)), ("a", (10,))):
        run_trial_to_the_end(resumed, trial_of(tmp_path, trial_id), *updates)
    assert [record.trial_id for record in records][:2] == ["ta", "tc"] and len(records) == 3
    assert [list(record.evaluations) for record in records] == [[5, 10], [10], [10]]


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
    logged, pictures = [], []
    tracker.log = lambda metrics, updates, trial_id: logged.append(updates)
    tracker.log_picture = lambda picture, step, trial_id: pictures.append(step)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "elbo_per_example.npy"):
        (folder / name).touch()
    Image.new("L", (1, 1)).save(folder / "samples.png")
    trial = trial_of(tmp_path)
    callback.on_trial_start(0, [], trial)
    for updates in (5, 5, 10):
        callback.on_trial_result(0, [], trial, result(updates))
        callback.on_checkpoint(0, [], trial, tune.Checkpoint.from_directory(folder))
    assert logged == pictures == [5, 10] == list(records["t12345678"].evaluations)
