"""A tracker of another package, that of docs/extending.md: chosen by its URI, used by both logs."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from diffusion.data.dataset import load_dataset
from diffusion.errors import InputError
from workflows.cli.parsing import parse_train_options, parse_tune_options
from workflows.publishing.registration import register_model
from workflows.storage.run_record import read_record
from workflows.sweep.sweep_logger import SweepLogger
from workflows.sweep.tuner import SweepCallback
from workflows.tracking.mlflow_tracker import MlflowTracker
from workflows.tracking.tracker import TRACKERS, resolve_tracking_uri, tracker_class
from workflows.training.events import (
    CheckpointDamaged,
    Diverged,
    Evaluated,
    Failed,
    Finished,
    InputRejected,
    Started,
    Stopped,
    WorkerDied,
)
from workflows.training.run_logger import RunLogger

DOCUMENT = Path(__file__).parents[3] / "docs" / "extending.md"
METRICS = {"objective": 0.5, "train/mse": 0.1, "val/mse": 0.2}


@pytest.fixture(autouse=True)
def _installed(tmp_path, monkeypatch):
    """The package of the document, as pip would install it."""
    section = DOCUMENT.read_text().split("## A tracker")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (entry_point,) = re.findall(r"^memory = .*$", section, re.MULTILINE)
    packages = tmp_path / "site-packages"
    information = packages / "memory_tracker-1.0.dist-info"
    information.mkdir(parents=True)
    (packages / "memory_tracker.py").write_text(code)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: memory-tracker\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        f"[ray_ddpm.trackers]\n{entry_point.replace(chr(34), '')}\n"
    )
    monkeypatch.syspath_prepend(packages)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def uri(tmp_path):
    return f"memory://{tmp_path.name}"


def samples(path):
    Image.new("L", (4, 4)).save(path, "png")
    return path.read_bytes()


def open_training(uri, *arguments):
    command_line = parse_train_options(["--data", "heart", "--name", "mine", *arguments])
    (_, options), record = command_line.open_data(), command_line.record
    return RunLogger.open(options, options.config(), load_dataset(options.config().data), record, uri)


def open_sweep(uri, *arguments, params=None):
    command_line = parse_tune_options(["--data", "heart", "--name", "mine", *arguments])
    (_, options), record = command_line.open_data(), command_line.record
    dataset = load_dataset(options.config().data)
    return SweepLogger.open(options, options.config(), dataset, record, uri, params)


def run_of(log):
    return log.tracker.runs[log.tracker.run_id]


def test_the_scheme_of_the_uri_chooses_the_tracker(uri, monkeypatch):
    assert "memory" in TRACKERS and tracker_class(uri).__name__ == "MemoryTracker"
    assert resolve_tracking_uri(uri) == uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert resolve_tracking_uri(None) == uri
    for other in ("sqlite:///mlflow.db", "http://there:5000", "databricks", "memory", "elsewhere://there"):
        assert tracker_class(other) is MlflowTracker, other


def test_a_training_is_logged(uri, tmp_path, capsys):
    log = open_training(uri)
    picture = samples(tmp_path / "samples.png")
    log.on_event(Started(0, 1, [], "cpu", 2))
    log.on_event(Evaluated(10, METRICS, {"samples.png": picture}))
    log.on_event(CheckpointDamaged("000000010 is damaged"))
    log.on_event(WorkerDied("the process of worker 1 died"))
    log.on_event(Stopped(10))
    log.tracker.unsent = 3
    log.close(log.status)
    run = run_of(log)
    assert run["status"] == "stopped" == run["tags"]["status"] == read_record(log.folder).status
    assert run["metrics"] == {10: METRICS} and run["pictures"][10].size == (4, 4)
    assert run["params"]["data.name"] == "heart"
    printed = capsys.readouterr().out
    assert "warning: 000000010 is damaged; using an older checkpoint" in printed
    assert "A worker ended (the process of worker 1 died); restarting the workers." in printed
    assert "next: python -m workflows.train --resume --name mine" in printed
    assert f"warning: 3 entries could not be sent to the memory tracker at {uri}" in printed

    log = open_training(uri, "--resume")
    history = [{"update": 10, "metrics": METRICS}, {"update": 20, "metrics": METRICS}]
    log.on_event(Started(20, 1, history, "cpu", 2))
    assert list(run_of(log)["metrics"]) == [10, 20], "the same run, with what it had missed"
    log.on_event(Finished())
    log.close(log.status)
    assert run_of(log)["status"] == "finished" == read_record(log.folder).status


@pytest.mark.parametrize(
    ("event", "reason", "input_error"),
    [
        (Failed("disk full"), "disk full", ""),
        (Diverged("not a number"), "not a number", ""),
        (InputRejected("photo gone"), "", "photo gone"),
    ],
)
def test_a_training_that_fails_keeps_the_reason(uri, capsys, event, reason, input_error):
    log = open_training(uri)
    log.on_event(event)
    log.on_event(WorkerDied("the process of worker 1 died"))
    assert (log.status, log.reason, log.input_error) == ("failed", reason, input_error)
    log.close(log.status)
    assert run_of(log)["tags"].get("reason", "") == reason
    printed = capsys.readouterr().out
    assert "restarting" not in printed and (f"error: {reason}" in printed) == bool(reason)


@pytest.mark.parametrize(
    ("open_run", "noun"), [(open_training, "run"), (open_sweep, "sweep")], ids=["train", "tune"]
)
@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_both_logs_refuse_data_that_have_changed(uri, open_run, noun, status):
    log = open_run(uri)
    log.close(status)
    record = read_record(log.folder)
    assert record.status == status == run_of(log)["status"]
    with pytest.raises(InputError, match=f"the data of heart have changed since the {noun} mine was started"):
        record.check_unchanged(record.config, "other")


def test_a_sweep_is_logged_through_its_callback(uri, tmp_path, capsys):
    log = open_sweep(uri, params={"search.training.learning_rate": (1e-4, 1e-2)})
    callback = SweepCallback(log.records, log.tracker, log.view, {"seed": 0}, num_updates=10)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors", "elbo_per_example.npy"):
        (checkpoint / name).touch()
    samples(checkpoint / "samples.png")

    class Checkpoint:
        def as_directory(self):
            return contextlib.nullcontext(checkpoint)

    for trial_id in ("a", "b"):
        trial = SimpleNamespace(trial_id=trial_id, config={"seed": 1}, error_file=None)
        callback.on_trial_start(0, [], trial)
        result = {"status": "running", "reason": "", "updates": 10, "metrics": METRICS}
        callback.on_trial_result(0, [], trial, result)
        callback.on_checkpoint(0, [], trial, Checkpoint())
        (callback.on_trial_complete if trial_id == "a" else callback.on_trial_error)(0, [], trial)
    log.close("stopped")
    trials = run_of(log)["trials"]
    assert {trial_id: trial["status"] for trial_id, trial in trials.items()} == {
        "ta": "finished",
        "tb": "failed",
    }
    assert trials["ta"]["metrics"] == {10: METRICS} and list(trials["ta"]["pictures"]) == [10]
    assert trials["tb"]["reason"] == "the trial's process died"

    del trials["tb"]  # as if the session had been killed before it was sent
    trials["tx"] = {**trials["ta"], "status": "running"}  # and before the journal had this one
    resumed = open_sweep(uri, "--resume")
    assert resumed.tracker.run_id == log.tracker.run_id
    assert {trial_id: trial["status"] for trial_id, trial in trials.items()} == {
        "ta": "finished",
        "tb": "failed",
    }
    resumed.close("finished")
    assert run_of(resumed)["status"] == "finished" == read_record(resumed.folder).status


def test_a_sweep_is_resumed_with_the_same_search_only(uri):
    open_sweep(uri).close("stopped")
    with pytest.raises(InputError, match="--workers-per-trial differs .* start a new sweep"):
        open_sweep(uri, "--resume", "--workers-per-trial", "2")


def test_a_tracker_without_a_model_registry_says_so(uri, tmp_path):
    metrics = dict.fromkeys(
        ("test/sample_distance", "test/sample_num_samples", "test/sample_num_reference"), 1.0
    )
    tracker = tracker_class(uri)(uri, "shapes")
    line = register_model(tracker, "ray-ddpm-shapes", tmp_path, {}, metrics, "f", "none", interrupted=False)
    assert line == "the model is not registered: the memory tracker has no model registry"
