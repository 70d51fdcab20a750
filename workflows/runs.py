"""Runs of train.py and tune.py on disk: one folder each, with `run.json` to find and resume it by."""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from diffusion.config import Config
from diffusion.errors import InputError
from workflows.options import RunFlags
from workflows.storage import Storage

_FILE = "run.json"
Command = Literal["train", "tune"]
Status = Literal["running", "stopped", "failed", "finished"]


@dataclass(frozen=True)
class RunRecord:
    """What must be known of a run to go on with it.

    Attributes:
        name: of the run and its folder.
        experiment: in MLflow.
        run_id: in MLflow.
        config: the tree of its config.
        data_fingerprint: of the data it trains on.
        status: how it stands; `running` may also mean that it was killed.
        command: that made it.
        started: seconds since 1970.
        options: what a sweep was told besides its config, see `TuneOptions.kept`.
    """

    name: str
    experiment: str
    run_id: str
    config: dict[str, Any]
    data_fingerprint: str
    status: Status = "running"
    command: Command = "train"
    started: float = field(default_factory=time.time)
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Storage, status: Status) -> "RunRecord":
        """Write it into a run's folder with a new status."""
        record = replace(self, status=status)
        folder.write_text(_FILE, json.dumps(asdict(record), indent=2) + "\n")
        return record


def output_storage(flags: RunFlags) -> Storage:
    """Where runs are kept, local or not.

    Raises:
        InputError: it cannot be reached or written.
    """
    if "://" in flags.output_dir:
        return Storage(flags.output_dir)
    return Storage(str(flags.output_folder()))


def read_record(folder: Storage) -> RunRecord | None:
    """The record in a run's folder, or None where there is none that can be read."""
    try:
        text = folder.read_text(_FILE)
        return RunRecord(**json.loads(text)) if text else None
    except (ValueError, TypeError):
        return None


def run_to_resume(flags: RunFlags, data: str | None, command: Command) -> RunRecord | None:
    """The run that `--resume` means: the named one, or the newest unfinished one.

    Args:
        flags: name, experiment and output folder.
        data: that the run must be of (a resolved name), or None for any.
        command: that the run must have been made by.

    Returns:
        None where the named folder is there but holds no record yet: the run starts afresh.

    Raises:
        InputError: there is no such run, or it is finished.
    """
    no_such = InputError(
        f"--resume --name {flags.name}: {flags.output_dir} holds no such run; start it without --resume"
        if flags.name is not None
        else f"--resume: {flags.output_dir} holds no unfinished run of {command}.py; start one without it"
    )
    if "://" not in flags.output_dir and not flags.output_folder().is_dir():
        raise no_such
    runs = output_storage(flags)
    if flags.name is not None:
        record = read_record(runs.child(flags.name))
        if record is None and flags.name not in runs.names():
            raise no_such
        if record is not None and record.command != command:
            raise InputError(
                f"--resume --name {flags.name}: it is a run of {record.command}.py; go on with that"
            )
        if record is not None and record.status == "finished":
            raise InputError(
                f"--resume --name {flags.name}: it is finished; give another --name for a new run"
            )
        return record
    records = [read_record(runs.child(name)) for name in runs.names()]
    matching = [
        record
        for record in records
        if record is not None
        and (record.command, record.status != "finished") == (command, True)
        and data in (None, record.config["data"]["name"])
        and flags.experiment in (None, record.experiment)
    ]
    if not matching:
        raise no_such
    return max(matching, key=lambda record: record.started)


def check_same_config(given: Config, kept: Config) -> None:
    """See that a run goes on with the config it was started with.

    Raises:
        InputError: a parameter differs; it is named.
    """
    old = kept.flat()
    for name, value in given.flat().items():
        # Where data are kept in memory does not change what is learned from them.
        if value != old[name] and name != "data.memory_limit_gb":
            flag = "data" if name == "data.name" else name.removeprefix("data.").replace("_", "-")
            raise InputError(
                f"--{flag} {value}: the run to be resumed was started with {old[name]}; leave the flag out, "
                "or start a new run"
            )


def model_folder(path: str) -> Path:
    """The folder with a model that `--init-from` means: a model, a checkpoint, or a run's own.

    Raises:
        InputError: there is none.
    """
    root = Path(path).expanduser().absolute()
    checkpoints = sorted(root.glob("checkpoints/[0-9]*"), reverse=True)
    for folder in (root, root / "model", root / "champion", *checkpoints):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise InputError(
        f"--init-from {path}: no model there; give a run's folder, its model/, or one of its checkpoints/"
    )
