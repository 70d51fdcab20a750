"""Run the main function of a command as a process. Needs only the standard library."""

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from diffusion.errors import InputError
from workflows.redaction import redact
from workflows.signals import treat_as_interrupt
from workflows.status import STOPPED

_OWN_PACKAGES = ("diffusion", "export", "workflows")


@contextmanager
def on_interrupt(text: str) -> Iterator[None]:
    """Print a text on stderr if Ctrl-C ends what runs; the interrupt goes on."""
    try:
        yield
    except KeyboardInterrupt:
        _print_error(f"\n{text}")
        raise


@contextmanager
def extra_named(command: str, extra: str | None) -> Iterator[None]:
    """Turn the import of a package that is not installed into an error that names the extra with it.

    Args:
        command: name of the command, for the message.
        extra: extra that the command needs; None if it needs none.

    Raises:
        InputError: a package of the extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if extra is None or package in _OWN_PACKAGES:
            raise
        raise InputError(f"{command} needs {package}: pip install 'ray-ddpm[{extra}]'") from error


def exit_status(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str], extra: str | None = None
) -> int:
    """Call main with arguments; bad input is printed in one line and gives status 2.

    Args:
        main: main function.
        arguments: command-line arguments.
        extra: extra that the command needs, which is named if it is not installed.
    """
    try:
        with extra_named("this command", extra):
            return main(arguments)
    except InputError as error:
        _print_error(f"error: {redact(str(error))}")
        return 2


def run(main: Callable[[Sequence[str]], int], extra: str | None = None) -> None:
    """Call main with the process's arguments, and end the process with its exit status.

    `extra` is that of `exit_status`. SIGTERM and SIGHUP are handled like Ctrl-C, which ends the process with
    status 3.

    The process ends after Python's exit handlers, before C++ destructors: Ray's threads outlive
    `ray.shutdown`, and one that uses what a destructor has freed kills a process that has done its work.
    """
    status = 1  # of an exception that nobody expected

    def end_process() -> None:
        with suppress(OSError):  # nobody reads the output any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    atexit.register(end_process)  # the handler that is registered first runs last
    treat_as_interrupt()
    try:
        status = exit_status(main, sys.argv[1:], extra)
    except KeyboardInterrupt:
        _print_error("interrupted")
        with suppress(OSError):
            sys.stdout.flush()
        # A normal exit would let each of Ray's running threads print that it is being shut down.
        os._exit(STOPPED)
    except SystemExit as error:  # of the parser of the command line
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(status)


def _print_error(line: str) -> None:
    """Print a line on stderr, if that is possible: a closed terminal must not change the exit status."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
