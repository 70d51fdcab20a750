"""`workflows.sync` sends what runs have kept, and says what it did."""

import shutil

import pytest
from mlflow import MlflowClient

from diffusion.config import Config
from tests.workflows.tracking.test_mlflow_tracker import broken
from workflows import sync
from workflows.cli.process import exit_status
from workflows.storage.mirror import Mirror
from workflows.storage.run_lock import RunLock
from workflows.storage.run_record import RunRecord, read_record
from workflows.storage.storage import Storage
from workflows.tracking import send_queue
from workflows.tracking.mlflow_tracker import MlflowTracker


@pytest.fixture
def run(tmp_path, database_uri, made_databases, monkeypatch):
    """Folder of a finished run whose last metrics its database has not taken, and which is lost."""
    monkeypatch.setattr(send_queue, "_PATIENCE", 0.5)
    monkeypatch.setattr(sync, "set_defaults", lambda verbose: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database_uri)
    monkeypatch.chdir(tmp_path)
    folder = Storage(str(tmp_path / "runs")).child("one")
    folder.path.mkdir()
    tracker = MlflowTracker(database_uri, "shapes")
    tracker.keep_entries(folder.path)
    run_id = tracker.start("one", {"seed": 0})
    RunRecord("one", "shapes", run_id, Config(), "fingerprint").write(folder, "finished")
    with broken(tmp_path / "mlflow.db", "deleted"):
        tracker.log({"val/mse": 1.0}, 1)
        tracker.close("finished")
    return folder


def test_a_run_is_sent_once(run, database_uri, capsys):
    assert exit_status(sync.main, []) == 0
    assert capsys.readouterr().out.startswith("one: sent ")
    (found,) = MlflowClient(database_uri).search_runs(
        [MlflowClient(database_uri).get_experiment_by_name("shapes").experiment_id]
    )
    assert found.info.status == "FINISHED" and found.data.metrics == {"val/mse": 1.0}
    assert read_record(run).run_id == found.info.run_id, "so that it can be resumed"
    assert exit_status(sync.main, ["one"]) == 0
    assert capsys.readouterr().out == "Nothing is left to send.\n"
    assert not (run.path / "tracking").exists()


def test_a_sweep_in_a_bucket_is_sent_once(run, s3, database_uri, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = f"s3://{s3}/runs"
    Mirror(run.path, Storage(bucket).child("one"), "journal.jsonl", print).copy()
    assert exit_status(sync.main, ["--output-dir", bucket]) == 0
    assert capsys.readouterr().out.startswith("one: sent ")
    (found,) = MlflowClient(database_uri).search_runs(
        [MlflowClient(database_uri).get_experiment_by_name("shapes").experiment_id]
    )
    assert found.data.metrics == {"val/mse": 1.0}
    assert read_record(Storage(bucket).child("one")).run_id == found.info.run_id
    assert exit_status(sync.main, ["one", "--output-dir", bucket]) == 0
    assert capsys.readouterr().out == "Nothing is left to send.\n"


def test_a_run_that_is_running_is_refused_and_so_is_one_that_is_not_there(run, capsys):
    lock = RunLock(run.path)
    assert exit_status(sync.main, ["one"]) == 2
    assert "another process runs it" in capsys.readouterr().err
    lock.release()
    assert exit_status(sync.main, ["two"]) == 2
    assert capsys.readouterr().err.startswith("error: two: no such run in runs;")
    assert exit_status(sync.main, ["--output-dir", "nowhere"]) == 0


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("run.json", b"", "run.json is damaged"),
        ("run.json", None, "has no run.json"),
        ("tracking/entries.jsonl", b"\0\n", "entries.jsonl, line 1, is damaged"),
    ],
)
def test_a_damaged_run_keeps_no_other_from_being_sent(run, file, content, words, capsys):
    shutil.copytree(run.path, damaged := run.path.with_name("damaged"))
    (damaged / file).unlink() if content is None else (damaged / file).write_bytes(content)
    assert exit_status(sync.main, []) == 1
    output = capsys.readouterr()
    assert output.out.startswith("one: sent ")
    assert output.err.startswith("warning: ") and words in output.err and output.err.count("\n") == 1
    assert exit_status(sync.main, ["damaged"]) == 2
