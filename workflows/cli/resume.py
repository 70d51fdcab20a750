"""Find the stored run that flags refer to."""

from diffusion.errors import InputError
from diffusion.files import path_kind
from workflows.cli.run_options import RunFlags
from workflows.storage.run_lock import RunLock
from workflows.storage.run_record import Command, RunRecord, read_record
from workflows.storage.storage import Storage

# Folders in that of a run that are made after its record.
_MADE_LATER = ("checkpoints", "trials", "model", "champion")


def output_storage(flags: RunFlags) -> Storage:
    """Open the storage of --output-dir, a local folder or a bucket.

    Raises:
        InputError: the storage cannot be reached or written to.
    """
    try:
        return Storage(flags.output_dir if "://" in flags.output_dir else str(flags.output_folder()))
    except InputError as error:
        raise InputError(f"--output-dir: {error}") from None


def existing_output_storage(flags: RunFlags) -> Storage | None:
    """Open the storage of --output-dir, or return None if it is a local folder that does not exist.

    Raises:
        InputError: the storage cannot be reached or written to.
    """
    return output_storage(flags) if _has_output(flags) else None


def run_to_resume(
    flags: RunFlags, command: Command, *, any_data: bool = False, extends: bool = False
) -> RunRecord | None:
    """Find the run that `--resume` or `--start-or-resume` refers to.

    It is the one of --name, finished or not; without --name the newest unfinished one.

    Args:
        flags: flags with the data, the name, the experiment, the output folder, and which of the two flags
            is given.
        command: command that must have started the run.
        any_data: whether a run without --name may use other data.
        extends: whether a budget is given, so that without --name and without an unfinished run the newest
            finished one is extended.

    Returns:
        The record of the run, or None if there is none yet: its folder exists without a record, or
        `--start-or-resume` starts it. The run then starts from scratch.

    Raises:
        InputError: there is no such run, its record is damaged, or only another version of ray-ddpm can read
            it.
    """
    if flags.name is not None:
        return _run_of_name(flags, flags.name, command)
    records: list[RunRecord] = []
    unreadable: InputError | None = None
    runs = existing_output_storage(flags)
    for name in runs.names() if runs else ():
        try:
            record = read_record(runs.child(name)) if runs else None
        except InputError as error:  # one damaged record must not keep the others from being resumed
            unreadable = error
            continue
        if (
            record is not None
            and record.name == name
            and record.command == command
            and (any_data or flags.data == record.config.data.name)
            and flags.experiment in (None, record.experiment)
        ):
            records.append(record)
    unfinished = [record for record in records if record.status != "finished"]
    if matching := unfinished or (records if extends else []):
        newest = max(matching, key=lambda record: record.started)
        _check_not_running(runs, newest.name)
        return newest
    raise unreadable or InputError(
        f"--resume: no unfinished run of {command}.py in {flags.output_dir}; start one without --resume"
    )


def _run_of_name(flags: RunFlags, name: str, command: Command) -> RunRecord | None:
    flag = "--start-or-resume" if flags.start_or_resume else "--resume"
    runs = existing_output_storage(flags)
    record = read_record(runs.child(name)) if runs else None
    if record is None and not flags.start_or_resume and not (runs and name in runs.names()):
        raise InputError(
            f"{flag} --name {name}: no such run in {flags.output_dir}; start it without {flag}, or with "
            "--start-or-resume"
        )
    if record is None and runs and (left := [each for each in _MADE_LATER if runs.exists(f"{name}/{each}")]):
        raise InputError(
            f"{flag} --name {name}: {runs.child(name)} has no run.json, but {left[0]}/ of a run: restore "
            "run.json from a copy, or give a new run another --name"
        )
    if record is not None and record.name != name:
        raise InputError(
            f"{flag} --name {name}: this folder holds the run {record.name}, so it was copied or renamed; "
            f"call it {record.name} again to resume that"
        )
    if record is not None and record.command != command:
        raise InputError(f"{flag} --name {name}: this is a run of {record.command}.py; resume it with that")
    _check_not_running(runs, name)
    return record


def _check_not_running(runs: Storage | None, name: str) -> None:
    """Check early that no other process runs a run.

    Raises:
        InputError: one does.
    """
    if runs is not None and runs.is_local:
        RunLock(runs.child(name).path).release()


def _has_output(flags: RunFlags) -> bool:
    """Whether the output folder exists, which opening its storage would create."""
    return "://" in flags.output_dir or path_kind(flags.output_folder()) == "folder"
