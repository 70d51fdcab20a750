"""Checks of the numbers that a program passes to the sampler, each refused in one line."""

import math
import operator
from typing import Any

import numpy as np

from diffusion.errors import InputError


def whole_number(name: str, value: Any, lowest: int | None = None, highest: int | None = None) -> int:
    """Convert a whole number, of Python or numpy, to an int.

    Args:
        name: name of the argument, for the message.
        value: what was given.
        lowest, highest: what is allowed; None for no limit.

    Raises:
        InputError: the value is no whole number (a float is none, whatever its value, nor is True), or is
            out of range.
    """
    number = None
    if not isinstance(value, bool | np.bool_):
        try:
            number = operator.index(value)
        except TypeError:
            number = None
    if number is None:
        raise InputError(f"{name} {_shown(value)}: give a whole number{_allowed(lowest, highest)}")
    if (lowest is not None and number < lowest) or (highest is not None and number > highest):
        raise InputError(f"{name} {number}: give {lowest} to {highest}")
    return number


def real_number(name: str, value: Any) -> float:
    """Convert a number, of Python or numpy, to a float, which may be NaN or infinite.

    Raises:
        InputError: the value is no number. Text is none, nor is True.
    """
    if isinstance(value, bool | np.bool_ | str | bytes):
        raise InputError(f"{name} {_shown(value)}: give a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} {_shown(value)}: give a number") from error


def _allowed(lowest: int | None, highest: int | None) -> str:
    return "" if lowest is None or highest is None else f" from {lowest} to {highest}"


def _shown(value: Any) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else text[:57] + "..."
