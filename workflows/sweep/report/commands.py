"""Commands that go on from a finished sweep, and those that repeat it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.config import IN_MEMORY, Config, DataConfig
from diffusion.errors import InputError
from diffusion.presets import preset
from workflows.cli.run_options import DATA_FLAGS
from workflows.terminal import display_path

_DEFAULT_RUNS = "runs"


@dataclass(frozen=True)
class Command:
    """A command and what it does.

    Attributes:
        purpose: what it does, in a few words.
        text: the command, as it can be pasted into a shell.
    """

    purpose: str
    text: str


def next_commands(
    directory: Path,
    config: Config,
    num_trials: int,
    location_hint: str,
    *,
    interrupted: bool,
    bucket: str | None = None,
) -> list[Command]:
    """What to run after a sweep.

    Args:
        directory: folder of the sweep.
        config: config of its champion.
        num_trials: number of its trials.
        location_hint: where the tracker shows its runs, a command or a URL.
        interrupted: whether the sweep was interrupted.
        bucket: address of a sweep in a bucket, whose champion has to be copied first; else None.
    """
    champion = display_path(directory / "champion") if bucket is None else "champion"
    sampler = shlex.quote(f"{champion}/sampler.onnx")
    commands = []
    if interrupted:
        parent = display_path(directory.parent) if bucket is None else bucket.rpartition("/")[0]
        place = [] if parent == _DEFAULT_RUNS else ["--output-dir", parent]
        resume = ["python", "-m", "workflows.tune", "--resume", "--name", directory.name, *place]
        commands.append(Command("Run the trials that are missing", shlex.join(resume)))
    if bucket is not None:
        copy = "gcloud storage cp" if bucket.startswith("gs:") else "aws s3 cp"
        source = shlex.quote(f"{bucket}/champion")
        commands.append(Command("Copy the champion", f"{copy} --recursive {source} champion"))
    commands.append(
        Command(
            "Draw samples, without PyTorch",
            f"python -m export.sampler {sampler} --num-samples 64 --output samples.png",
        )
    )
    if location_hint:
        commands.append(Command("See every run in the tracker", location_hint))
    if not config.data.name.startswith(IN_MEMORY):
        data = shlex.join(_data_flags(config.data))
        again = f"python -m workflows.tune {data} --start-from {shlex.quote(f'{champion}/config.json')}"
        commands += [
            Command(
                "Compare it with other models or programs",
                f"python -m workflows.evaluate {sampler} {_of_evaluate(config.data)}",
            ),
            Command("Search on from its parameters", f"{again} --num-trials {num_trials}"),
        ]
    return commands


def training_command(config: Config) -> str | None:
    """The command that trains a config alone; None for data that were in memory.

    It names every value that differs from the default for these data.
    """
    if config.data.name.startswith(IN_MEMORY):
        return None
    try:
        default = preset(config.data.name, config.data.image_size, alone=True).flat()
    except InputError:  # the data have been moved
        default = {}
    flags = [*_data_flags(config.data), *_flag("seed", config.seed, 0)]
    given = {
        name: value
        for name, value in config.flat().items()
        if "." in name and not name.startswith("data.") and value != default.get(name)
    }
    # Values of the sampler switch the choice of a sampler off, and no flag does it alone.
    given.pop("metrics.choose_sampler", None)
    keeps_sampler = any(name.startswith("sampler.") for name in given)
    if keeps_sampler == config.metrics.choose_sampler:
        extra = "metrics.choose_sampler" if keeps_sampler else "sampler.name"
        given[extra] = config.flat()[extra]
    unset = Config().flat()
    for name, value in given.items():
        # The flag of a boolean exists only where it changes the class's default.
        flags += _flag(name, value, unset[name] if isinstance(value, bool) else None)
    return f"python -m workflows.train {shlex.join(flags)}"


def recorded_command(command: str) -> str:
    """A command line as it was recorded, with the interpreter before a script."""
    return f"python {command}" if command.split(" ", 1)[0].endswith(".py") else command


def _data_flags(config: DataConfig) -> list[str]:
    default = DataConfig()
    flags = ["--data", config.name]
    for name in DATA_FLAGS:
        flags += _flag(name, getattr(config, name), getattr(default, name))
    return flags


def _of_evaluate(config: DataConfig) -> str:
    """The flags of `_data_flags` that `workflows.evaluate` has."""
    flags = ["--data", config.name]
    for name in ("image_size", "label_column", "split_column", "group_column", "skip_bad_images"):
        flags += _flag(name, getattr(config, name), getattr(DataConfig(), name))
    return shlex.join(flags)


def _flag(name: str, value: Any, default: Any) -> Sequence[str]:
    """A flag and its value as on the command line; nothing for the default."""
    if value == default and default is not None or value is None and default is None:
        return []
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        section, _, last = flag.rpartition(".")
        prefix = f"{section}." if section else ""
        return [f"--{prefix}{last}" if value else f"--{prefix}no-{last}"]
    if isinstance(value, list | tuple):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}", str(value)]
