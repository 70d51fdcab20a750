"""MLflow as a user would find it afterwards, in a real store."""

import socket
import time

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from diffusion.errors import InputError
from workflows.tracking import Tracker, redact, resolve_tracking_uri


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_sweep_is_one_parent_with_one_child_a_trial(uri):
    tracker = Tracker(uri, "shapes")
    parent = tracker.start("sweep", {"data.name": "heart"})
    for trial_id, status in (
        ("a", "finished"),
        ("b", "stopped"),
        ("c", "pruned"),
        ("d", "failed"),
        ("e", "diverged"),
    ):
        tracker.start_trial(trial_id, {"schedule.beta_end": 0.1})
        tracker.log({"val/mse": 0.5}, 10, trial_id)
        tracker.log({"val/mse": 0.25}, 20, trial_id)
        tracker.log_picture(Image.new("L", (4, 4)), 20, trial_id)
        tracker.end_trial(trial_id, status, "because" if status == "pruned" else "")
    tracker.log({"test/elbo_window": 1.0}, 0)
    tracker.tag({"champion": "a"})
    tracker.close("FINISHED")
    assert tracker.unsent == 0

    client = MlflowClient(uri)
    runs = client.search_runs([tracker.experiment_id])
    assert len(runs) == 6
    children = {run.info.run_name: run for run in runs if run.info.run_id != parent}
    assert {name: run.info.status for name, run in children.items()} == {
        "a": "FINISHED",
        "b": "FINISHED",
        "c": "KILLED",
        "d": "FAILED",
        "e": "FAILED",
    }
    assert all(run.data.tags["mlflow.parentRunId"] == parent for run in children.values())
    assert children["c"].data.tags["reason"] == "because"
    assert children["a"].data.params == {"schedule.beta_end": "0.1"}
    history = client.get_metric_history(children["a"].info.run_id, "val/mse")
    assert [(metric.step, metric.value) for metric in history] == [(10, 0.5), (20, 0.25)]
    assert client.list_artifacts(children["a"].info.run_id, "images")
    assert client.get_run(parent).info.status == "FINISHED"
    assert client.get_run(parent).data.tags["champion"] == "a"


def test_artifacts_of_a_database_stand_beside_it(uri, tmp_path):
    tracker = Tracker(uri, "shapes")
    run_id = tracker.start("sweep", {})
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "note.txt").write_text("x")
    tracker.log_files(tmp_path / "files", "champion")
    tracker.close("FAILED")
    found = list((tmp_path / "mlartifacts").rglob("champion/note.txt"))
    assert len(found) == 1 and run_id in str(found[0])
    assert MlflowClient(uri).get_run(run_id).info.status == "FAILED"


def test_a_second_sweep_uses_the_same_experiment(uri):
    first = Tracker(uri, "shapes")
    second = Tracker(uri, "shapes")
    assert first.experiment_id == second.experiment_id
    for tracker in (first, second):
        tracker.start("sweep", {})
        tracker.close("FINISHED")


def test_what_a_lost_server_missed_is_sent_when_it_is_back(uri, monkeypatch):
    tracker = Tracker(uri, "shapes")
    tracker.start("sweep", {})
    real, failures = tracker.client.create_run, []

    def create_run(*args, **kwargs):
        if len(failures) < 2:
            failures.append(1)
            raise MlflowException("API request failed with exception: connection refused")
        return real(*args, **kwargs)

    monkeypatch.setattr(tracker.client, "create_run", create_run)
    tracker.start_trial("a", {})
    tracker.log({"val/mse": 1.0}, 1, "a")
    tracker.end_trial("a", "finished", "")
    tracker.close("FINISHED")
    assert len(failures) == 2 and tracker.unsent == 0
    names = [run.info.run_name for run in MlflowClient(uri).search_runs([tracker.experiment_id])]
    assert sorted(names) == ["a", "sweep"], "one child, not one a try"


def test_a_server_that_is_not_there_is_told_within_five_seconds():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        Tracker(f"http://someone:secret@127.0.0.1:{port}", "shapes")
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert str(port) in message and "give another URI" in message
    assert "secret" not in message and "\n" not in message


def test_a_file_that_is_no_database_is_one_line_and_stays(tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_text("not a database, but somebody's notes " * 100)
    with pytest.raises(InputError) as caught:
        Tracker(f"sqlite:///{path}", "shapes")
    assert "\n" not in str(caught.value)
    assert path.read_text().startswith("not a database")


@pytest.mark.parametrize("place", ["", "nowhere/mlflow.db"])
def test_a_database_that_cannot_be_there_is_one_line_at_once(tmp_path, place):
    with pytest.raises(InputError, match="--tracking-uri") as caught:
        resolve_tracking_uri(f"sqlite:///{tmp_path}/{place}")
    assert "\n" not in str(caught.value) and not (tmp_path / "nowhere").exists()


def test_an_entry_that_cannot_be_sent_is_counted_and_does_not_stop_the_others(uri):
    tracker = Tracker(uri, "shapes")
    tracker.start("sweep", {})
    tracker.log({"val/mse": 1.0}, 1, "never started")
    tracker._jobs.put(lambda: 1 / 0)
    tracker.start_trial("a", {})
    tracker.end_trial("a", "finished", "")
    tracker.close("FINISHED")
    assert tracker.unsent == 2
    (child,) = MlflowClient(uri).search_runs([tracker.experiment_id], "attributes.run_name = 'a'")
    assert child.info.status == "FINISHED"


def test_an_experiment_deleted_in_mlflow_is_named(uri):
    tracker = Tracker(uri, "shapes")
    tracker.start("sweep", {})
    tracker.close("FINISHED")
    MlflowClient(uri).delete_experiment(tracker.experiment_id)
    with pytest.raises(InputError, match="--experiment shapes was deleted"):
        Tracker(uri, "shapes")


def test_uris_become_absolute_and_plain_folders_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_tracking_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_tracking_uri(f"sqlite:///{tmp_path}/x.db") == f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert resolve_tracking_uri(None) == "http://there:5000"
    for folder in ("mlruns", "file:///tmp/mlruns"):
        with pytest.raises(InputError, match="needs a server or a database"):
            resolve_tracking_uri(folder)


def test_passwords_are_never_shown():
    assert redact("https://me:s3cr3t@host:5000/x") == "https://me:***@host:5000/x"
    assert redact("postgresql://me:p@ss@host/db").count("ss@") == 0
    assert redact("http://127.0.0.1:5000") == "http://127.0.0.1:5000"


def test_a_sweep_that_goes_on_keeps_its_runs_and_drops_what_nobody_knows(uri):
    first = Tracker(uri, "shapes")
    parent = first.start("sweep", {}, "/there")
    for trial_id in ("over", "cut", "orphan"):
        first.start_trial(trial_id, {})
        first.log({"objective": 1.0}, 10, trial_id)
    first.end_trial("over", "finished", "")
    first.flush()  # and then it is killed

    later = Tracker(uri, "shapes")
    assert later.resume_sweep(parent, {"over", "cut", "new"}) == {"over"}
    for trial_id in ("cut", "new"):
        later.start_trial(trial_id, {})
        for step in (10, 20):
            later.log({"objective": 1.0}, step, trial_id)
        later.end_trial(trial_id, "finished", "")
    later.close("FINISHED")
    client = MlflowClient(uri)
    runs = client.search_runs([later.experiment_id])
    children = {run.data.tags["trial_id"]: run for run in runs if run.info.run_id != parent}
    assert set(children) == {"over", "cut", "new"} and len(runs) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    for trial_id, expected in (("over", [10]), ("cut", [10, 20]), ("new", [10, 20])):
        history = client.get_metric_history(children[trial_id].info.run_id, "objective")
        assert [entry.step for entry in history] == expected


def test_a_run_that_was_killed_before_it_wrote_anything_is_taken_up_again(uri):
    begun = Tracker(uri, "shapes").start("sweep", {"seed": 0}, "/there/sweep")
    again = Tracker(uri, "shapes")
    assert again.start("sweep", {"seed": 0}, "/there/sweep") != begun, "nobody asked to go on"
    assert again.start("other", {"seed": 0}, "/there/other", again=True) != begun
    assert again.start("sweep", {"seed": 0}, "/there/sweep", again=True) == begun
    again.close("FINISHED")
    assert Tracker(uri, "shapes").start("sweep", {"seed": 0}, "/there/sweep", again=True) != begun, (
        "it is over"
    )


def test_a_sweep_of_another_store_cannot_be_gone_on_with(uri):
    with pytest.raises(InputError, match="no run 0123"):
        Tracker(uri, "shapes").resume_sweep("0123", set())
