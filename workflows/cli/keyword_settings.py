"""Settings that a program gives as keyword arguments: checked, and made into options like a command line's.

A setting has the name of its flag with underscores. Those of a section of the config are given together, as a
mapping, `training={"num_updates": 500}`, or as the section's dataclass, `training=TrainingConfig(...)`.
"""

import ast
import inspect
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, get_origin, get_type_hints

import numpy as np

from diffusion.config import Config
from diffusion.data.memory import Examples, memory_name, memory_source
from diffusion.data.sources import resolve
from diffusion.errors import InputError, nearest
from diffusion.json_values import fits, in_words
from workflows.cli.model_reference import find_start
from workflows.cli.request import OptionsT, RunRequest, keep
from workflows.cli.resume import run_to_resume
from workflows.cli.run_options import RunFlags, TrainOptions, sections
from workflows.cli.search_space import search_flag_for
from workflows.cli.tune_options import TuneOptions
from workflows.storage.run_record import Command, RunRecord

# Settings of `workflows.api` that are no flags.
_EXTRA = ("labels", "config")

Data = str | os.PathLike[str] | Examples


def tune_request(
    data: Data, labels: Sequence[int | str] | None, settings: Mapping[str, object]
) -> RunRequest[TuneOptions]:
    """Make the request of a sweep.

    Args:
        data: name, path, or examples in memory.
        labels: class of each example in memory, or None.
        settings: settings by name.

    Raises:
        InputError: an unknown setting, a value that is not allowed, or data that cannot be used.
    """
    flags, values = _split(TuneOptions, settings)
    search = {
        name.removeprefix("search."): values.pop(name) for name in list(values) if name[:7] == "search."
    }
    for name in [name for name in values if search_flag_for(name)]:
        section = name.split(".")[0]
        if is_dataclass(settings.get(section)) and values[name] == Config().flat()[name]:
            del values[name]  # a section's default, which nobody meant to give
            continue
        raise InputError(
            f"{name} is searched by a sweep: use {search_flag_for(name)} with one value to fix it"
        )
    record = _record_to_resume(data, flags, "tune")
    defaults, kept = TuneOptions.defaults(record, limits_time="time_budget" in flags)
    options = replace(defaults, **flags, search=replace(defaults.search, **search))
    given = values | ({"num_trials": options.num_trials} if "num_trials" in flags else {})
    return _request(options, data, labels, kept, given, record)


def train_request(
    data: Data,
    labels: Sequence[int | str] | None,
    config: Config | None,
    settings: Mapping[str, object],
) -> RunRequest[TrainOptions]:
    """Make the request of a training.

    Args:
        data: name, path, or examples in memory.
        labels: class of each example in memory, or None.
        config: config whose sections are used, apart from that of the data; settings replace its values.
        settings: settings by name.

    Raises:
        InputError: an unknown setting, a value that is not allowed, or data that cannot be used.
    """
    flags, values = _split(TrainOptions, settings)
    if config is not None:
        of_config = {name: value for name, value in config.flat().items() if not name.startswith("data.")}
        flags = {"seed": of_config.pop("seed")} | flags
        values = keep(of_config, values)
    record = _record_to_resume(data, flags, "train")
    init_from = None if flags.get("resume") else flags.get("init_from")  # as the options will say
    start = find_start(None, init_from, flags.get("tracking_uri"), is_new=record is None)
    if init_from is not None:
        flags["init_from"] = start.init_from
    defaults, kept = TrainOptions.defaults(record, start)
    return _request(replace(defaults, **flags), data, labels, kept, values, record)


def in_python(text: str) -> str:
    """A text with the names of settings in place of those of flags: --num-trials becomes num_trials."""
    return re.sub(r"(?<![\w-])--([a-z][\w.-]*[\w])", lambda found: found[1].replace("-", "_"), text)


def describe_settings(kind: type[RunFlags]) -> str:
    """Name, type, default and help text of every setting, for a docstring."""
    lines: list[str] = []

    def describe(part: Any, names: Iterable[str], indent: str) -> None:
        hints, texts = get_type_hints(part), help_texts(part)
        for field in fields(part):
            if field.name in names:
                make = field.default_factory
                default = field.default if make is MISSING else make()
                hint = hints[field.name]
                type_name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                lines.append(f"{indent}{field.name}: {type_name} = {default!r}")
                lines.extend(f"{indent}    {line}" for line in in_python(texts[field.name]).splitlines())

    describe(kind, setting_hints(kind), "    ")
    for section, part in section_types(kind).items():
        lines += ["", f"    {section}: a mapping of these, or {part.__name__}(...)"]
        describe(part, get_type_hints(part), "        ")
    return "\n".join(lines)


def help_texts(part: type) -> dict[str, str]:
    """The string under each field of a dataclass and its bases, by name of the field."""
    texts: dict[str, str] = {}
    for base in reversed(part.__mro__):
        if not is_dataclass(base):
            continue
        body = _classes_in(sys.modules[base.__module__])[base.__name__].body
        for node, following in pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = ast.literal_eval(following.value) if isinstance(following, ast.Expr) else ""
                texts[node.target.id] = inspect.cleandoc(text)
    return texts


@cache
def _classes_in(module: types.ModuleType) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(module))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def setting_hints(kind: type[RunFlags]) -> dict[str, Any]:
    """Types of the settings of a kind of options, by name, without those in sections."""
    others = {*sections(Config()), "search", "data", "dry_run", "config_file"}
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.name not in others}


def section_types(kind: type[RunFlags]) -> dict[str, Any]:
    """Dataclasses of the sections that a kind of options has, by name."""
    hints = get_type_hints(kind)
    return {name: hints[name] for name in (*sections(Config()), "search") if name in hints}


def _split(kind: type[RunFlags], settings: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the settings, and split them into those of flags and those of the config, by dotted name."""
    hints, parts = setting_hints(kind), section_types(kind)
    dotted_hints = {
        f"{section}.{name}": hint
        for section, part in parts.items()
        for name, hint in get_type_hints(part).items()
    }
    flags: dict[str, Any] = {}
    dotted: dict[str, Any] = {}
    for name, value in settings.items():
        if name in parts:
            if isinstance(value, parts[name]):
                value = asdict(value)
            if not isinstance(value, Mapping):
                first = next(iter(get_type_hints(parts[name])))
                raise InputError(
                    f"{name} {value!r}: give a mapping, such as {{'{first}': ...}}, "
                    f"or a {parts[name].__name__}"
                )
            dotted |= {f"{name}.{key}": each for key, each in value.items()}
        elif "." in name:
            dotted[name] = value
        elif name in hints:
            flags[name] = _checked(name, _duration(value) if name == "time_budget" else value, hints[name])
        else:
            sections_with_it = [
                f"{part}={{'{name}': ...}}" for part in parts if f"{part}.{name}" in dotted_hints
            ]
            hint = (
                f"in its section it is {' or '.join(sections_with_it)}"
                if sections_with_it
                else nearest(name, [*hints, *parts, *_EXTRA])
            )
            raise InputError(f"{name}: no setting has that name; {hint}")
    for name, value in dotted.items():
        if name not in dotted_hints:
            raise InputError(f"{name}: no setting has that name; {nearest(name, dotted_hints)}")
        if name.startswith("search.") and get_origin(dotted_hints[name]) is tuple:
            value = value if isinstance(value, (list, tuple)) else (value,)
        dotted[name] = _checked(name, value, dotted_hints[name])
    if {"training.num_epochs", "training.num_updates"} <= {
        name for name, value in dotted.items() if value is not None
    } and not is_dataclass(settings.get("training")):
        raise InputError("training.num_epochs and training.num_updates both set the length: give one of them")
    return flags, dotted


def _request(
    options: OptionsT,
    data: Data,
    labels: Sequence[int | str] | None,
    kept: Mapping[str, Any],
    given: Mapping[str, Any],
    record: RunRecord | None,
) -> RunRequest[OptionsT]:
    if record is not None:
        values = {name: value for name, value in given.items() if name != "num_trials"}
        options = replace(options, **sections(options.config().with_values(values)))
    if isinstance(data, (str, os.PathLike)):
        if labels is not None:
            raise InputError(f"labels: data {os.fspath(data)} are not in memory; leave labels out")
        options = replace(options, data=os.fspath(data))
        options.data_config()  # fails if the data do not exist
        return RunRequest(options, kept, given, record)
    source = memory_source(data, options.data_config(), labels)
    return RunRequest(replace(options, data=source.config.name), kept, given, record, source)


def _record_to_resume(data: Data, flags: Mapping[str, Any], command: Command) -> RunRecord | None:
    if not (flags.get("resume") or flags.get("start_or_resume")):
        return None
    names = ("name", "experiment", "output_dir", "resume", "start_or_resume")
    known = {name: flags[name] for name in names if name in flags}
    known["data"] = resolve(os.fspath(data)) if isinstance(data, (str, os.PathLike)) else memory_name(data)
    options = TrainOptions(**known) if command == "train" else TuneOptions(**known)
    extends = "num_trials" in flags or "time_budget" in flags
    return run_to_resume(options, command, extends=extends)


def _duration(value: object) -> object:
    """A time budget as its flag takes it; a number is in seconds."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:g}s" if is_number else value


def _checked(name: str, value: object, hint: Any) -> Any:
    """The value as the options keep it: plain numbers, strings for paths, tuples for lists.

    Raises:
        InputError: it has another type.
    """
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif isinstance(value, (list, tuple)):
        value = tuple(os.fspath(each) if isinstance(each, os.PathLike) else each for each in value)
    if not fits(value, hint):
        raise InputError(f"{name} {value!r}: give {in_words(hint)}")
    return value
