"""Sweep, judge, export: `python workflows/tune.py --data digits`."""

from collections.abc import Sequence

from workflows.cli import parse_tune_options, run
from workflows.environment import set_defaults


def main(arguments: Sequence[str]) -> int:
    """Run a sweep from command-line arguments and return the exit status."""
    options, record = parse_tune_options(arguments)
    options.run_directory()  # to be told now of a name that is taken
    set_defaults(options.verbose)

    from workflows.sweep import run_sweep  # seconds of imports, only once the input is known to be good

    return run_sweep(options, record)


if __name__ == "__main__":
    run(main)
