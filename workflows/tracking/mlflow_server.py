"""Start, check and stop an MLflow server on this machine."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO

from workflows.environment import mlflow_server_environment

_HOST = "127.0.0.1"
_START_TIMEOUT = 90  # seconds
_PID_FILE = "server.pid"
DATABASE = "mlflow.db"
_APP = "ray-ddpm"  # MLflow's server with another first page: workflows.tracking.mlflow_app


def start_server(
    uri: str, port: int, log: IO[bytes], artifacts: str | None = None, folder: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start a server that only this machine can reach, in its own process group.

    Args:
        uri: URI of the database.
        port: port on which the server listens.
        log: file that receives the server's output.
        artifacts: folder or bucket in which the server stores artifacts; with None, clients write artifacts
            to storage themselves.
        folder: working directory of the server.
    """
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", _HOST, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    if entry_points(group="mlflow.app", name=_APP):  # not where the project runs without being installed
        command += ["--app-name", _APP]
    if artifacts is not None:
        command += ["--artifacts-destination", artifacts]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=mlflow_server_environment(uri),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )


def is_healthy(port: int) -> bool:
    """Whether an MLflow server responds on this port of this machine."""
    try:
        with urllib.request.urlopen(f"http://{_HOST}:{port}/health", timeout=2) as response:
            return bool(response.read().strip() == b"OK")
    except OSError:
        return False


def wait_until_healthy(
    server: "subprocess.Popen[bytes]", port: int, log: IO[bytes], stop: threading.Event | None = None
) -> None:
    """Wait until the server responds, or until `stop` is set.

    Args:
        server: process of the server.
        port: port on which the server listens.
        log: file with the server's output, which is quoted if the server exits.
        stop: event that ends the waiting.

    Raises:
        RuntimeError: the server exited, or did not respond within 90 seconds.
    """
    deadline = time.monotonic() + _START_TIMEOUT
    stop = stop or threading.Event()
    while time.monotonic() < deadline:
        if server.poll() is not None:
            log.seek(0)
            raise RuntimeError(
                f"the MLflow server exited while starting:\n{log.read().decode(errors='replace')[-2000:]}"
            )
        if is_healthy(port) or stop.wait(0.3):
            return
    raise RuntimeError(f"the MLflow server did not respond within {_START_TIMEOUT} s")


def ensure_server(folder: Path, artifacts: str, port: int, uri: str | None = None) -> bool:
    """Start a server that outlives this process, unless one is already running.

    Args:
        folder: folder of the server's log, and of its database `DATABASE` unless another is given.
        artifacts: folder or bucket in which the server stores artifacts.
        port: port on which the server listens.
        uri: URI of another database.

    Returns:
        Whether a server was started.

    Raises:
        RuntimeError: the server does not start.
    """
    if is_healthy(port):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "server.log", "w+b") as log:
        server = start_server(uri or f"sqlite:///{DATABASE}", port, log, artifacts, folder)
        (folder / _PID_FILE).write_text(str(server.pid))
        wait_until_healthy(server, port, log)
    return True


def stop_server(folder: Path) -> bool:
    """Stop the server that `ensure_server` started; return whether it was running."""
    pid = running_process(folder / _PID_FILE, "mlflow")
    if pid is None:
        return False
    try:
        os.killpg(pid, signal.SIGTERM)
    except OSError:
        return False
    return True


def server_is_running(folder: Path) -> bool:
    """Whether the server that `ensure_server` started has not ended."""
    return running_process(folder / _PID_FILE, "mlflow") is not None


def running_process(pid_file: Path, word: str) -> int | None:
    """ID of the process that a file names, if it runs.

    Args:
        pid_file: file with the ID.
        word: word in the process's command line, since another process may have the ID by now.
    """
    try:
        pid = int(pid_file.read_text())
        return pid if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() else None
    except (OSError, ValueError):
        return None
