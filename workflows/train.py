"""Train one model: `python workflows/train.py --data digits --num-workers 2`."""

from collections.abc import Sequence

from workflows.cli.process import on_interrupt, run
from workflows.environment import set_defaults
from workflows.tracking.local_database import check_writable, store_uri


def main(arguments: Sequence[str], prog: str = "train.py") -> int:
    """Run a training as given by command-line arguments, and return the exit status.

    Args:
        arguments: command-line arguments.
        prog: name of the command in its help.
    """
    with on_interrupt("Interrupted before the training started: nothing was written."):
        from workflows.cli.parsing import parse_train_options
        from workflows.terminal import waiting

        request = parse_train_options(arguments, prog)
        if request.is_finished:
            print("\n".join(request.finished_lines()))
            return 0
        if not request.options.dry_run:  # fail early if nothing can be written
            check_writable(store_uri(request.options.tracking_uri))
        set_defaults(request.options.verbose)
        with waiting(f"opening {request.options.data}"):
            source, options = request.open_data()
        # Imported only after the input has been checked: it takes seconds to import.
        with waiting("loading PyTorch and Ray"):
            from workflows.training.run_training import run_training

    return run_training(options, source, request.record).exit_status


if __name__ == "__main__":
    run(main, extra="train")
