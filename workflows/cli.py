"""From a command line to options, with one clear line and exit status 2 for bad input."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import tyro
from tyro import _errors as tyro_errors  # private: tyro is pinned in constraints.txt

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.sources import resolve
from workflows.options import RunFlags, TrainFlags, TrainOptions
from workflows.search_space import flag_of_searched
from workflows.tune_options import UNLIMITED, TuneFlags, TuneOptions

if TYPE_CHECKING:
    from workflows.runs import Command, RunRecord

_T = TypeVar("_T")


def parse_tune_options(arguments: Sequence[str]) -> tuple[TuneOptions, "RunRecord | None"]:
    """The options of a sweep, and the record of the one that it goes on with.

    Raises:
        InputError: an unknown flag or data set, or a value that is not allowed.
        SystemExit: help was asked for and has been printed.
    """
    known = _early(arguments, "tune.py", TuneFlags)
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if searched := flag_of_searched(flag):
            raise InputError(f"{flag} is searched by a sweep: use {searched} with one value to fix it")
    record = _record_to_resume(arguments, known, "tune")
    if record is not None:
        config = Config.from_dict(record.config)
        names = {"name": record.name, "experiment": record.experiment}
        defaults = TuneOptions.for_run(config, record.options, **names)
    else:
        defaults = TuneOptions.for_data(_data(known.data), _size(known.image_size))
        if _given("--time-budget", arguments):
            defaults = dataclasses.replace(defaults, num_trials=UNLIMITED)
    return parse(TuneOptions, arguments, prog="tune.py", default=defaults), record


def parse_train_options(arguments: Sequence[str]) -> tuple[TrainOptions, "RunRecord | None"]:
    """The options of a training, and the record of the run that it goes on with.

    The defaults are those of the data, or of the run that is resumed; `--init-from` brings its network.

    Raises:
        InputError: an unknown flag, data set or run, or a value that is not allowed.
        SystemExit: help was asked for and has been printed.
    """
    known = _early(arguments, "train.py", TrainFlags)
    record = _record_to_resume(arguments, known, "train")
    if record is not None:
        config = Config.from_dict(record.config)
        defaults = TrainOptions.for_config(config, name=record.name, experiment=record.experiment)
    else:
        defaults = TrainOptions.for_data(_data(known.data), _size(known.image_size))
    if known.init_from and record is None:
        from workflows.runs import model_folder

        tree = json.loads((model_folder(known.init_from) / "config.json").read_text())
        network = Config.from_dict({"network": tree["config"]["network"]}).network
        defaults = dataclasses.replace(defaults, network=network)
    return parse(TrainOptions, arguments, prog="train.py", default=defaults), record


def _record_to_resume(
    arguments: Sequence[str], known: argparse.Namespace, command: "Command"
) -> "RunRecord | None":
    """The record of the run that --resume means; None without it, or where that run wrote nothing yet."""
    if "--resume" not in arguments:
        return None
    from workflows.runs import run_to_resume

    output_dir = known.output_dir or (TrainFlags() if command == "train" else TuneFlags()).output_dir
    flags = RunFlags(name=known.name, experiment=known.experiment, output_dir=output_dir)
    return run_to_resume(flags, resolve(known.data) if known.data else None, command)


def _early(arguments: Sequence[str], prog: str, flags: type) -> argparse.Namespace:
    """The flags that the defaults of the others depend on; prints the short help where it is asked for."""
    if {"-h", "--help"} & set(arguments):
        print_short_help(prog, flags)
    both = [flag for flag in ("--training.num-epochs", "--training.num-updates") if _given(flag, arguments)]
    if len(both) == 2:
        raise InputError(
            "--training.num-epochs and --training.num-updates say the same thing: give one of them"
        )
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--data", "--image-size", "--name", "--experiment", "--output-dir", "--init-from"):
        early.add_argument(flag, nargs="?")
    return early.parse_known_args(list(arguments))[0]


def _given(flag: str, arguments: Sequence[str]) -> bool:
    spelled = {argument.split("=", 1)[0].replace("_", "-") for argument in arguments}
    return flag in spelled


def _data(text: str | None) -> str:
    return RunFlags.data if text is None else text


def _size(text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise InputError(f"--image-size {text}: give a whole number of pixels")
    return None if text is None else int(text)


def parse(options: type[_T], arguments: Sequence[str], *, prog: str, default: _T) -> _T:
    """Parse with tyro, turning each of its error boxes into an InputError of one line."""
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    with tyro_errors.on_parse_error(_raise_as_input_error):
        return tyro.cli(
            options, prog=prog, args=arguments, default=default, config=(tyro.conf.FlagCreatePairsOff,)
        )


def print_short_help(prog: str, flags: type) -> None:
    """Print the flags that people use first, and exit."""
    try:
        tyro.cli(flags, prog=prog, args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
    finally:
        print("All flags, the whole tree of parameters: --help-all")


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Call main with the process's arguments and exit with its status; bad input exits with 2."""
    try:
        status = main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # at once: Ray's threads, where it still ran, would each tell of its end
    sys.exit(status)


def _raise_as_input_error(event: tyro_errors.ParseErrorEvent) -> None:
    match event:
        case tyro_errors.UnrecognizedArgs(tokens=tokens):
            message = f"unknown argument {' '.join(tokens)}: --help-all shows every flag"
        case tyro_errors.InvalidChoice(argument=argument, value=value, choices=choices):
            message = f"{argument.lowered.name_or_flags[0]} {value}: choose one of {', '.join(choices)}"
        case tyro_errors.BadValue(argument=argument):
            message = f"{argument.lowered.name_or_flags[0]} needs a value: --help-all shows which"
        case tyro_errors.InstantiationFailure(message=text, argument=argument):
            message = _not_a_number(text)
            if argument is not None and not message.startswith("--"):
                message = f"{argument.lowered.name_or_flags[0]} {message}"
        case _:
            return  # tyro's own box, and its exit status 2
    raise InputError(" ".join(message.split()))


def _not_a_number(text: str) -> str:
    """Python's words for a value that is no number, in ours."""
    if text.startswith("Could not find valid parse"):
        return f"{text.split(': ', 1)[-1].strip('[]')}: give numbers of the right kind"
    for start, wanted in (
        ("invalid literal for int", "a whole number"),
        ("could not convert string to float", "a number"),
    ):
        if text.startswith(start):
            return f"{text.rsplit(': ', 1)[-1]}: give {wanted}"
    return text
