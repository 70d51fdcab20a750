"""Train one model: `python workflows/train.py --data digits --num-workers 2`."""

from collections.abc import Sequence

from workflows.cli import parse_train_options, run
from workflows.environment import set_defaults


def main(arguments: Sequence[str]) -> int:
    """Run a training from command-line arguments and return the exit status."""
    options, record = parse_train_options(arguments)
    set_defaults(options.verbose)

    from workflows.training_run import run_training  # seconds of imports, once the input is known to be good

    return run_training(options, record)


if __name__ == "__main__":
    run(main)
