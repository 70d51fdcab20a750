"""Send to MLflow what runs have kept for it while it could not be reached: `python -m workflows.sync`."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from diffusion.errors import InputError, nearest
from export.parser import OneLineParser
from workflows.cli.process import run
from workflows.environment import default_output_dir, set_defaults


def main(arguments: Sequence[str], prog: str = "python -m workflows.sync") -> int:
    """Send what runs have kept, and return the exit status: 1 if something of it is left.

    Args:
        arguments: command-line arguments.
        prog: name of the command in its help.

    Raises:
        InputError: there is no such run, a run that is named is running or damaged, or the store cannot be
            used.
    """
    parser = OneLineParser(
        prog=prog, description="Send to MLflow what runs have kept for it while it could not be reached."
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="name of a run (default: all runs)")
    default = default_output_dir()
    parser.add_argument(
        "--output-dir", default=default, help=f"parent of the runs' folders (default: {default})"
    )
    parser.add_argument(
        "--tracking-uri",
        help="MLflow server or database (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)",
    )
    options = parser.parse_args(arguments)
    set_defaults(verbose=False)

    from workflows.cli.resume import existing_output_storage
    from workflows.cli.run_options import RunFlags
    from workflows.terminal import waiting

    storage = existing_output_storage(RunFlags(output_dir=options.output_dir))
    names = storage.names() if storage is not None else []
    for name in options.runs:
        if name not in names:
            raise InputError(f"{name}: no such run in {options.output_dir}; {nearest(name, names)}")
    if storage is None:
        print(f"Nothing is kept in {options.output_dir}.")
        return 0
    with waiting("loading MLflow"):
        from workflows.storage.mirror import Mirror
        from workflows.storage.run_lock import RunLock
        from workflows.storage.run_record import read_record
        from workflows.sweep.journal import JOURNAL_FILE
        from workflows.sweep.sweep_logger import SweepLogger
        from workflows.tracking.outbox import ENTRIES_FILE, FOLDER, read_entries
        from workflows.tracking.tracker import open_tracker, resolve_tracking_uri

    uri = resolve_tracking_uri(options.tracking_uri)

    def send(name: str) -> int | None:
        """Send what a run has kept, and return how many entries are left; None if it has kept none."""
        folder = storage.child(name)
        if not folder.exists(ENTRIES_FILE):
            return None
        local = SweepLogger.local_folder(folder)  # no training in a bucket keeps entries
        entries, num_done = read_entries(local / FOLDER)
        if len(entries) == num_done:
            return None
        lock = RunLock(local)
        try:
            record = read_record(folder)
            if record is None:
                raise InputError(f"{folder} has no run.json: restore it from a copy, and sync again")
            tracker = open_tracker(uri, record.experiment)
            tracker.keep_entries(local)
            with waiting(f"sending {name} to {tracker.name}"):
                tracker.send_kept(record.run_id, to_other_store=options.tracking_uri is not None)
                tracker.close(None)
            if tracker.run_id not in ("", record.run_id):  # the store had lost the run
                record = replace(record, run_id=tracker.run_id).write(folder, record.status)
            if not folder.is_local:
                Mirror(local, folder, JOURNAL_FILE, print).copy()
        finally:
            lock.release()
        for reason in tracker.refused:
            print(f"{name}: {tracker.name} refused this for good: {reason}")
        left = f"; {tracker.unsent} could not be sent" if tracker.unsent else ""
        num_sent = len(entries) - num_done - len(tracker.refused) - tracker.unsent
        print(f"{name}: sent {max(0, num_sent)} entries to {tracker.name} at {tracker.location}{left}")
        return tracker.unsent

    num_left: list[int | None] = []
    for name in options.runs or names:
        try:
            num_left.append(send(name))
        except InputError as error:  # a run that is running or damaged must not keep the others from it
            if options.runs:
                raise
            print(f"warning: {error}", file=sys.stderr)
            num_left.append(1)
    if all(each is None for each in num_left):
        print("Nothing is left to send.")
    return 1 if any(num_left) else 0


if __name__ == "__main__":
    run(main, extra="train")
