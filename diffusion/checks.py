"""Checks of config values: each failure names the flag, the value and what is allowed."""

from typing import Any, get_args

from diffusion.errors import InputError


def require(holds: bool, name: str, value: Any, allowed: str) -> None:
    """Raise unless it holds; `allowed` completes "give ..."."""
    if not holds:
        raise InputError(f"--{name.replace('_', '-')} {value}: give {allowed}")


def check_whole(name: str, value: Any, smallest: int, largest: int | None = None, why: str = "") -> None:
    """Raise unless the value is a whole number between two ends, both allowed."""
    allowed = f"a whole number from {smallest}" + (f" to {largest}" if largest is not None else " up")
    holds = isinstance(value, int) and smallest <= value and (largest is None or value <= largest)
    require(holds, name, value, f"{allowed} ({why})" if why else allowed)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise unless the value is one of a Literal's."""
    require(value in get_args(choices), name, value, f"one of {', '.join(get_args(choices))}")
