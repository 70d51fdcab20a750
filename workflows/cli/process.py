"""Run the main function of a command as a process. Needs only the standard library."""

import os
import sys
from collections.abc import Callable, Sequence

from diffusion.errors import InputError


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
        os._exit(1)  # a normal exit would let each of Ray's running threads print that it is being shut down
    sys.exit(status)
