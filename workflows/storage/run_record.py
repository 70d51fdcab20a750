"""`run.json`: the record by which train.py and tune.py find and resume a run; each run has its own folder.

Its format version is that of the whole folder, with the checkpoints or the trials in it.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal, get_type_hints

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.files import FormatError, check_format, os_reason, package_version, parse_json, version_name
from diffusion.json_values import check_types
from workflows.status import Status
from workflows.storage.storage import Storage

_FILE = "run.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Raise it when earlier versions of ray-ddpm cannot resume a run from what this one writes into its folder.
FORMAT_VERSION = 2
# Format 1, which does not state its version, has no `provenance`; its other fields are those of format 2.
_READABLE_FORMATS = (1, 2)
Command = Literal["train", "tune"]


@dataclass(frozen=True)
class RunRecord:
    """What is needed to resume a run.

    Attributes:
        name: name of the run and of its folder.
        experiment: name of its MLflow experiment.
        run_id: ID of its MLflow run.
        config: its config.
        data_fingerprint: fingerprint of the data it trains on.
        status: last known status; `running` may also mean that the process was killed.
        command: program that created the run.
        started: start time in seconds since 1970.
        options: options of a sweep that are not part of its config, see `TuneOptions.resume_options`.
        provenance: origin of each session of the run, oldest first: command line, packages, hardware, code.
            Sessions of format 1 are missing.
    """

    name: str
    experiment: str
    run_id: str
    config: Config
    data_fingerprint: str
    status: Status = "running"
    command: Command = "train"
    started: float = field(default_factory=time.time)
    options: dict[str, Any] = field(default_factory=dict)
    provenance: list[dict[str, Any]] = field(default_factory=list)

    def with_session(self, provenance: dict[str, Any]) -> "RunRecord":
        """The record with the origin of one more session."""
        return replace(self, provenance=[*self.provenance, provenance])

    def check_unchanged(
        self, config: Config, data_fingerprint: str, options: Mapping[str, Any] | None = None
    ) -> None:
        """Check that the run is resumed with the config, the options and the data that it was started with.

        Args:
            config: config of this session.
            data_fingerprint: fingerprint of this session's data.
            options: those of this session's options that must be the same, by name.

        Raises:
            InputError: something differs.
        """
        noun = "sweep" if self.command == "tune" else "run"
        check_same_config(config, self.config)
        for name, value in (options or {}).items():
            if json.loads(json.dumps(value)) != self.options[name]:  # the record was read from JSON
                raise InputError(
                    f"--{name.replace('_', '-')} differs from what the {noun} to be resumed was started "
                    f"with; leave it out, or start a new {noun}"
                )
        if data_fingerprint != self.data_fingerprint:
            raise InputError(
                f"--resume: the data of {config.data.name} have changed since the {noun} {self.name} was "
                f"started; restore them, or start a new {noun}"
            )

    def write(self, folder: Storage, status: Status) -> "RunRecord":
        """Write the record with a new status into the run's folder, and return it."""
        record = replace(self, status=status)
        format = {"format_version": FORMAT_VERSION, "ray_ddpm_version": package_version("ray-ddpm")}
        folder.write_text(_FILE, json.dumps(format | asdict(record), indent=2) + "\n")
        return record


def read_record(folder: Storage) -> RunRecord | None:
    """Record in a run's folder, or None if there is none.

    Raises:
        FormatError: another version of ray-ddpm wrote it, in a format or with a parameter that this one does
            not know.
        InputError: it cannot be read or is damaged.
    """
    where, remedy = f"{folder}/{_FILE}", "restore it from a copy, or give a new run another --name"
    try:
        content = folder.read_bytes(_FILE)
    except OSError as error:
        raise InputError(f"{where} cannot be read ({os_reason(error)}): {remedy}") from error
    if content is None:
        return None
    tree = parse_json(content, dict, where, remedy)
    written_by = tree.pop("ray_ddpm_version", None)
    check_format(where, tree.pop("format_version", 1), _READABLE_FORMATS, written_by)
    damaged = f"{where} is damaged ({{}}): {remedy}"
    try:
        check_types(tree, _hints())
        if not _NAME.fullmatch(tree["name"]):
            raise InputError(f"name {tree['name']!r}")
    except (InputError, KeyError) as error:
        raise InputError(damaged.format(error)) from error
    try:
        return RunRecord(**(tree | {"config": Config.from_dict(tree["config"])}))
    except (TypeError, KeyError) as error:
        raise InputError(damaged.format(error)) from error
    except InputError as error:
        known = version_name(written_by)
        raise FormatError(f"{where}, written by {known}: {error}; use {known} for it") from error


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(RunRecord) | {"config": dict[str, Any]}


def check_same_config(given: Config, recorded: Config) -> None:
    """Check that a run is resumed with the config it was started with.

    Raises:
        InputError: a parameter differs; the message names it.
    """
    old = recorded.flat()
    for name, value in given.flat().items():
        # The memory limit decides where the data are kept, which does not change the training.
        if value != old[name] and name != "data.memory_limit_gb":
            flag = "data" if name == "data.name" else name.removeprefix("data.").replace("_", "-")
            raise InputError(
                f"--{flag} {value}: the run to be resumed was started with {old[name]}; leave the flag out, "
                "or start a new run"
            )
