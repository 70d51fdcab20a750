"""The exception for invalid user input, its message on one line, and a hint for it."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A flag, file or other value that the user gave is invalid.

    The message is one line with the value, what is allowed and the remedy. Command lines print it and
    exit with status 2; any other exception keeps its traceback.

    Args:
        message: the message. It may quote any name or value: see `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    r"""A text on one line that a terminal shows as it is.

    Newlines, control characters, invisible ones and bytes that are no text become escapes such as \n, \x1b
    or \u202e, since names of files, columns and classes can hold them to forge or hide output.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Hint for an unknown name: "did you mean ...?" with the most similar allowed ones, or else all."""
    names = list(allowed)
    # A user may leave out the section of a dotted name.
    same_end = [each for each in names if each.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if similar := same_end[:3] or get_close_matches(name, names):
        return f"did you mean {' or '.join(similar)}?"
    return f"give one of {', '.join(names)}"
