"""Run the main function of a command as a process. Needs only the standard library."""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from diffusion.errors import InputError
from workflows.redaction import redact


def exit_status(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Call main with arguments; bad input is printed in one line and gives status 2."""
    try:
        return main(arguments)
    except InputError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Call main with the process's arguments, and end the process with its exit status.

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
    try:
        status = exit_status(main, sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # a normal exit would let each of Ray's running threads print that it is being shut down
    except SystemExit as error:  # of the parser of the command line
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(status)
