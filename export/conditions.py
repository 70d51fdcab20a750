"""Condition inputs of a network, such as a low-resolution image or known columns. Needs only numpy."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion.array_file import read_array
from diffusion.errors import InputError
from diffusion.files import user_path
from diffusion.process.given import real_array
from export.contract import ConditionSpec

# Conditions of a super-resolution model: the image, and the standard deviation of the noise in it.
LOW_RESOLUTION, LOW_RESOLUTION_NOISE = "low_resolution", "low_resolution_noise"

_OF_A_CASCADE = (
    "; or let a model of low-resolution images draw them: "
    "python -m export.sampler FIRST.onnx --then SECOND.onnx"
)

# Name of a graph's input -> float32 [batch, *shape].
ConditionInputs = dict[str, NDArray[np.float32]]


def read_conditions(arguments: Sequence[str]) -> dict[str, ArrayLike]:
    """Read the values of conditions that a command line gives as NAME=FILE.npy, or NAME=NUMBER.

    Raises:
        InputError: an argument is written in another way, a name is given twice, or a file cannot be read.
    """
    found: dict[str, ArrayLike] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not (name and value):
            raise InputError(f"--condition {argument}: give NAME=FILE.npy or NAME=NUMBER")
        if name in found:
            raise InputError(f"--condition {argument}: {name!r} is given twice; give it once")
        found[name] = _read_value(value)
    return found


def _read_value(value: str) -> ArrayLike:
    with suppress(ValueError):
        return float(value)
    try:
        return read_array(user_path(value), "a file that numpy.save has written")
    except InputError as error:
        raise InputError(f"--condition: {error}") from error


def resolve_conditions(
    conditions: Mapping[str, ArrayLike] | None, num_samples: int, specs: Sequence[ConditionSpec]
) -> ConditionInputs:
    """Convert condition values to inputs of the network.

    Args:
        conditions: values of each condition by its name: [num_samples, *shape], or [1, *shape] or [*shape]
            for all samples.
        num_samples: number of samples.
        specs: the conditions of the model.

    Raises:
        InputError: they are no mapping, or a condition is missing, unknown, of another shape or not finite.
    """
    given = {} if conditions is None else conditions
    if not isinstance(given, Mapping):
        raise InputError(f"conditions of type {type(given).__name__}: give {{NAME: ARRAY}}")
    needed = {spec.name: list(spec.shape) for spec in specs}
    for name in given:
        if name not in needed:
            known = f"it has {', '.join(needed)}" if needed else "it has none; leave the conditions out"
            raise InputError(f"condition {name!r}: this model has no such condition, {known}")
    missing = [f"{name!r} of shape {shape}" for name, shape in needed.items() if name not in given]
    if missing:
        raise InputError(
            f"conditions: this model needs {', '.join(missing)}, for all samples or one per sample; "
            "give them as --condition NAME=FILE.npy, or in Python as conditions={NAME: ARRAY}"
            + (_OF_A_CASCADE if LOW_RESOLUTION in needed else "")
        )
    return {spec.input_name: _values(given[spec.name], num_samples, spec) for spec in specs}


def _values(condition: ArrayLike, num_samples: int, spec: ConditionSpec) -> NDArray[np.float32]:
    values = real_array(f"condition {spec.name!r}", condition)
    if values.shape == spec.shape:
        values = values[None]
    if values.shape not in ((1, *spec.shape), (num_samples, *spec.shape)):
        raise InputError(
            f"condition {spec.name!r} has shape {list(values.shape)}: give {list(spec.shape)} for all "
            f"samples, or {[num_samples, *spec.shape]}"
        )
    with np.errstate(over="ignore"):
        inputs = spec.normalise(values)
    if not np.isfinite(inputs).all():
        raise InputError(f"condition {spec.name!r} is not finite: give finite numbers within float32's range")
    return np.broadcast_to(inputs, (num_samples, *spec.shape))
