"""From a command line to options, with one clear line and exit status 2 for bad input."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro
from tyro import _errors as tyro_errors  # private: tyro is pinned in constraints.txt

from diffusion.errors import InputError
from workflows.options import TuneFlags, TuneOptions
from workflows.search_space import flag_of_searched

_T = TypeVar("_T")


def parse_tune_options(arguments: Sequence[str]) -> TuneOptions:
    """The options of a sweep.

    Raises:
        InputError: an unknown flag or data set, or a value that is not allowed.
        SystemExit: help was asked for and has been printed.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--data", nargs="?", default=TuneFlags.data)
    early.add_argument("--image-size", nargs="?")
    known, _ = early.parse_known_args(list(arguments))
    if {"-h", "--help"} & set(arguments):
        print_short_help("tune.py", TuneFlags)
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if searched := flag_of_searched(flag):
            raise InputError(f"{flag} is searched by a sweep: use {searched} with one value to fix it")
    size = int(known.image_size) if (known.image_size or "").isdecimal() else None  # tyro refuses the rest
    defaults = TuneOptions.for_data(TuneFlags.data if known.data is None else known.data, size)
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    return parse(TuneOptions, arguments, prog="tune.py", default=defaults)


def parse(options: type[_T], arguments: Sequence[str], *, prog: str, default: _T) -> _T:
    """Parse with tyro, turning each of its error boxes into an InputError of one line."""
    with tyro_errors.on_parse_error(_raise_as_input_error):
        return tyro.cli(
            options, prog=prog, args=list(arguments), default=default, config=(tyro.conf.FlagCreatePairsOff,)
        )


def print_short_help(prog: str, flags: type) -> None:
    """Print the flags that people use first, and exit."""
    try:
        tyro.cli(flags, prog=prog, args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
    finally:
        print("All flags, the search space included: --help-all")


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Call main with the process's arguments and exit with its status; bad input exits with 2."""
    try:
        status = main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 1
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
