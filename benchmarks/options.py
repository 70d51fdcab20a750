"""Types of command-line arguments that several benchmarks have."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Collection


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """Type of an argument that is one of these names."""

    def check(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"{text}: give any of {', '.join(names)}")
        return text

    return check


def at_least_one(text: str) -> int:
    """Type of an argument that is a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)
