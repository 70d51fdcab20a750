"""Train one model: `python workflows/train.py --data digits --num-workers 2`."""

from collections.abc import Sequence

from workflows.cli.parsing import parse_train_options
from workflows.cli.process import run
from workflows.environment import set_defaults
from workflows.terminal import waiting


def main(arguments: Sequence[str], prog: str = "train.py") -> int:
    """Run a training as given by command-line arguments, and return the exit status.

    Args:
        arguments: command-line arguments.
        prog: name of the command in its help.
    """
    request = parse_train_options(arguments, prog)
    if request.is_finished:
        print("\n".join(request.finished_lines()))
        return 0
    set_defaults(request.options.verbose)
    source, options = request.open_data()

    # Imported only after the input has been checked: it takes seconds to import.
    with waiting("loading PyTorch and Ray"):
        from workflows.training.run_training import run_training

    return run_training(options, source, request.record).exit_status


if __name__ == "__main__":
    run(main)
