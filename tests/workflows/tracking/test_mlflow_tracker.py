"""MlflowTracker: the content of a real MLflow store afterwards."""

import base64
import json
import shutil
import socket
import sqlite3
import time
import zlib
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy.exc
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from PIL import Image

from diffusion.config import DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.errors import InputError
from tests.conftest import _max_file_size
from workflows.tracking import mlflow_sender, registry, send_queue
from workflows.tracking.mlflow_sender import may_pass, runs_with_tag
from workflows.tracking.mlflow_tracker import MlflowTracker
from workflows.tracking.prepared_view import newest_pages
from workflows.tracking.tracker import PublishedModel, RegistrationError, resolve_tracking_uri


@pytest.fixture
def uri(database_uri):
    return database_uri


def test_a_sweep_is_one_parent_with_one_child_per_trial(uri):
    tracker = MlflowTracker(uri, "shapes")
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
    tracker.close("finished")
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


def test_artifacts_of_a_database_are_stored_next_to_it(uri, tmp_path):
    tracker = MlflowTracker(uri, "shapes")
    run_id = tracker.start("sweep", {})
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "note.txt").write_text("x")
    tracker.log_files(tmp_path / "files", "champion")
    tracker.close("failed")
    files = list((tmp_path / "mlartifacts").rglob("champion/note.txt"))
    assert len(files) == 1 and run_id in str(files[0])
    assert MlflowClient(uri).get_run(run_id).info.status == "FAILED"


def test_a_second_sweep_uses_the_same_experiment(uri):
    first = MlflowTracker(uri, "shapes")
    second = MlflowTracker(uri, "shapes")
    assert first.experiment_id == second.experiment_id
    for tracker in (first, second):
        tracker.start("sweep", {})
        tracker.close("finished")


def test_entries_are_retried_until_the_server_is_back(uri, monkeypatch):
    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})
    real_create_run, failures = tracker.client.create_run, []

    def create_run(*args, **kwargs):
        if len(failures) < 2:
            failures.append(1)
            raise MlflowException("API request failed with exception: connection refused")
        return real_create_run(*args, **kwargs)

    monkeypatch.setattr(tracker.client, "create_run", create_run)
    tracker.start_trial("a", {})
    tracker.log({"val/mse": 1.0}, 1, "a")
    tracker.end_trial("a", "finished", "")
    tracker.close("finished")
    assert len(failures) == 2 and tracker.unsent == 0
    names = [run.info.run_name for run in MlflowClient(uri).search_runs([tracker.experiment_id])]
    assert sorted(names) == ["a", "sweep"], "one child, not one per attempt"


def test_an_entry_that_the_store_refuses_is_not_tried_again(uri, monkeypatch):
    """As a database does with what violates a constraint."""
    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})
    attempts = []

    def set_tag(*args):
        attempts.append(args)
        raise MlflowException("UNIQUE constraint failed", error_code=BAD_REQUEST)

    monkeypatch.setattr(tracker.client, "set_tag", set_tag)
    tracker.tag({"champion": "a"})
    tracker.close("finished")
    assert len(attempts) == 1 and tracker.unsent == 0
    assert tracker.refused == ["tags: UNIQUE constraint failed"]
    (run,) = MlflowClient(uri).search_runs([tracker.experiment_id])
    assert run.info.status == "FINISHED", "what came after it was sent"


def test_a_parameter_that_has_another_value_by_now_does_not_hold_up_what_follows(uri):
    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})
    for value in ((1, 2, 2), [1, 2, 2]):
        tracker.start_trial("a", {"network.channel_multipliers": value})
    tracker.log({"val/mse": 1.0}, 1, "a")
    tracker.close("finished")
    assert tracker.unsent == 0
    (reason,) = tracker.refused
    assert "channel_multipliers" in reason and "\n" not in reason
    (child,) = MlflowClient(uri).search_runs([tracker.experiment_id], "attributes.run_name = 'a'")
    assert child.data.metrics == {"val/mse": 1.0}


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (MlflowException("connection refused"), True),
        (MlflowException("(sqlite3.OperationalError) database is locked", TEMPORARILY_UNAVAILABLE), True),
        (MlflowException("(sqlite3.DatabaseError) file is not a database", BAD_REQUEST), True),
        (MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed", BAD_REQUEST), False),
        (MlflowException("Changing param values is not allowed", INVALID_PARAMETER_VALUE), False),
        (RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "a server's"}), False),
        (RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "a server's"}), True),
        (RestException({"error_code": "PERMISSION_DENIED", "message": "the token has expired"}), True),
        (sqlalchemy.exc.OperationalError("SELECT", {}, Exception("disk I/O error")), True),
        (sqlalchemy.exc.IntegrityError("INSERT", {}, Exception("UNIQUE")), False),
        (OSError(28, "No space left on device"), True),
        (KeyError("a bug"), False),
    ],
)
def test_errors_that_pass_are_told_from_those_that_never_do(error, passes):
    assert may_pass(error) == passes


@contextmanager
def broken(path, how):
    """Break a database while this is open, and mend it, or remove what is left, afterwards."""
    if how == "locked":
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            yield
        return
    if how == "full":
        with _max_file_size(20_000):  # less than the database has
            yield
        return
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"nonsense" * 1000)
    yield
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["locked", "full", "deleted", "overwritten"])
@pytest.mark.parametrize("later", ["sync", "resume"])
def test_what_a_broken_store_does_not_take_is_kept_and_sent_later(
    uri, tmp_path, monkeypatch, made_databases, how, later
):
    folder = tmp_path / "run"
    tracker = MlflowTracker(uri, "shapes")
    tracker.keep_entries(folder)
    parent = tracker.start("sweep", {"seed": 0}, str(folder))
    tracker.log_dataset(load_dataset(DataConfig(name="heart")))
    tracker.start_trial("a", {"schedule.beta_end": 0.1})
    tracker.log({"objective": 2.0, "val/mse": 0.5, "val/mse_se": 0.1}, 10, "a")
    tracker.log_picture(Image.new("L", (4, 4)), 10, "a")
    tracker.flush()
    with broken(tmp_path / "mlflow.db", how), monkeypatch.context() as impatient:
        impatient.setattr(send_queue, "_PATIENCE", 0.5)
        impatient.setattr(send_queue, "_PATIENCE_WITH_A_REQUEST", 0.5)
        tracker.log({"objective": 1.0, "val/mse": 0.4, "val/mse_se": 0.1}, 20, "a")
        tracker.end_trial("a", "finished", "")
        with pytest.raises(RegistrationError, match="does not take it now"):
            tracker.register("shapes", PublishedModel(folder, {}, {}), {}, may_promote=True)
        tracker.close("stopped")
    assert tracker.unsent and not tracker.refused

    second = MlflowTracker(uri, "shapes")
    second.keep_entries(folder)
    if later == "sync":
        second.send_kept(parent)
        second.close(None)
    else:
        assert second.resume_sweep(parent, {"a"}) == {"a"}
        second.close("finished")
    assert (second.run_id == parent) == (how in ("locked", "full"))
    assert second.unsent == 0 and len(second.refused) == 1, "a folder is no model that could be registered"
    runs = MlflowClient(uri).search_runs([second.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (run,) = [run for run in runs if run not in children]
    (child,) = children
    assert run.info.run_id == second.run_id and run.data.params == {"seed": "0"}
    assert run.info.status == ("KILLED" if later == "sync" else "FINISHED")
    assert child.info.status == "FINISHED" and child.data.tags["mlflow.parentRunId"] == second.run_id
    history = MlflowClient(uri).get_metric_history(child.info.run_id, "objective")
    assert [(metric.step, metric.value) for metric in history] == [(10, 2.0), (20, 1.0)]
    assert MlflowClient(uri).list_artifacts(child.info.run_id, "images")
    assert child.inputs.dataset_inputs
    is_kept = (folder / "tracking").exists()
    assert is_kept == (later == "sync"), "a stopped run keeps its entries, a finished one does not"


def test_an_unreachable_server_is_reported_within_five_seconds():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        MlflowTracker(f"http://someone:secret@127.0.0.1:{port}", "shapes")
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert str(port) in message and "give another URI" in message
    assert "secret" not in message and "\n" not in message


def test_a_file_that_is_no_database_is_refused_in_one_line_and_kept(tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_text("not a database, but somebody's notes " * 100)
    with pytest.raises(InputError) as caught:
        MlflowTracker(f"sqlite:///{path}", "shapes")
    assert "\n" not in str(caught.value)
    assert path.read_text().startswith("not a database")


@pytest.mark.parametrize("path", ["", "nowhere/mlflow.db"])
def test_an_impossible_database_path_is_refused_in_one_line(tmp_path, path):
    with pytest.raises(InputError, match="--tracking-uri") as caught:
        resolve_tracking_uri(f"sqlite:///{tmp_path}/{path}")
    assert "\n" not in str(caught.value) and not (tmp_path / "nowhere").exists()


def test_an_entry_that_cannot_be_sent_is_counted_and_does_not_stop_the_others(uri, monkeypatch):
    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})
    tracker.log({"val/mse": 1.0}, 1, "never started")
    monkeypatch.setattr(tracker.client, "log_image", lambda *_args, **_kwargs: 1 / 0)
    tracker.log_picture(Image.new("L", (4, 4)), 1)
    tracker.start_trial("a", {})
    tracker.end_trial("a", "finished", "")
    tracker.close("finished")
    assert tracker.unsent == 0 and len(tracker.refused) == 2
    (child,) = MlflowClient(uri).search_runs([tracker.experiment_id], "attributes.run_name = 'a'")
    assert child.info.status == "FINISHED"


def test_an_experiment_deleted_in_mlflow_is_named(uri):
    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})
    tracker.close("finished")
    MlflowClient(uri).delete_experiment(tracker.experiment_id)
    with pytest.raises(InputError, match="--experiment shapes was deleted"):
        MlflowTracker(uri, "shapes")


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


def test_the_command_that_shows_the_runs_names_their_database_unless_it_is_the_default(
    uri, tmp_path, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "elsewhere").mkdir()
    for folder, flag in ((tmp_path, ""), (tmp_path / "elsewhere", f"--tracking-uri {uri}")):
        monkeypatch.chdir(folder)
        words = MlflowTracker(uri, "shapes").location_hint().split("#")[0].split()
        assert " ".join(words) == f"python -m workflows.ui {flag}".strip()


def test_the_runs_of_a_resumed_sweeps_trials_are_looked_up_once(uri, monkeypatch):
    first = MlflowTracker(uri, "shapes")
    parent = first.start("sweep", {}, "/there")
    first.start_trial("a", {})
    first.flush()
    looked_up = []
    monkeypatch.setattr(
        mlflow_sender, "runs_with_tag", lambda *of: looked_up.append(of) or runs_with_tag(*of)
    )
    second = MlflowTracker(uri, "shapes")
    second.resume_sweep(parent, {"a"})
    second.start_trial("a", {})
    second.start_trial("b", {})
    second.flush()
    assert len(looked_up) == 1
    runs = MlflowClient(uri).search_runs([second.experiment_id])
    assert len(runs) == 3 and {run.info.status for run in runs} == {"RUNNING"}


def test_a_resumed_sweep_sends_only_what_has_changed_of_what_belongs_to_no_update(uri):
    first = MlflowTracker(uri, "shapes")
    parent = first.start("sweep", {}, "/there")
    first.start_trial("a", {})
    first.log({"objective": 1.0}, 10, "a")
    for trial_id in (None, "a"):
        first.log({"test/mse": 0.1, "rank": 2.0}, 0, trial_id)
    first.flush()  # the session is killed while it publishes the champion

    second = MlflowTracker(uri, "shapes")
    second.resume_sweep(parent, {"a"})
    for trial_id in (None, "a"):
        second.log({"test/mse": 0.1, "rank": 1.0, "test/auc": 0.5}, 0, trial_id)
        time.sleep(0.01)
        second.log({"rank": 2.0}, 0, trial_id)
    second.close("finished")
    client = MlflowClient(uri)
    for run in client.search_runs([second.experiment_id]):
        for name, expected in (("test/mse", [0.1]), ("rank", [2.0, 1.0, 2.0]), ("test/auc", [0.5])):
            history = client.get_metric_history(run.info.run_id, name)
            assert [entry.value for entry in sorted(history, key=lambda each: each.timestamp)] == expected


def test_a_resumed_sweep_keeps_its_runs_and_deletes_those_of_unknown_trials(uri):
    first = MlflowTracker(uri, "shapes")
    parent = first.start("sweep", {}, "/there")
    for trial_id in ("ended", "unfinished", "unknown"):
        first.start_trial(trial_id, {})
        first.log({"objective": 1.0}, 10, trial_id)
    first.end_trial("ended", "finished", "")
    first.flush()  # the session ends here, as if killed

    second = MlflowTracker(uri, "shapes")
    assert second.resume_sweep(parent, {"ended", "unfinished", "new"}) == {"ended"}
    for trial_id in ("unfinished", "new"):
        second.start_trial(trial_id, {})
        for step in (10, 20):
            second.log({"objective": 1.0}, step, trial_id)
        second.end_trial(trial_id, "finished", "")
    second.close("finished")
    client = MlflowClient(uri)
    runs = client.search_runs([second.experiment_id])
    children = {run.data.tags["trial_id"]: run for run in runs if run.info.run_id != parent}
    assert set(children) == {"ended", "unfinished", "new"} and len(runs) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    for trial_id, expected in (("ended", [10]), ("unfinished", [10, 20]), ("new", [10, 20])):
        history = client.get_metric_history(children[trial_id].info.run_id, "objective")
        assert [entry.step for entry in history] == expected


def test_a_resumed_run_and_a_trial_that_is_repeated_are_running_again(uri):
    first = MlflowTracker(uri, "shapes")
    parent = first.start("sweep", {}, "/there")
    first.start_trial("a", {})
    first.end_trial("a", "failed", "its node died")
    first.close("stopped")
    second = MlflowTracker(uri, "shapes")
    second.resume_sweep(parent, {"a"})
    assert second.client.get_run(parent).info.status == "RUNNING"
    second.start_trial("a", {})
    second.flush()
    runs = second.client.search_runs([second.experiment_id])
    assert [run.info.status for run in runs] == ["RUNNING"] * 2
    second.close("finished")


def test_of_several_runs_of_a_trial_the_first_is_kept_on_whatever_page_they_are(uri, monkeypatch):
    """An answer that is lost makes MLflow's client create a run twice."""
    first = MlflowTracker(uri, "shapes")
    parent = first.start("sweep", {}, "/there")
    for trial_id in ("a", "b"):
        first.start_trial(trial_id, {})
    first.flush()
    client, experiments = first.client, [first.experiment_id]
    children = [run for run in client.search_runs(experiments) if run.info.run_id != parent]
    for run in children:
        client.create_run(first.experiment_id, run.info.start_time + 1000, run.data.tags)
    second = MlflowTracker(uri, "shapes")
    monkeypatch.setattr(second.client, "search_runs", partial(second.client.search_runs, max_results=1))
    second.resume_sweep(parent, {"a", "b"})
    second.close("finished")
    kept = {run.info.run_id for run in client.search_runs(experiments)}
    assert kept == {parent, *(run.info.run_id for run in children)}


def test_a_finished_run_that_is_extended_and_then_deleted_in_mlflow_is_sent_to_a_new_one(uri, tmp_path):
    def opened():
        tracker = MlflowTracker(uri, "shapes")
        tracker.keep_entries(tmp_path / "run")
        return tracker

    first = opened()
    run_id = first.start("one", {"seed": 0}, str(tmp_path / "run"))
    first.log({"val/mse": 1.0}, 10)
    first.close("finished")
    extended = opened()
    assert extended.resume(run_id) == {10}
    extended.log({"val/mse": 0.5}, 20)
    extended.close("stopped")
    extended.client.delete_run(run_id)
    last = opened()
    last.send_kept(run_id)
    last.close(None)
    (run,) = last.client.search_runs([last.experiment_id])
    assert run.info.run_id == last.run_id != run_id
    assert (run.info.run_name, run.data.params, run.data.metrics) == ("one", {"seed": "0"}, {"val/mse": 0.5})


def test_a_finished_run_keeps_its_entries_until_the_store_has_taken_them(uri, tmp_path, monkeypatch):
    tracker = MlflowTracker(uri, "shapes")
    tracker.keep_entries(tmp_path)
    run_id = tracker.start("one", {})

    def refuse(*_values):
        raise MlflowException("API request failed with exception: connection refused")

    monkeypatch.setattr(tracker.client, "set_terminated", refuse)
    monkeypatch.setattr(send_queue, "_PATIENCE", 0.1)
    tracker.close("finished")
    assert tracker.unsent == 1
    later = MlflowTracker(uri, "shapes")
    later.keep_entries(tmp_path)
    later.send_kept(run_id)
    later.close(None)
    assert later.client.get_run(run_id).info.status == "FINISHED"
    assert later.unsent == 0 and not (tmp_path / "tracking").exists()


def test_why_an_entry_was_refused_does_not_show_the_password(uri, monkeypatch):
    def refuse(*_values):
        raise MlflowException("http://me:s3cr3t@host refused it", error_code=BAD_REQUEST)

    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})
    monkeypatch.setattr(tracker.client, "set_tag", refuse)
    tracker.tag({"champion": "a"})
    tracker.close("finished")
    assert tracker.refused == ["tags: http://***@host refused it"]


def test_a_run_that_was_killed_before_it_wrote_anything_is_reused(uri):
    killed = MlflowTracker(uri, "shapes").start("sweep", {"seed": 0}, "/there/sweep")
    second = MlflowTracker(uri, "shapes")
    assert second.start("sweep", {"seed": 0}, "/there/sweep") != killed, "reuse was not asked for"
    assert second.start("other", {"seed": 0}, "/there/other", reuse=True) != killed
    assert second.start("sweep", {"seed": 0}, "/there/sweep", reuse=True) == killed
    second.close("finished")
    assert MlflowTracker(uri, "shapes").start("sweep", {"seed": 0}, "/there/sweep", reuse=True) != killed, (
        "a finished run is not reused"
    )


def test_a_sweep_of_another_store_cannot_be_resumed(uri):
    with pytest.raises(InputError, match="no run 0123"):
        MlflowTracker(uri, "shapes").resume_sweep("0123", set())


def test_a_run_is_not_resumed_in_another_store_but_can_be_sent_there(uri, tmp_path, _empty_database):
    tracker = MlflowTracker(uri, "shapes")
    tracker.keep_entries(tmp_path / "run")
    run_id = tracker.start("one", {"seed": 0})
    tracker.close("stopped")
    shutil.copy(_empty_database, tmp_path / "other.db")
    other = MlflowTracker(f"sqlite:///{tmp_path}/other.db", "shapes")
    other.keep_entries(tmp_path / "run")
    with pytest.raises(InputError, match=f"no run {run_id}"):
        other.resume(run_id)
    with pytest.raises(InputError, match=f"no run {run_id}"):
        other.send_kept(run_id)
    other.send_kept(run_id, to_other_store=True)
    other.close(None)
    assert other.client.get_run(other.run_id).data.params == {"seed": "0"}
    assert other.run_id != run_id and other.unsent == 0


def test_a_description_that_is_too_long_is_cut_at_a_line(uri):
    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})
    tracker.describe("\n".join(f"line {number}" for number in range(2000)))
    tracker.close("finished")
    note = MlflowClient(uri).get_run(tracker.run_id).data.tags["mlflow.note.content"]
    *lines, _, last = note.split("\n")
    assert 7900 < len(note) <= 8000 and "model_card.md" in last
    assert lines == [f"line {number}" for number in range(len(lines))]


def test_errors_floors_and_counts_are_in_a_table_and_not_among_the_metrics(uri):
    first = MlflowTracker(uri, "shapes")
    parent = first.start("sweep", {"seed": 0})
    first.start_trial("a", {"seed": 0, "schedule.beta_end": 0.1})
    first.log({"objective": 1.0, "best_update": 10.0, "val/mse": 0.5, "val/mse_se": 0.1}, 10, "a")
    first.end_trial("a", "finished", "")
    first.flush()  # the session ends here, as if killed

    second = MlflowTracker(uri, "shapes")
    second.resume_sweep(parent, {"a"})
    second.log({"val/sample_auc": 0.7, "val/sample_auc_se": 0.01}, 0, "a")
    second.close("finished")
    assert second.unsent == 0
    client = MlflowClient(uri)
    (child,) = client.search_runs([second.experiment_id], "tags.trial_id = 'a'")
    assert set(child.data.metrics) == {"objective", "val/mse", "val/sample_auc"}
    assert child.data.params == {"schedule.beta_end": "0.1"}, "the others are those of the sweep"
    path = client.download_artifacts(child.info.run_id, "metrics.json")
    rows = {row[0]: row[1:] for row in json.loads(Path(path).read_text())["data"]}
    assert rows["val/mse"] == [0.5, 0.1, None, None] and rows["best_update"][0] == 10.0
    assert rows["val/sample_auc"] == [0.7, 0.01, None, None]


def test_a_view_shows_the_trials_by_objective_and_once_they_are_judged_by_rank(uri):
    tracker = MlflowTracker(uri, "shapes")
    client, searched = MlflowClient(uri), ["schedule.beta_end"]
    parent = tracker.start("sweep", {})

    def view():
        tracker.flush()
        (value,) = (
            value
            for key, value in client.get_experiment(tracker.experiment_id).tags.items()
            if key == f"mlflow.sharedViewState.{parent}"
        )
        return json.loads(value)

    tracker.show_trials(searched, 100)
    for trial_id in "abc":
        tracker.start_trial(trial_id, {})
    before = view()
    assert before["orderByKey"] == "metrics.`best_objective`" and before["orderByAsc"]
    assert parent in before["searchFilter"] and "params.`schedule.beta_end`" in before["selectedColumns"]
    tracker.show_trials(searched, 100, {"b": "champion", "a": "lowest MSE"})
    after = view()
    assert after["orderByKey"] == "metrics.`rank`" and after["name"].startswith("sweep: ")
    packed = base64.b64decode(after["state"].removeprefix("deflate;"))
    assert json.loads(zlib.decompress(packed)).items() <= after.items(), "for both kinds of servers"
    runs = client.search_runs([tracker.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    names = {run.info.run_name: run.data.tags for run in runs}
    assert set(names) == {"b (champion)", "a (lowest MSE)", "c"}
    assert names["b (champion)"]["mlflow.runColor"] != names["a (lowest MSE)"]["mlflow.runColor"]
    assert newest_pages(client) == {
        "shapes": f"/#/experiments/{tracker.experiment_id}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={parent}"
    }
    tracker.show_trials(searched, 100, {"c": "champion"})  # after the sweep was extended
    tracker.close("finished")
    runs = client.search_runs([tracker.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert {run.info.run_name for run in runs} == {"a", "b", "c (champion)"}
    assert [run.info.run_name for run in runs if "mlflow.runColor" in run.data.tags] == ["c (champion)"]


def test_every_run_names_its_data(uri):
    dataset = load_dataset(DataConfig(name="heart"))
    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})
    tracker.log_dataset(dataset)
    tracker.start_trial("a", {})
    tracker.close("finished")
    runs = MlflowClient(uri).search_runs([tracker.experiment_id])
    assert len(runs) == 2 and tracker.unsent == 0
    for run in runs:
        (data,) = (each.dataset for each in run.inputs.dataset_inputs)
        assert data.name == "heart" and dataset.spec.fingerprint.startswith(data.digest)
        assert json.loads(data.profile)["training"] == len(dataset.train)
        assert [column["name"] for column in json.loads(data.schema)["mlflow_colspec"]] == ["x", "y"]


@pytest.mark.parametrize("refused", ["log_inputs", "set_experiment_tag"])
def test_a_server_that_does_not_know_what_pages_are_made_of_loses_nothing_else(uri, monkeypatch, refused):
    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})

    def refuse(*values, **named):
        raise RestException({"error_code": "ENDPOINT_NOT_FOUND", "message": "an older server"})

    monkeypatch.setattr(tracker.client, refused, refuse)
    tracker.log_dataset(load_dataset(DataConfig(name="heart")))
    tracker.show_trials([], 100)
    tracker.start_trial("a", {})
    tracker.log({"val/mse": 1.0}, 1, "a")
    tracker.close("finished")
    assert tracker.unsent == 0
    (child,) = MlflowClient(uri).search_runs([tracker.experiment_id], "attributes.run_name = 'a'")
    assert child.data.metrics == {"val/mse": 1.0}


def test_the_use_of_the_machine_is_logged_with_the_run_unless_the_user_does_not_want_it(uri, monkeypatch):
    started = []
    monkeypatch.setattr("workflows.tracking.mlflow_tracker.SystemMetrics", started.append)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})
    assert not started
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")
    other = MlflowTracker(uri, "shapes")
    other.resume(tracker.run_id)
    assert started == [other.log]
    tracker.close("finished")


def test_a_refused_registration_does_not_show_the_password(uri, tmp_path, monkeypatch):
    def refuse(*values, **flags):
        raise RegistrationError("http://me:s3cr3t@host refused it")

    monkeypatch.setattr(registry, "register", refuse)
    tracker = MlflowTracker(uri, "shapes")
    tracker.start("sweep", {})
    with pytest.raises(RegistrationError, match=r"http://\*\*\*@host refused it"):
        tracker.register("a-model", PublishedModel(tmp_path, {}, {}), {}, may_promote=True)
    tracker.close("failed")
