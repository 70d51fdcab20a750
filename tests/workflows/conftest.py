"""Fixtures: a local Ray session, and S3 buckets on a local server."""

import contextlib
import importlib
import itertools
import logging
import os
import shutil
import sys
import time

import psutil
import pytest

from workflows.environment import set_defaults

set_defaults(verbose=True)  # before the import: Ray reads RAY_AUTH_MODE when it is imported

import ray  # noqa: E402

from workflows.cli.process import exit_status  # noqa: E402


def user_environment():
    """Environment of a user's command: no settings of the tests' own MLflow and Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "RAY"))}


def is_running(process):
    """Whether a process runs, except two of Ray's that search its server for a minute."""
    with contextlib.suppress(psutil.Error):
        name = " ".join(process.cmdline())
        is_ray_agent = name.startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE and not is_ray_agent
    return False


def left_behind(started, seconds=45.0):
    """Those of the processes that outlive their command, except two of Ray's; waits for them to end."""
    deadline = time.monotonic() + seconds
    while (alive := [each for each in started if is_running(each)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


@pytest.fixture(scope="session")
def ray_here():
    """Ray session of this process with two CPU cores."""
    ray.init("local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


class InProcess:
    """Runs one of the commands in this process, on the Ray that the other tests use.

    Args:
        script: "train" or "tune".
        folder: current folder of the command.
    """

    def __init__(self, script, monkeypatch, capsys, folder):
        self.folder = folder
        self._script, self._monkeypatch, self._capsys = script, monkeypatch, capsys
        monkeypatch.setattr(f"workflows.{script}.set_defaults", lambda verbose: None)

    def __call__(self, arguments, folder=None):
        """Run with these arguments; returns the exit status, stdout and stderr."""
        main = importlib.import_module(f"workflows.{self._script}").main
        self._monkeypatch.chdir(folder or self.folder)
        self._monkeypatch.setattr(sys, "argv", [f"{self._script}.py", *arguments])
        return exit_status(main, arguments), *self._capsys.readouterr()

    def refused(self, arguments, folder=None):
        """Run a command that is refused and writes nothing; returns its one-line error."""
        before = sorted((folder or self.folder).rglob("*"))
        status, output, errors = self(arguments, folder)
        assert (status, output) == (2, ""), output + errors
        assert errors.startswith("error: ") and errors.count("\n") == 1
        assert sorted((folder or self.folder).rglob("*")) == before
        return errors


@pytest.fixture
def in_process(ray_here, monkeypatch, capsys, tmp_path):
    """Function from "train" or "tune" to an `InProcess`."""
    return lambda script: InProcess(script, monkeypatch, capsys, tmp_path)


@pytest.fixture(scope="session")
def _empty_database(tmp_path_factory):
    """An MLflow database without runs; MLflow takes seconds to create one."""
    from workflows.tracking.local_database import ensure_database

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    ensure_database(f"sqlite:///{path}")
    assert [file.name for file in path.parent.iterdir()] == ["mlflow.db"]
    return path


@pytest.fixture
def database_uri(_empty_database, tmp_path):
    """URI of a new MLflow database, mlflow.db in `tmp_path`."""
    return f"sqlite:///{shutil.copy(_empty_database, tmp_path / 'mlflow.db')}"


@pytest.fixture
def made_databases(monkeypatch, _empty_database):
    """Paths of the databases that the test makes, in no time, as copies of one."""
    paths = []

    def create(path):
        paths.append(path)
        path.unlink(missing_ok=True)
        shutil.copy(_empty_database, path)

    monkeypatch.setattr("workflows.tracking.local_database._create", create)
    monkeypatch.setattr("workflows.tracking.local_database._SECONDS_UNTOUCHED", 0.0)
    return paths


_bucket_numbers = itertools.count()


@pytest.fixture(scope="session")
def _s3_server():
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(_s3_server, monkeypatch):
    """Name of a new bucket; the usual AWS variables point to its server."""
    from pyarrow import fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    bucket = f"bucket-{next(_bucket_numbers)}"
    fs.S3FileSystem(endpoint_override=_s3_server, region="us-east-1", allow_bucket_creation=True).create_dir(
        bucket
    )
    return bucket
