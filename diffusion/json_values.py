"""Checks of the types of values from JSON that may be damaged or made by others."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from diffusion.errors import InputError

_MAX_INTEGER = 2**63  # larger ones overflow in numpy, torch and databases


def check_types(tree: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> None:
    """Check the values of an object by type hints; names that one of both lacks are skipped.

    Args:
        tree: the object.
        hints: type hints by name, such as `typing.get_type_hints` returns.
        prefix: what stands before the names in the message.

    Raises:
        InputError: a value has another type.
    """
    for name, hint in hints.items():
        if name in tree and not fits(tree[name], hint):
            raise InputError(f"{prefix}{name} {short_repr(tree[name])}: give {in_words(hint)}")


def fits(value: object, hint: Any) -> bool:
    """Whether a value has the type of a hint.

    A whole number also is a float, a list also is a tuple (JSON has no other), and True is no number. A
    string must be text that can be written to a file, and an integer must fit into 64 bits.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in parts)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in parts)
    if origin is tuple and parts[-1] is not ...:
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(fits, value, parts))
    if origin in (tuple, list, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(each, parts[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(
            fits(key, parts[0]) and fits(each, parts[1]) for key, each in value.items()
        )
    if hint in (int, float):
        return (
            isinstance(value, (int, hint))
            and not isinstance(value, bool)
            and (isinstance(value, float) or abs(value) < _MAX_INTEGER)
        )
    if hint is str:
        return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """What values a type hint allows, to complete the message "give ..."."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(each) for each in parts)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is tuple and parts[-1] is not ...:
        return f"a list of {len(parts)}, each {in_words(parts[0])}"
    if origin in (tuple, list, Sequence):
        return f"a list, each {in_words(parts[0])}"
    if origin in (dict, Mapping):
        return "an object"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a string",
        type(None): "None",
    }
    return names.get(hint, "a value of another type")


def short_repr(value: object) -> str:
    """A value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
