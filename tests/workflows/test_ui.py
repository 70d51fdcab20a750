"""`python -m workflows.ui`, with a real MLflow server."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from diffusion.errors import InputError
from workflows import ui
from workflows.tracking.mlflow_tracker import MlflowTracker

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(database_uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = MlflowTracker(database_uri, "shapes")
    tracker.start("sweep", {"a": 1})
    tracker.close("finished")
    return tracker


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_in_use_is_named_and_another_suggested(runs):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(InputError) as caught:
            ui.main(["--port", str(port)])
    assert str(port) in str(caught.value) and "such as --port " in str(caught.value)


def test_without_runs_it_says_how_to_create_some(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="python -m workflows.tune"):
        ui.main([])
    assert not (tmp_path / "mlflow.db").exists()


def test_an_unreachable_server_and_a_broken_database_are_refused_in_one_line(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(os.urandom(4096))
    for uri in (f"http://127.0.0.1:{free_port()}", f"sqlite:///{tmp_path}/mlflow.db"):
        with pytest.raises(InputError) as caught:
            ui.main(["--tracking-uri", uri, "--port", str(free_port())])
        assert uri in str(caught.value) and "\n" not in str(caught.value)


def test_an_invalid_port_is_refused(runs):
    with pytest.raises(InputError, match="--port 70000"):
        ui.main(["--port", "70000"])


@pytest.mark.slow
def test_the_printed_page_shows_the_runs_and_the_server_stops(runs):
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("DISPLAY", None)
    command = [sys.executable, "-m", "workflows.ui", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        page = (
            f"http://127.0.0.1:{port}/#/experiments/{runs.experiment_id}/runs?workflowType=machine_learning"
        )
        assert lines == [f"shapes: {page}\n", f"open {page}\n"]
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/search",
            json.dumps({"experiment_ids": [runs.experiment_id]}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            shown = json.load(response)["runs"]
        assert [run["info"]["run_name"] for run in shown] == ["sweep"]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 0
        process.stdout.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server is still running"


def mlflow_servers(pid):
    """Children of a process that run `mlflow server`."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            if {"mlflow", "server"} <= set(child.cmdline()):
                found.append(child)
    return found


def test_ctrl_c_while_the_server_starts_ends_both(runs):
    command = [sys.executable, "-m", "workflows.ui", "--port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 300.0
        while not (servers := mlflow_servers(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert (process.returncode, output) == (0, "")
    assert servers and not any(server.is_running() for server in servers)
