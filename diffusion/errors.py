"""The exception for invalid user input, and a hint for its message."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A flag, file or other value that the user gave is invalid.

    The message is one line with the value, what is allowed and the remedy. Command lines print it and
    exit with status 2; any other exception keeps its traceback.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Hint for an unknown name: "did you mean ...?" with the most similar allowed ones, or else all."""
    names = list(allowed)
    # A user may leave out the section of a dotted name.
    same_end = [each for each in names if each.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if similar := same_end[:3] or get_close_matches(name, names):
        return f"did you mean {' or '.join(similar)}?"
    return f"give one of {', '.join(names)}"
