"""Find the stored run that flags refer to."""

from diffusion.errors import InputError
from diffusion.files import path_kind
from workflows.cli.run_options import RunFlags
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


def run_to_resume(flags: RunFlags, data: str | None, command: Command) -> RunRecord | None:
    """Find the run that `--resume` refers to: the one of --name, or the newest unfinished one.

    Args:
        flags: flags with the name, the experiment and the output folder.
        data: resolved name of the data that the run must use, or None for any data.
        command: command that must have started the run.

    Returns:
        The record of the run, or None if its folder exists but has no record yet: the run then starts from
        scratch.

    Raises:
        InputError: there is no such run, it is finished, its record is damaged, or only another version of
            ray-ddpm can read it.
    """
    not_found = InputError(
        f"--resume --name {flags.name}: no such run in {flags.output_dir}; start it without --resume"
        if flags.name is not None
        else f"--resume: no unfinished run of {command}.py in {flags.output_dir}; start one without --resume"
    )
    if "://" not in flags.output_dir and path_kind(flags.output_folder()) != "folder":
        raise not_found
    runs = output_storage(flags)
    if flags.name is not None:
        record = read_record(runs.child(flags.name))
        if record is None and flags.name not in runs.names():
            raise not_found
        if record is None and (left := [each for each in _MADE_LATER if runs.exists(f"{flags.name}/{each}")]):
            raise InputError(
                f"--resume --name {flags.name}: {runs.child(flags.name)} has no run.json, but {left[0]}/ of "
                "a run: restore run.json from a copy, or give a new run another --name"
            )
        if record is not None and record.name != flags.name:
            raise InputError(
                f"--resume --name {flags.name}: this folder holds the run {record.name}, so it was copied or "
                f"renamed; call it {record.name} again to resume that"
            )
        if record is not None and record.command != command:
            raise InputError(
                f"--resume --name {flags.name}: this is a run of {record.command}.py; resume it with that"
            )
        if record is not None and record.status == "finished":
            raise InputError(
                f"--resume --name {flags.name}: this run is finished; give another --name for a new run"
            )
        return record
    records: list[RunRecord] = []
    unreadable: InputError | None = None
    for name in runs.names():
        try:
            record = read_record(runs.child(name))
        except InputError as error:  # one damaged record must not keep the others from being resumed
            unreadable = error
            continue
        if record is not None and record.name == name:
            records.append(record)
    matching = [
        record
        for record in records
        if (record.command, record.status != "finished") == (command, True)
        and data in (None, record.config.data.name)
        and flags.experiment in (None, record.experiment)
    ]
    if not matching:
        raise unreadable or not_found
    return max(matching, key=lambda record: record.started)
