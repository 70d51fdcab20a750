"""List, compare and delete runs: `python -m workflows.runs list`, `compare NAME ...`, `delete NAME ...`."""

from collections.abc import Sequence

from diffusion.errors import InputError
from diffusion.files import user_path
from export.parser import OneLineParser
from workflows.cli.process import run
from workflows.environment import default_output_dir, set_defaults


def main(arguments: Sequence[str], prog: str = "python -m workflows.runs") -> int:
    """Run `list`, `compare` or `delete` and return the exit status; without a command, `list`.

    Args:
        arguments: command-line arguments.
        prog: name of the command in its help.

    Raises:
        InputError: there is no such run, or the tracking store cannot be reached.
    """
    parser = OneLineParser(prog=prog, description="List, compare and delete sweeps and trainings.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | compare | delete")
    listing = commands.add_parser("list", help="all runs, the newest last; the default")
    compare = commands.add_parser("compare", help="parameters and metrics of runs or trials side by side")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="name of a run, or RUN/trials/ID of a trial")
    compare.add_argument("--all", action="store_true", help="also equal parameters, and all metrics")
    delete = commands.add_parser("delete", help="delete runs with their MLflow records, after asking")
    delete.add_argument("runs", nargs="+", metavar="RUN", help="name of a run")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    delete.add_argument("--files-only", action="store_true", help="keep MLflow's records")
    delete.add_argument(
        "--tracking-uri",
        help="MLflow server or database (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)",
    )
    for command in (listing, compare, delete):
        default = default_output_dir()
        command.add_argument(
            "--output-dir", default=default, help=f"parent of the runs' folders (default: {default})"
        )
    words = list(arguments)
    if not words or words[0].startswith("--output-dir"):
        words.insert(0, "list")
    options = parser.parse_args(words)
    set_defaults(verbose=False)

    from workflows.cli.resume import output_storage
    from workflows.cli.run_options import RunFlags
    from workflows.run_management import compare_runs, delete_runs, list_runs

    flags = RunFlags(output_dir=options.output_dir)
    is_bucket = "://" in options.output_dir
    if not is_bucket and not flags.output_folder().is_dir():
        raise InputError(
            f"--output-dir {options.output_dir}: there are no runs; give the folder of another one"
        )
    storage = output_storage(flags)
    if options.command == "list":
        return list_runs(storage)
    names = [_name(each, options.output_dir) for each in options.runs]
    if options.command == "compare":
        return compare_runs(storage, names, show_all=options.all)
    return delete_runs(
        storage, names, options.tracking_uri, ask=not options.yes, with_mlflow=not options.files_only
    )


def _name(given: str, output_dir: str) -> str:
    """A run's name, or RUN/trials/ID, also of a path below the output folder."""
    name = given.rstrip("/")
    for prefix in (output_dir.rstrip("/"), str(user_path(output_dir))):
        name = name.removeprefix(f"{prefix}/")
    return name


if __name__ == "__main__":
    run(main, extra="train")
