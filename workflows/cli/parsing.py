"""Parse command lines into options; bad input gives a one-line message and exit status 2."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import tyro
from tyro import _errors as tyro_errors  # private: tyro is pinned in constraints.txt

from diffusion.data.sources import open_source, resolve
from diffusion.errors import InputError
from diffusion.registry import DATA_SOURCES, NETWORKS, OBJECTIVES, SAMPLERS, SCHEDULES
from workflows.cli.model_reference import find_start
from workflows.cli.request import OptionsT, RunRequest
from workflows.cli.run_options import RunFlags, RunOptions, TrainFlags, TrainOptions, flag_name
from workflows.cli.search_space import search_flag_for
from workflows.cli.short_help import SHORT_FORMS, SHORT_FORMS_OF_SWEEPS, print_short_help, suggestion
from workflows.cli.tune_options import TuneFlags, TuneOptions
from workflows.storage.run_record import Command, RunRecord

_T = TypeVar("_T")
_EARLY_FLAGS = (
    "--data",
    "--image-size",
    "--name",
    "--experiment",
    "--output-dir",
    "--tracking-uri",
    "--config",
    "--init-from",
)


def parse_tune_options(arguments: Sequence[str], prog: str = "tune.py") -> RunRequest[TuneOptions]:
    """Parse the options of a sweep, and find the record of the sweep to resume, if any.

    Args:
        arguments: command-line arguments.
        prog: name of the program in its help.

    Raises:
        InputError: an unknown flag or data set, or a value that is not allowed.
        SystemExit: help was asked for and has been printed.
    """
    arguments = _expand_short_forms(with_hyphens(arguments), SHORT_FORMS_OF_SWEEPS)
    early_flags = _parse_early_flags(arguments, prog, TuneFlags)
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if search_flag := search_flag_for(flag):
            raise InputError(f"{flag} is searched by a sweep: use {search_flag} with one value to fix it")
    record = _record_to_resume(arguments, early_flags, "tune")
    defaults, kept = TuneOptions.defaults(record, limits_time=_is_given("--time-budget", arguments))
    return _request(TuneOptions, prog, arguments, early_flags, defaults, record, kept)


def parse_train_options(arguments: Sequence[str], prog: str = "train.py") -> RunRequest[TrainOptions]:
    """Parse the options of a training, and find the record of the run to resume, if any.

    The defaults depend on the data. A resumed run keeps its own config, and `--init-from` sets the network.

    Args:
        arguments: command-line arguments.
        prog: name of the program in its help.

    Raises:
        InputError: an unknown flag, data set or run, or a value that is not allowed.
        SystemExit: help was asked for and has been printed.
    """
    arguments = _expand_short_forms(with_hyphens(arguments), SHORT_FORMS)
    early_flags = _parse_early_flags(arguments, prog, TrainFlags)
    record = _record_to_resume(arguments, early_flags, "train")
    if _is_given("--resume", arguments):  # neither is allowed, as the options will say
        early_flags.config = early_flags.init_from = None
    is_new = record is None
    start = find_start(early_flags.config, early_flags.init_from, early_flags.tracking_uri, is_new=is_new)
    defaults, kept = TrainOptions.defaults(record, start, early_flags.data)
    request = _request(TrainOptions, prog, arguments, early_flags, defaults, record, kept)
    options = dataclasses.replace(request.options, config_file=start.config_file, init_from=start.init_from)
    return dataclasses.replace(request, options=options)


def _request(
    kind: type[OptionsT],
    prog: str,
    arguments: Sequence[str],
    early_flags: argparse.Namespace,
    defaults: OptionsT,
    record: RunRecord | None,
    kept: Mapping[str, Any],
) -> RunRequest[OptionsT]:
    """Parse the arguments.

    Args:
        kind: class of the options.
        prog: name of the program in messages.
        arguments: the arguments.
        early_flags: their early flags.
        defaults: default options; complete if a run is resumed.
        record: record of the run to resume, or None.
        kept: values among the defaults that those of the data do not replace, by dotted name.
    """
    if record is None:
        image_size = _image_size(early_flags.image_size)
        if "--help-all" in arguments:  # shows the defaults, for which the data have to be opened
            data = RunFlags.data if early_flags.data is None else early_flags.data
            options = dataclasses.replace(defaults, data=data, image_size=image_size)
            defaults = options.with_preset(open_source(options.data_config()), kept)
    options = parse(kind, arguments, prog=prog, default=defaults)
    options.data_config()  # fails if the data do not exist
    return RunRequest(options, kept, _given_values(options, arguments), record)


def _record_to_resume(
    arguments: Sequence[str], early_flags: argparse.Namespace, command: Command
) -> RunRecord | None:
    """Find the record of the run to resume; None for a new run, or if the run has no record yet."""
    starts = _is_given("--start-or-resume", arguments)
    if not starts and not _is_given("--resume", arguments):
        return None
    from workflows.cli.resume import run_to_resume

    output_dir = early_flags.output_dir or (TrainFlags() if command == "train" else TuneFlags()).output_dir
    flags = RunFlags(
        data=early_flags.data or RunFlags.data,
        name=early_flags.name,
        experiment=early_flags.experiment,
        output_dir=output_dir,
        resume=not starts,
        start_or_resume=starts,
    )
    extends = any(_is_given(flag, arguments) for flag in ("--num-trials", "--time-budget"))
    return run_to_resume(flags, command, any_data=not _is_given("--data", arguments), extends=extends)


def _parse_early_flags(arguments: Sequence[str], prog: str, flags: type) -> argparse.Namespace:
    """Parse the flags on which defaults of other flags depend; --help prints the short help and exits."""
    if {"-h", "--help"} & set(arguments):
        print_short_help(prog, flags)
    if all(_is_given(flag, arguments) for flag in ("--training.num-epochs", "--training.num-updates")):
        raise InputError(
            "--training.num-epochs and --training.num-updates both set the length: give one of them"
        )
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in _EARLY_FLAGS:
        parser.add_argument(flag, nargs="?")
    early_flags = parser.parse_known_args(list(arguments))[0]
    if early_flags.data is not None:
        early_flags.data = resolve(early_flags.data)
    return early_flags


def _expand_short_forms(arguments: Sequence[str], forms: Mapping[str, str]) -> list[str]:
    """Replace short forms of dotted flags by these."""
    expanded = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        expanded.append(forms.get(flag, flag) + equals + value)
    return expanded


def with_hyphens(arguments: Sequence[str]) -> list[str]:
    """Arguments with hyphens in the names of flags: --image_size=8 becomes --image-size=8.

    tyro takes both; every other look at the arguments has to find the same flags.
    """
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        result.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return result


def _given_values(options: RunOptions, arguments: Sequence[str]) -> dict[str, Any]:
    """Values of the flags that a command line gives, among those that a preset of the data has."""
    flags = {flag_name(argument) for argument in arguments}
    # A boolean that is true by default has the flag --section.no-name.
    return {
        name: value
        for name, value in options.preset_values().items()
        if flags & {name, ".no_".join(name.split("."))}
    }


def _is_given(flag: str, arguments: Sequence[str]) -> bool:
    return flag in {argument.split("=", 1)[0].replace("_", "-") for argument in arguments}


def _image_size(text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise InputError(f"--image-size {text}: give a whole number of pixels")
    return None if text is None else int(text)


def parse(options: type[_T], arguments: Sequence[str], *, prog: str, default: _T) -> _T:
    """Parse with tyro, turning its error boxes into one-line InputErrors."""
    description = f"{options.__doc__}\n\n{_registered_names()}" if "--help-all" in arguments else None
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    with tyro_errors.on_parse_error(partial(_raise_as_input_error, kind=options)):
        return tyro.cli(
            options,
            prog=prog,
            description=description,
            args=arguments,
            default=default,
            config=(tyro.conf.FlagCreatePairsOff,),
        )


def _registered_names() -> str:
    """What can be named in flags, including what installed packages add."""
    registries = (DATA_SOURCES, NETWORKS, SCHEDULES, SAMPLERS, OBJECTIVES)
    # "/" stands for all folders.
    return "\n\n".join(
        f"{each.kind}: {', '.join(name for name in each if name != '/')}" for each in registries
    )


def _raise_as_input_error(event: tyro_errors.ParseErrorEvent, kind: type) -> None:
    match event:
        case tyro_errors.UnrecognizedArgs(tokens=tokens):
            hint = suggestion(tokens[0], kind) if tokens[0].startswith("--") else ""
            separator = " " if hint.endswith("?") else "; " if hint else ""
            message = f"unknown argument {' '.join(tokens)}: {hint}{separator}--help-all shows every flag"
        case tyro_errors.InvalidChoice(argument=argument, value=value, choices=choices):
            message = f"{argument.lowered.name_or_flags[0]} {value}: choose one of {', '.join(choices)}"
        case tyro_errors.BadValue(argument=argument):
            message = f"{argument.lowered.name_or_flags[0]} needs a value: --help-all shows which"
        case tyro_errors.InstantiationFailure(message=text, argument=argument):
            message = _reword_number_error(text)
            if argument is not None and not message.startswith("--"):
                message = f"{argument.lowered.name_or_flags[0]} {message}"
        case _:
            return  # tyro prints its own error box and exits with status 2
    raise InputError(" ".join(message.split()))


def _reword_number_error(text: str) -> str:
    """Return a clearer message for a value that is not a number."""
    if text.startswith("Could not find valid parse"):
        return f"{text.split(': ', 1)[-1].strip('[]')}: give numbers of the right kind"
    for start, expected in (
        ("invalid literal for int", "a whole number"),
        ("could not convert string to float", "a number"),
    ):
        if text.startswith(start):
            return f"{text.rsplit(': ', 1)[-1]}: give {expected}"
    return text
