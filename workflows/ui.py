"""Show the runs in MLflow's web interface: `python -m workflows.ui`."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion.errors import InputError
from export.parser import OneLineParser
from workflows.cli.process import run
from workflows.environment import has_display, set_defaults
from workflows.redaction import redact
from workflows.tracking.mlflow_server import start_server, wait_until_healthy

_HOST = "127.0.0.1"


def main(arguments: Sequence[str], prog: str = "python -m workflows.ui") -> int:
    """Serve the local runs until interrupted, or open the page of a remote MLflow server.

    Args:
        arguments: command-line arguments.
        prog: name of the command in its help.

    Returns:
        The exit status.
    """
    parser = OneLineParser(prog=prog, description="Show the runs in MLflow's web interface.")
    parser.add_argument("--port", type=int, default=5000, help="port of the local server (default: 5000)")
    parser.add_argument(
        "--tracking-uri",
        help="MLflow server or database (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)",
    )
    options = parser.parse_args(arguments)
    set_defaults(verbose=False)

    from workflows.tracking.mlflow_store import open_store
    from workflows.tracking.prepared_view import newest_pages
    from workflows.tracking.tracker import resolve_tracking_uri

    uri = resolve_tracking_uri(options.tracking_uri)
    if uri.startswith("http"):
        _show_pages(newest_pages(open_store(uri)), uri.rstrip("/"))
        return 0
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        raise InputError(
            f"{database} does not exist, so there are no runs yet: create some, as with "
            "`python -m workflows.tune --data digits`"
        )
    if not 1 <= options.port <= 65535:
        raise InputError(f"--port {options.port}: give a number from 1 to 65535")
    _check_port_is_free(options.port)

    pages = newest_pages(open_store(uri))
    stop_requested = _stop_signals()  # so that the server does not outlive this process
    log = tempfile.TemporaryFile()
    server = start_server(uri, options.port, log)
    try:
        wait_until_healthy(server, options.port, log, stop_requested)
        if not stop_requested.is_set():
            _show_pages(pages, f"http://{_HOST}:{options.port}")
            print("Press Ctrl-C to stop the server.", flush=True)
        while server.poll() is None and not stop_requested.wait(0.2):
            pass
        return 0 if stop_requested.is_set() else int(server.returncode)
    finally:
        _stop(server)


def _show_pages(pages: Mapping[str, str], base: str) -> None:
    """Print the page of each experiment, and open that of the newest."""
    for name, page in pages.items():
        print(f"{name}: {redact(base)}{page}")
    page = next(iter(pages.values()), "/#/experiments")
    print(f"open {redact(base)}{page}", flush=True)
    if sys.platform == "darwin" or has_display():
        webbrowser.open(base + page)


def _check_port_is_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise InputError(
                f"--port {port} on {_HOST} cannot be used ({error.strerror}): "
                f"stop the program that uses it, or choose another one, such as --port {port % 65535 + 1}"
            ) from error


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """Stop the server together with its workers, which are in its process group."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, signal_number)
            server.wait(timeout=5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _stop_signals() -> threading.Event:
    """Event that SIGINT and SIGTERM set. An exception could be raised in a destructor, where it is lost."""
    requested = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: requested.set())
    return requested


if __name__ == "__main__":
    run(main, extra="train")
