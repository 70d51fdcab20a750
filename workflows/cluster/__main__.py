"""Tools for clusters, in addition to Ray's: `python -m workflows.cluster check ray_cluster.yaml`.

`init` writes the project's files into a folder, for `ray up` without a checkout.
`check` finds mistakes in a cluster's YAML before they cost anything, and estimates the cost of the cluster.
`mlflow` starts or stops the MLflow server, on the head node; `backup` keeps a copy of its database.
"""

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.errors import InputError, printable
from export.parser import OneLineParser
from workflows.cli.process import run
from workflows.environment import STORAGE, cluster_database, cluster_storage, set_defaults
from workflows.redaction import redact
from workflows.tracking.mlflow_server import (
    DATABASE,
    ensure_server,
    running_process,
    server_is_running,
    stop_server,
)

if TYPE_CHECKING:
    from workflows.tracking.database_backup import DatabaseBackup

_FOLDER = "mlflow"
_BACKUP = "backup"  # the command, and its files


def main(arguments: Sequence[str], prog: str = "python -m workflows.cluster") -> int:
    """Run one of the commands and return the exit status, which is 2 if the YAML has problems.

    Args:
        arguments: command-line arguments.
        prog: name of the command in its help.
    """
    parser = OneLineParser(prog=prog, description="Tools for clusters, in addition to Ray's.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="init | check | mlflow | backup")
    init = commands.add_parser(
        "init", help="write the cluster files and the code that they copy into a new folder"
    )
    init.add_argument("folder", type=Path, nargs="?", default=Path("ray-ddpm"), help="default: ray-ddpm")
    check = commands.add_parser("check", help="find mistakes in a cluster's YAML and estimate its cost")
    check.add_argument("file", type=Path, help="ray_cluster.yaml or cluster/on-prem.yaml")
    check.add_argument("--prices", type=Path, help="table of machine types and prices")
    serve = commands.add_parser("mlflow", help="on the head node: start MLflow's server if it is not running")
    serve.add_argument("--port", type=int, default=5000, help="port of the server (default: 5000)")
    serve.add_argument("--stop", action="store_true", help="stop the server instead")
    commands.add_parser(
        _BACKUP, help="on the head node: copy MLflow's database to the storage every minute; mlflow starts it"
    )
    options = parser.parse_args(arguments)
    set_defaults(verbose=False)
    if options.command == "init":
        return _init(options.folder)
    if options.command == "check":
        return _check(options.file, options.prices)
    if options.command == _BACKUP:
        return _keep_copies()
    return _stop() if options.stop else _serve(options.port)


def _init(folder: Path) -> int:
    from workflows.cluster.project_files import write_project

    write_project(folder)
    print(
        f"{folder} has the files of a cluster. Next: cd {folder}, set your values at the top of "
        "ray_cluster.yaml or cluster/on-prem.yaml, and run python -m workflows.cluster check with that file"
    )
    return 0


def _check(path: Path, prices_path: Path | None) -> int:
    from workflows.cluster.check import find_problems
    from workflows.cluster.config_file import prepare_with_ray, read_cluster_file
    from workflows.cluster.cost import PRICES, read_prices
    from workflows.cluster.kinds import CLUSTER_KINDS

    config, prices = read_cluster_file(path), read_prices(prices_path or PRICES)
    problems = list(dict.fromkeys(find_problems(config, prices)))
    for problem in problems:
        print(f"error: {printable(f'{path}: {problem}')}", file=sys.stderr)
    if problems:
        return 2
    kind = CLUSTER_KINDS[config["provider"]["type"]]
    if kind.hourly_cost is not None:
        print("\n".join(kind.hourly_cost(prepare_with_ray(config), prices)))
    print(f"{path} is in order. Next: ray up {path}")
    return 0


def _storage() -> str:
    """Storage of the cluster whose head node this is."""
    storage = cluster_storage()
    if storage is None:
        raise InputError(
            f"{STORAGE} is not set, and there is no metadata.storage of a cluster here: run this on the head "
            "node of a cluster that `ray up` started"
        )
    return storage


def _serve(port: int) -> int:
    storage, uri, folder = _storage(), cluster_database(), Path.home() / _FOLDER
    if not 1 <= port <= 65535:
        raise InputError(f"--port {port}: give a number from 1 to 65535")
    if uri is None and _backup().restore():
        print(f"MLflow's database was restored from {_backup()}")
    try:
        started = ensure_server(folder, f"{storage.rstrip('/')}/mlflow", port, uri)
    except RuntimeError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 1
    if uri is None:
        _ensure_backup(folder)
    print(
        f"MLflow's server {'started' if started else 'is already running'} on http://127.0.0.1:{port}, which "
        "asks for no password and is reached from this machine only: from another one, use a tunnel, such as "
        f"ray attach FILE -p {port}"
    )
    return 0


def _backup() -> "DatabaseBackup":
    from workflows.storage.storage import Storage
    from workflows.tracking.database_backup import DatabaseBackup

    return DatabaseBackup(Path.home() / _FOLDER / DATABASE, Storage(_storage()))


def _ensure_backup(folder: Path) -> None:
    """Start the process that copies the database, unless it runs; it ends after the server."""
    if running_process(folder / f"{_BACKUP}.pid", _BACKUP):
        return
    with open(folder / f"{_BACKUP}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "workflows.cluster", _BACKUP],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    (folder / f"{_BACKUP}.pid").write_text(str(process.pid))


def _keep_copies() -> int:
    from workflows.tracking.database_backup import keep_copies

    keep_copies(
        _backup(), partial(server_is_running, Path.home() / _FOLDER), lambda line: print(line, flush=True)
    )
    return 0


def _stop() -> int:
    was_running = stop_server(Path.home() / _FOLDER)
    print("MLflow's server was stopped" if was_running else "MLflow's server is not running here")
    return 0


if __name__ == "__main__":
    run(main, extra="train,cluster")
