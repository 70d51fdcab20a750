"""An MLflow server on this machine: started, waited for, and told from one that runs already."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import IO

_HOST = "127.0.0.1"
_SECONDS_TO_START = 90
_PID = "server.pid"


def start_server(
    uri: str, port: int, log: IO[bytes], artifacts: str | None = None, folder: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start a server for this machine alone, in a process group of its own.

    Args:
        uri: of the database.
        port: that it listens on.
        log: takes what it says.
        artifacts: where it keeps the files that clients send it; None leaves clients to write them.
        folder: its working directory.
    """
    # Its job consumers would outlive it, and nothing here needs them.
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", _HOST, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    if artifacts is not None:
        command += ["--artifacts-destination", artifacts]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )


def is_healthy(port: int) -> bool:
    """Whether an MLflow server answers here."""
    try:
        with urllib.request.urlopen(f"http://{_HOST}:{port}/health", timeout=2) as answer:
            return bool(answer.read().strip() == b"OK")
    except OSError:
        return False


def wait_until_healthy(server: "subprocess.Popen[bytes]", port: int, log: IO[bytes]) -> None:
    """Return once it answers.

    Raises:
        RuntimeError: it ended, or did not answer within a minute and a half.
    """
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline:
        if server.poll() is not None:
            log.seek(0)
            raise RuntimeError(
                f"MLflow's server ended at once:\n{log.read().decode(errors='replace')[-2000:]}"
            )
        if is_healthy(port):
            return
        time.sleep(0.3)
    raise RuntimeError(f"MLflow's server did not answer within {_SECONDS_TO_START} s")


def keep_serving(folder: Path, artifacts: str, port: int) -> bool:
    """See that a server runs here which outlives this process; whether it had to be started.

    Args:
        folder: for its database mlflow.db and its log.
        artifacts: where it keeps the files that clients send it: a folder or a bucket.
        port: that it listens on.

    Raises:
        RuntimeError: it does not start.
    """
    if is_healthy(port):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "server.log", "w+b") as log:
        server = start_server("sqlite:///mlflow.db", port, log, artifacts, folder)
        (folder / _PID).write_text(str(server.pid))
        wait_until_healthy(server, port, log)
    return True


def stop_serving(folder: Path) -> bool:
    """End what `keep_serving` started; whether it ran."""
    try:
        number = int((folder / _PID).read_text())
        if b"mlflow" not in Path(f"/proc/{number}/cmdline").read_bytes():  # the number is another's by now
            return False
        os.killpg(number, signal.SIGTERM)
    except (OSError, ValueError):
        return False
    return True
