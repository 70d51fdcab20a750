"""Write a page for each command, with the help of all its flags, which the command itself prints."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from workflows.cli.main import _COMMANDS as COMMANDS  # the commands in the order of the help

_COLUMNS = "88"  # as many as the site shows
_ALL_FLAGS = ("tune", "train")  # --help shows only the flags that people use most


def write_command_reference(folder: Path) -> None:
    """Write NAME.md for every command of `ray-ddpm`; files that are up to date are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in COMMANDS.items():
        page = f"# ray-ddpm {name}\n\n{command.summary[0].upper()}{command.summary[1:]}.\n"
        module = command.module.removesuffix(".__main__")
        page += f"\nWithout the installed command: `python -m {module}`.\n"
        page += f"\n```text\n{command_help(name)}```\n"
        for subcommand in subcommands(name):
            page += f"\n## {subcommand}\n\n```text\n{command_help(name, subcommand)}```\n"
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != page:
            path.write_text(page)


def command_help(name: str, *arguments: str) -> str:
    """What `ray-ddpm NAME ARGUMENTS --help-all` (or `--help`) prints."""
    flag = "--help-all" if name in _ALL_FLAGS else "--help"
    printed = io.StringIO()
    main = import_module(COMMANDS[name].module).main
    with _plain_terminal(), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*arguments, flag], prog=f"ray-ddpm {name}")
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines()) + "\n"


def subcommands(name: str) -> list[str]:
    """The commands of a command, such as `check` of `cluster`, which its usage separates by bars."""
    found = re.search(r"(\w+(?: \| \w+)+) \.\.\.", command_help(name))
    return found[1].split(" | ") if found else []


@contextlib.contextmanager
def _plain_terminal() -> Iterator[None]:
    """A terminal of a fixed width without colours, so that help is the same everywhere."""
    with patch.dict(os.environ, {"COLUMNS": _COLUMNS, "NO_COLOR": "1", "TERM": "dumb"}):
        yield
