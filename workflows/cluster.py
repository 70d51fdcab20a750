"""What a cluster needs besides Ray: `python -m workflows.cluster check ray_cluster.yaml`.

`check` finds mistakes in a cluster's YAML before they cost anything, and says what the cluster can cost.
`mlflow` is for the head: it sees that MLflow's server runs there.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion.errors import InputError
from export.arguments import OneLineParser
from workflows.cli import run
from workflows.cluster_check import find_problems
from workflows.cluster_cost import PRICES, hourly_cost, read_prices
from workflows.cluster_file import prepared_by_ray, read_cluster_file
from workflows.environment import set_defaults
from workflows.mlflow_server import keep_serving, stop_serving
from workflows.storage_place import STORAGE_VARIABLE

_FOLDER = "mlflow"


def main(arguments: Sequence[str]) -> int:
    """Run one of the two and return the exit status: 2 where something must be mended."""
    parser = OneLineParser(
        prog="python -m workflows.cluster", description="What a cluster needs besides Ray."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="check | mlflow")
    check = commands.add_parser("check", help="find mistakes in a cluster's YAML, and say what it can cost")
    check.add_argument("file", type=Path, help="ray_cluster.yaml or cluster/on-prem.yaml")
    check.add_argument("--prices", type=Path, default=PRICES, help="table of machines and prices")
    serve = commands.add_parser("mlflow", help="on the head: see that MLflow's server runs")
    serve.add_argument("--port", type=int, default=5000)
    serve.add_argument("--stop", action="store_true", help="end it instead")
    options = parser.parse_args(arguments)
    set_defaults(verbose=False)
    if options.command == "check":
        return _check(options.file, options.prices)
    return _stop() if options.stop else _serve(options.port)


def _check(path: Path, prices_path: Path) -> int:
    config, prices = read_cluster_file(path), read_prices(prices_path)
    problems = list(dict.fromkeys(find_problems(config, prices)))
    for problem in problems:
        print(f"error: {path}: {problem}", file=sys.stderr)
    if problems:
        return 2
    if config["provider"]["type"] == "aws":
        print("\n".join(hourly_cost(prepared_by_ray(config), prices)))
    print(f"{path} is in order. Next: ray up {path}")
    return 0


def _serve(port: int) -> int:
    storage = os.environ.get(STORAGE_VARIABLE)
    if not storage:
        raise InputError(
            f"{STORAGE_VARIABLE} is not set: this is for the head of a cluster, which `ray up` sets up"
        )
    if not 1 <= port <= 65535:
        raise InputError(f"--port {port}: give a number from 1 to 65535")
    try:
        started = keep_serving(Path.home() / _FOLDER, f"{storage.rstrip('/')}/mlflow", port)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"MLflow {'serves' if started else 'has been serving'} on http://127.0.0.1:{port}")
    return 0


def _stop() -> int:
    ran = stop_serving(Path.home() / _FOLDER)
    print("MLflow's server is ended" if ran else "MLflow's server does not run here")
    return 0


if __name__ == "__main__":
    run(main)
