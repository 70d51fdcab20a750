"""A database is made whole or not at all, and one that holds anything is never replaced."""

import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from diffusion.errors import InputError
from workflows.tracking import local_database
from workflows.tracking.local_database import check_writable, ensure_database, store_uri

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mlflow.db"


def half_made(path, *statements):
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


@pytest.mark.parametrize(
    "statements",
    [
        (),
        ("CREATE TABLE runs (run_uuid TEXT)", "CREATE TABLE _alembic_tmp_runs (run_uuid TEXT)"),
        (
            "CREATE TABLE experiments (experiment_id INTEGER)",
            "INSERT INTO experiments VALUES (0)",
            "CREATE TABLE alembic_version (version_num TEXT)",
            "INSERT INTO alembic_version VALUES ('451aebb31d03')",
        ),
    ],
    ids=["nothing", "a table in between", "an early version"],
)
def test_a_database_whose_creation_was_killed_is_made_anew(path, made_databases, statements):
    half_made(path, *statements)
    ensure_database(f"sqlite:///{path}")
    assert made_databases == [path]
    assert MlflowClient(f"sqlite:///{path}").search_experiments()
    ensure_database(f"sqlite:///{path}")
    assert made_databases == [path], "it is complete"


@pytest.mark.parametrize(
    "statements",
    [
        ("CREATE TABLE runs (run_uuid TEXT)", "INSERT INTO runs VALUES ('1')"),
        ("CREATE TABLE experiments (experiment_id INTEGER)", "INSERT INTO experiments VALUES (1)"),
        ("CREATE TABLE recipes (name TEXT)",),
    ],
)
def test_a_database_that_holds_anything_is_left_alone(path, made_databases, statements):
    half_made(path, *statements)
    before = path.read_bytes()
    ensure_database(f"sqlite:///{path}")
    assert not made_databases and path.read_bytes() == before


def test_a_database_that_another_program_is_making_is_waited_for(path, made_databases, monkeypatch):
    monkeypatch.setattr(local_database, "_SECONDS_UNTOUCHED", 30.0)
    half_made(path, "CREATE TABLE experiments (experiment_id INTEGER)")
    other = threading.Timer(0.3, half_made, (path, "INSERT INTO experiments VALUES (1)"))
    other.start()
    ensure_database(f"sqlite:///{path}")
    other.join()
    assert not made_databases


def test_files_of_a_killed_creation_are_removed(path, made_databases):
    left = path.with_name(".part-0123abcd-mlflow.db-journal")
    left.touch()
    ensure_database(f"sqlite:///{path}")
    assert made_databases and not left.exists()


def test_a_database_is_made_by_one_process_at_a_time(path, made_databases, monkeypatch):
    create = local_database._create

    def create_alone(path):
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(handle)
        create(path)

    monkeypatch.setattr(local_database, "_create", create_alone)
    ensure_database(f"sqlite:///{path}")
    assert made_databases == [path]
    with local_database._locked(path.parent) as is_locked:
        assert is_locked, "the other process has released it"


def test_the_journal_of_a_database_that_is_gone_is_not_played_back_into_a_new_one(
    path, _empty_database, monkeypatch
):
    class Store:
        _engine_map = {}

        def __init__(self, uri, artifacts):
            self.db_uri = uri
            shutil.copy(_empty_database, uri.removeprefix("sqlite:///"))

        def _dispose_engine(self):
            pass

    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", Store)
    for end in ("-journal", "-wal", "-shm"):
        path.with_name(path.name + end).write_bytes(b"of another database")
    ensure_database(f"sqlite:///{path}")
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_creation_leaves_nothing_and_says_why(path, monkeypatch):
    def fail(self, *arguments):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore.__init__", fail)
    with pytest.raises(InputError, match="cannot be created .*disk is full.*--tracking-uri"):
        ensure_database(f"sqlite:///{path}")
    assert not list(path.parent.iterdir())


def test_a_locked_database_is_refused_within_seconds(path, monkeypatch):
    assert local_database._LOCK_TIMEOUT < 5
    monkeypatch.setattr(local_database, "_LOCK_TIMEOUT", 0.1)
    half_made(path, "CREATE TABLE runs (run_uuid TEXT)")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InputError, match="database is locked") as caught:
            check_writable(f"sqlite:///{path}")
        assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_to_is_refused(path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(InputError, match="cannot be written to"):
        check_writable(f"sqlite:///{path}")
    check_writable("http://127.0.0.1:5000")


def test_the_store_is_that_of_the_flag_or_of_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert store_uri("http://here:5000") == "http://here:5000" and store_uri(None) == "http://there:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert store_uri(None) == "sqlite:///mlflow.db"


@pytest.mark.slow
def test_two_first_commands_make_one_database_and_a_kill_ruins_none(tmp_path):
    program = f"""
from workflows.environment import set_defaults
set_defaults(False)
from workflows.tracking.mlflow_tracker import MlflowTracker
tracker = MlflowTracker("sqlite:///{tmp_path}/mlflow.db", "shapes")
tracker.start("one", {{}})
tracker.close("finished")
"""
    command = [sys.executable, "-c", program]
    killed = subprocess.Popen(command, cwd=ROOT)
    while not list(tmp_path.glob(".part-*")) and killed.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)  # while the tables are made
    killed.kill()
    killed.wait()
    assert list(tmp_path.glob(".part-*")) and not (tmp_path / "mlflow.db").exists()
    for process in [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]:
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("shapes")
    finished = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
    assert len(finished) == 2
    assert not list(tmp_path.glob(".part-*"))
