"""MLflow's database on a server: a real PostgreSQL, which is started where it is installed."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from mlflow import MlflowClient

from diffusion.errors import InputError
from tests.workflows.conftest import user_environment
from workflows.tracking import send_queue
from workflows.tracking.database_server import first_use, is_database_server
from workflows.tracking.mlflow_store import open_store
from workflows.tracking.mlflow_tracker import MlflowTracker

ROOT = Path(__file__).parents[3]
PASSWORD = "s3cr:et@/pa%ss"


def programs() -> Path | None:
    """Folder of PostgreSQL's programs, which Debian does not put on the path."""
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return Path(found).parent if found else folders[-1] if folders else None


class Postgres:
    """A PostgreSQL server of our own, with the user `mlflow`."""

    def __init__(self, folder: Path, programs: Path, user: str | None) -> None:
        self.folder, self.programs, self.user = folder, programs, user
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "password").write_text(PASSWORD)
        if user is not None:
            for path in (folder, folder / "password"):
                shutil.chown(path, user)
        self.run("initdb", "-A", "scram-sha-256", "--pwfile", str(folder / "password"), "-U", "mlflow")

    def run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.programs / program, "-D", self.folder / "data", *arguments],
            user=self.user,
            cwd=self.folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder}"
        self.run("pg_ctl", "-w", "-o", options, "-l", str(self.folder / "log"), "start")

    def stop(self) -> None:
        """Stop it as a loss of power would."""
        self.run("pg_ctl", "-w", "-m", "immediate", "stop")

    def uri(self, password: str = PASSWORD) -> str:
        return f"postgresql://mlflow:{quote(password, safe='')}@127.0.0.1:{self.port}/postgres"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory) -> Iterator[Postgres]:
    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    user = None
    folder = tmp_path_factory.mktemp("postgres")
    if os.getuid() == 0:  # as root it refuses to run, and it cannot enter pytest's folders
        user = "postgres" if any(each.pw_name == "postgres" for each in pwd.getpwall()) else "nobody"
        folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    server = Postgres(folder, found, user)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.mark.slow
def test_runs_are_logged_to_postgresql_and_the_next_command_shows_them(postgres):
    tracker = MlflowTracker(postgres.uri(), "logged")
    tracker.start("sweep", {"a": (1, 2)})
    tracker.start_trial("one", {})
    tracker.log({"objective": 1.0}, 10, "one")
    tracker.end_trial("one", "finished", "")
    tracker.close("finished")
    assert tracker.unsent == 0 and not tracker.refused
    runs = MlflowClient(postgres.uri()).search_runs([tracker.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"} and len(runs) == 2
    address = f"postgresql://***@127.0.0.1:{postgres.port}/postgres"
    assert tracker.location_hint().startswith(f"python -m workflows.ui --tracking-uri '{address}' ")


@pytest.mark.slow
def test_two_first_commands_at_once_both_find_the_tables(postgres):
    code = "import sys; from workflows.tracking.mlflow_store import open_store; open_store(sys.argv[1])"
    with_database = postgres.uri().rpartition("/")[0]
    from sqlalchemy import create_engine, text

    with create_engine(postgres.uri(), isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("CREATE DATABASE at_once"))
    environment = user_environment() | {"PYTHONPATH": str(ROOT)}

    def first_command(_number: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, f"{with_database}/at_once"],
            env=environment,
            capture_output=True,
            text=True,
        )

    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(first_command, range(3)))
    assert [each.returncode for each in ended] == [0, 0, 0], [each.stderr[-500:] for each in ended]


# MLflow's pool drops the connections of a server that has died without closing them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_what_a_server_that_went_down_does_not_take_is_kept_and_sent_later(postgres, tmp_path, monkeypatch):
    tracker = MlflowTracker(postgres.uri(), "went down")
    tracker.keep_entries(tmp_path)
    tracker.start("sweep", {})
    tracker.flush()
    postgres.stop()
    try:
        with monkeypatch.context() as impatient:
            impatient.setattr(send_queue, "_PATIENCE", 0.5)
            tracker.start_trial("one", {})
            tracker.log({"objective": 1.0}, 10, "one")
            tracker.end_trial("one", "finished", "")
            tracker.close("finished")
        assert tracker.unsent > 0 and not tracker.refused
    finally:
        postgres.start()
    later = MlflowTracker(postgres.uri(), "went down")
    later.keep_entries(tmp_path)
    later.send_kept(tracker.run_id, to_other_store=False)
    later.close(None)
    assert later.unsent == 0
    runs = MlflowClient(postgres.uri()).search_runs([later.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"} and len(runs) == 2


@pytest.mark.slow
def test_a_wrong_password_is_refused_in_one_line_that_does_not_show_it(postgres):
    started = time.monotonic()
    with pytest.raises(InputError, match="password authentication failed") as caught:
        open_store(postgres.uri("gehe:im"))
    assert time.monotonic() - started < 30.0, "MLflow alone tries for two minutes"
    assert "gehe" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_is_down_is_reported_in_one_line_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(InputError, match=f"port {port} failed: Connection refused") as caught:
        open_store(f"postgresql://mlflow:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/mlflow")
    assert time.monotonic() - started < 30.0, "MLflow alone tries for two minutes"
    assert "s3cr" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_driver_that_is_not_installed_is_named():
    with pytest.raises(InputError, match=r"//\*\*\*@here/mlflow: it needs the Python package psycopg2"):
        open_store("postgresql+psycopg2://me:secret@here/mlflow")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("postgresql://me@here/mlflow", True),
        ("mysql+pymysql://me@here/mlflow", True),
        ("mssql+pyodbc://me@here/mlflow", True),
        ("sqlite:///mlflow.db", False),
        ("http://postgresql:5000", False),
        ("postgresql:5432", False),
    ],
)
def test_only_databases_on_servers_are_connected_to_beforehand(uri, expected):
    assert is_database_server(uri) is expected


def test_a_failure_to_make_tables_is_tried_again_on_servers_alone(monkeypatch):
    monkeypatch.setattr("workflows.tracking.database_server._PAUSE", 0.0)
    failures = []

    def use() -> str:
        if len(failures) < 2:
            failures.append(ValueError("another process makes them"))
            raise failures[-1]
        return "open"

    assert first_use("postgresql://here/mlflow", use) == "open" and len(failures) == 2
    failures.clear()
    with pytest.raises(ValueError, match="another process"):
        first_use("http://here", use)
    assert len(failures) == 1
