"""The short help of train.py and tune.py, and the flag that was probably meant by an unknown one."""

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches

import tyro
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from diffusion.config import Config, ScheduleConfig, TrainingConfig
from diffusion.presets import preset
from workflows.cli.keyword_settings import help_texts, section_types
from workflows.cli.run_options import RunFlags, RunOptions, TrainFlags, TrainOptions
from workflows.cli.search_space import SearchSpace, format_values, search_flag_for
from workflows.cli.tune_options import SIZES_FOR_POINTS, TuneOptions

SHORT_FORMS = {
    "--lr": "--training.learning-rate",
    "--batch-size": "--training.batch-size",
    "--num-updates": "--training.num-updates",
    "--num-epochs": "--training.num-epochs",
}
SHORT_FORMS_OF_SWEEPS = {**SHORT_FORMS, "--lr": "--search.learning-rate"}  # a sweep searches it
_LENGTH = ("--num-updates", "--num-epochs", "--batch-size")
_SCHEDULE = ("num_train_timesteps", "kind", "beta_start", "beta_end")
_SEARCHED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "learning_rate",
    "time_embedding_size",
    "data_embedding_size",
    "hidden_size",
    "num_blocks",
)
# An example of each kind of data, whose presets differ.
_KINDS = {"digits": "images up to 8x8", "heart": "points", "mnist": "larger images"}


def print_short_help(prog: str, flags: type[RunFlags]) -> None:
    """Print the help of the most used flags, and exit.

    Args:
        prog: name of the command.
        flags: class of its own flags; those of the config that everybody looks for are added.
    """
    try:
        tyro.cli(flags, prog=prog, args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
    finally:
        console = Console()
        if issubclass(flags, TrainFlags):
            rows = [*_length_rows(alone=True), ("--lr", *_of_training("learning_rate", alone=True))]
            console.print(_panel("training and noise schedule", [*rows, *_schedule_rows()]))
        else:
            console.print(_panel("each trial", _length_rows(alone=False)))
            console.print(_panel("what is searched; one value fixes a parameter", _search_rows()))
        print("--help-all shows all flags, including every parameter of the config")


def suggestion(unknown: str, kind: type[RunOptions]) -> str:
    """Hint for an unknown flag: the one that was probably meant; empty if none is similar.

    Args:
        unknown: the flag, such as --epochs.
        kind: options of the command.
    """
    given = unknown.split("=", 1)[0].replace("_", "-")
    other, name = (TuneOptions, "tune.py") if kind is TrainOptions else (TrainOptions, "train.py")
    if given in all_flags(other):
        return f"it is a flag of {name}"
    known = all_flags(kind)
    short = SHORT_FORMS_OF_SWEEPS if kind is TuneOptions else SHORT_FORMS
    by_end = {_end(flag): flag for flag in known} | {_end(dotted): flag for flag, dotted in short.items()}
    words = set(given.removeprefix("--").split("-"))
    # Flags with all of its words, such as --num-epochs for --epochs, or else one of similar letters.
    found = sorted((end for end in by_end if words <= set(end.removeprefix("--").split("-"))), key=len)
    similar = get_close_matches(given, [*by_end, *known], 1)
    found = list(dict.fromkeys(by_end.get(each, each) for each in found[:2] or similar))
    return f"did you mean {' or '.join(found)}?" if found else ""


def all_flags(kind: type[RunOptions]) -> list[str]:
    """Flags of a command, with the short form in place of a dotted one that has one."""
    is_sweep = kind is TuneOptions
    short = SHORT_FORMS_OF_SWEEPS if is_sweep else SHORT_FORMS
    parts = section_types(kind)
    own = [field.name.replace("config_file", "config") for field in fields(kind) if field.name not in parts]
    dotted = [f"{name}.{each.name}" for name, part in parts.items() for each in fields(part)]
    flags = [f"--{name.replace('_', '-')}" for name in (*own, *dotted)]
    hidden = {*short.values(), *(flag for flag in flags if is_sweep and search_flag_for(flag))}
    return [*short, *(flag for flag in flags if flag not in hidden)]


def _end(flag: str) -> str:
    """The flag without its section: --training.learning-rate gives --learning-rate."""
    return f"--{flag.removeprefix('--').rsplit('.', 1)[-1]}"


def _length_rows(*, alone: bool) -> list[tuple[str, str, str]]:
    names = {flag: SHORT_FORMS[flag].rsplit(".", 1)[-1].replace("-", "_") for flag in _LENGTH}
    return [(flag, *_of_training(name, alone=alone)) for flag, name in names.items()]


def _of_training(name: str, *, alone: bool) -> tuple[str, str]:
    """Text and default of a parameter of the training."""
    defaults = {
        kind: str(preset(data, alone=alone).flat()[f"training.{name}"]) for data, kind in _KINDS.items()
    }
    values = list(dict.fromkeys(defaults.values()))
    default = (
        values[0] if len(values) == 1 else ", ".join(f"{kind} {each}" for kind, each in defaults.items())
    )
    return help_texts(TrainingConfig)[name], default


def _schedule_rows() -> list[tuple[str, str, str]]:
    texts, schedule = help_texts(ScheduleConfig), Config().schedule
    return [
        (f"--schedule.{name.replace('_', '-')}", texts[name], f"{getattr(schedule, name)}")
        for name in _SCHEDULE
    ]


def _search_rows() -> list[tuple[str, str, str]]:
    texts, space = help_texts(SearchSpace), SearchSpace(**SIZES_FOR_POINTS)
    rows = []
    for name in _SEARCHED:
        flag = "--lr" if name == "learning_rate" else f"--search.{name.replace('_', '-')}"
        values = getattr(space, name)
        rows.append((flag, texts[name], format_values(values)))
    return rows


def _panel(title: str, rows: Iterable[tuple[str, str, str]]) -> Panel:
    """Rows of flag, help text and default, in the look of tyro's help."""
    grid = Table.grid(padding=(0, 2))
    for flag, text, default in rows:
        grid.add_row(Text(flag, style="bold"), Text(f"{' '.join(text.split())} (default: {default})"))
    return Panel(grid, title=title, title_align="left", border_style="dim")
