"""MLflow's pages, opened on the runs: `make ui`."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from diffusion.errors import InputError
from export.arguments import OneLineParser
from workflows.cli import run
from workflows.environment import set_defaults
from workflows.mlflow_server import start_server, wait_until_healthy

_HOST = "127.0.0.1"


def main(arguments: Sequence[str]) -> int:
    """Serve the local runs until interrupted, or open the server that MLFLOW_TRACKING_URI names."""
    parser = OneLineParser(prog="python -m workflows.ui", description="Open MLflow on the runs.")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--tracking-uri", help="default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db")
    options = parser.parse_args(arguments)
    set_defaults(verbose=False)

    from workflows.tracking import open_store, resolve_tracking_uri, runs_page

    uri = resolve_tracking_uri(options.tracking_uri)
    if uri.startswith("http"):
        open_store(uri)
        _show(uri.rstrip("/") + "/#/experiments")
        return 0
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        raise InputError(f"{database} does not exist, so there are no runs yet: make some with `make demo`")
    if not 1 <= options.port <= 65535:
        raise InputError(f"--port {options.port}: give a number from 1 to 65535")
    _check_port_is_free(options.port)

    experiments = [each for each in open_store(uri).search_experiments() if each.experiment_id != "0"]
    log = tempfile.TemporaryFile()
    server = start_server(uri, options.port, log)
    try:
        wait_until_healthy(server, options.port, log)
        base = f"http://{_HOST}:{options.port}"
        for experiment in experiments:
            print(f"{experiment.name}: {base}{runs_page(experiment.experiment_id)}")
        newest = max(experiments, key=lambda each: each.last_update_time or 0, default=None)
        _show(base + (runs_page(newest.experiment_id) if newest else ""))
        print("Ctrl-C ends it.", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(server)


def _check_port_is_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise InputError(
                f"--port {port} on {_HOST} cannot be used ({error.strerror}): "
                f"end what uses it, or take another: make ui PORT={port % 65535 + 1}"
            ) from error


def _show(url: str) -> None:
    print(f"open {url}", flush=True)
    if sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        webbrowser.open(url)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """The server's own workers are in its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    run(main)
