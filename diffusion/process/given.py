"""What a request gives of its samples, in data units: a known part, or samples to start from. Numpy only.

`diffusion.process.inpainting` and `diffusion.process.image_start` have the mathematics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion.errors import InputError
from diffusion.normalisation import normalise
from diffusion.process.image_start import start_from
from diffusion.process.inpainting import MAX_RESAMPLING, Inpainting
from diffusion.process.samplers import SamplerTable

DEFAULT_STRENGTH = 0.6
_MAX_JUMP_LENGTH = 100_000

Noise = Callable[[int], NDArray[np.float64]]  # of a row of the table, or for -1 the initial noise


class GivenOptions(TypedDict, total=False):
    """Arguments that say what is given of the samples, see `export.sampler.Sampler.sample`."""

    known: ArrayLike | None
    mask: ArrayLike | None
    resampling: int
    jump_length: int
    start_from: ArrayLike | None
    strength: float | None


@dataclass(frozen=True, eq=False)
class DataUnits:
    """Units of a data set.

    Attributes:
        shape: shape of one sample.
        mean, std: numbers or nested lists that broadcast against the shape.
        range: smallest and largest possible value, or None.
    """

    shape: tuple[int, ...]
    mean: Any
    std: Any
    range: Sequence[float] | None

    def normalise(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Convert values [batch, *shape] in data units to normalised ones."""
        return normalise(values, self.mean, self.std)


@dataclass(frozen=True, eq=False)
class Given:
    """What is given of all samples of a request, checked.

    Attributes:
        units: units of the data.
        values: known values, float64 [num_samples, *shape] in data units; None if nothing is known.
        unknown: bool, of the same shape: which values are drawn.
        resampling, jump_length: see `diffusion.process.inpainting.Inpainting`.
        x_0: samples to start from, float64 [num_samples, *shape], normalised; None for pure noise.
        strength: see `diffusion.process.image_start.start_from`.
    """

    units: DataUnits
    values: NDArray[np.float64] | None = None
    unknown: NDArray[np.bool_] | None = None
    resampling: int = 1
    jump_length: int = 1
    x_0: NDArray[np.float64] | None = None
    strength: float = 1.0

    def rows(self, table: SamplerTable, noise: Noise, batch: slice) -> tuple[SamplerTable, Noise]:
        """The rows of a table that run for some samples, and their noise."""
        return (
            (table, noise) if self.x_0 is None else start_from(self.x_0[batch], self.strength, table, noise)
        )

    def inpainting(self, batch: slice) -> Inpainting | None:
        """The known part of some samples."""
        if self.values is None or self.unknown is None:
            return None
        unknown = self.unknown[batch]
        known = np.where(unknown, 0.0, self.units.normalise(self.values[batch]))
        return Inpainting(known, unknown.astype(np.float64), self.resampling, self.jump_length)

    def num_calls(self, table: SamplerTable) -> int:
        """Number of network calls for each batch.

        Raises:
            InputError: alphas_cumprod of the file's table is not between 0 and 1.
        """
        first = slice(0, 1)
        rows, _ = self.rows(table, lambda index: np.zeros(self.units.shape), first)
        inpainting = self.inpainting(first)
        in_range = (table.alphas_cumprod >= 0.0) & (table.alphas_cumprod <= 1.0)
        if not (in_range.all() or (inpainting is None and self.x_0 is None)):
            raise InputError("the file's alphas_cumprod is not between 0 and 1: export the model again")
        return rows.num_rows if inpainting is None else inpainting.num_runs(rows)

    def restore(self, samples: NDArray[np.float64], batch: slice) -> NDArray[np.float64]:
        """Samples of a batch, in data units, with the known values as they were given."""
        if self.values is None or self.unknown is None:
            return samples
        return np.where(self.unknown[batch], samples, self.values[batch])


def resolve_given(
    num_samples: int,
    units: DataUnits,
    *,
    known: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    resampling: int = 1,
    jump_length: int = 1,
    start_from: ArrayLike | None = None,
    strength: float | None = None,
) -> Given:
    """Check what is given of the samples; the arguments are those of `export.sampler.Sampler.sample`.

    Raises:
        InputError: a shape does not fit, a value is not finite or outside the range of the data, everything
            or nothing is known, a number is out of range, or something is given without what it belongs to.
    """
    resampling = _whole_number("resampling", resampling, MAX_RESAMPLING)
    jump_length = _whole_number("jump_length", jump_length, _MAX_JUMP_LENGTH)
    given: dict[str, Any] = {"resampling": resampling, "jump_length": jump_length}
    if known is None:
        for name, unused in (("mask", mask is None), ("resampling", resampling == 1)):
            if not unused:
                raise InputError(f"{name}: it needs known values; give known too, or leave {name} out")
    else:
        given["values"], given["unknown"] = _known(known, mask, num_samples, units)
    if jump_length > 1 and resampling == 1:
        raise InputError(f"jump_length {jump_length}: give resampling too, 2 or more, or leave it out")
    if start_from is not None:
        given["strength"] = check_strength(DEFAULT_STRENGTH if strength is None else strength)
        values = _for_samples("start_from", start_from, num_samples, units.shape)
        _check_values("start_from", values, np.ones(values.shape, dtype=bool), units)
        given["x_0"] = np.broadcast_to(units.normalise(values), (num_samples, *units.shape))
    elif strength is not None:
        raise InputError(f"strength {strength}: it needs samples to start from; give start_from too")
    return Given(units, **given)


def path_between(a: ArrayLike, b: ArrayLike, num_frames: int, units: DataUnits) -> NDArray[np.float64]:
    """Blends of two samples [*shape] in data units: [num_frames, *shape], from all of `a` to all of `b`.

    Noised with the same noise, they are the blends of the noised samples.

    Raises:
        InputError: a shape does not fit, or a value is not finite or outside the range of the data.
    """
    ends = []
    for name, given in (("a", a), ("b", b)):
        values = _for_samples(name, given, 1, units.shape)
        _check_values(name, values, np.ones(values.shape, dtype=bool), units)
        ends.append(values)
    weights = np.linspace(0.0, 1.0, num_frames).reshape(-1, *[1] * len(units.shape))
    blends = (1.0 - weights) * ends[0] + weights * ends[1]
    return blends.clip(np.minimum(*ends), np.maximum(*ends))  # rounding may leave the data's range


def check_strength(strength: float) -> float:
    """Check that a strength is in (0, 1], and return it.

    Raises:
        InputError: it is not.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float | np.number):
        raise InputError(f"strength {strength!r}: give a number above 0, up to 1")
    if not 0.0 < strength <= 1.0:
        raise InputError(f"strength {strength:g}: give a number above 0, up to 1")
    return float(strength)


def _whole_number(name: str, value: int, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= highest:
        raise InputError(f"{name} {value!r}: give a whole number from 1 to {highest}")
    return int(value)


def _known(
    known: ArrayLike, mask: ArrayLike | None, num_samples: int, units: DataUnits
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Known values in data units, 0 where unknown, and which are unknown, both [num_samples, *shape]."""
    values = _for_samples("known", known, num_samples, units.shape)
    unknown = np.isnan(values) if mask is None else _mask(mask, num_samples, units)
    values, unknown = np.broadcast_arrays(values, unknown)
    values = np.where(unknown, 0.0, values)
    if unknown.all():
        raise InputError("known: no value is known; leave known out to draw whole samples")
    if not unknown.any():
        remedy = "give NaN for those to draw, or a mask" if mask is None else "the mask is True nowhere"
        raise InputError(f"known: every value is known, so there is nothing to draw; {remedy}")
    _check_values("known", values, ~unknown, units)
    full = (num_samples, *units.shape)
    return np.broadcast_to(values, full), np.broadcast_to(unknown, full)


def _mask(mask: ArrayLike, num_samples: int, units: DataUnits) -> NDArray[np.bool_]:
    given = np.asarray(mask)
    if len(units.shape) == 3 and given.shape == units.shape[1:]:
        given = np.broadcast_to(given, units.shape)
    values = _for_samples("mask", given, num_samples, units.shape)
    if not np.isin(values, (0.0, 1.0)).all():
        raise InputError("mask: give True where a value is drawn and False where it is known, or 1 and 0")
    return values == 1.0


def _for_samples(
    name: str, given: ArrayLike, num_samples: int, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """An array of one sample or of all, [1 or num_samples, *shape]."""
    values = real_array(name, given)
    if values.shape == shape:
        values = values[None]
    if values.shape not in ((1, *shape), (num_samples, *shape)):
        raise InputError(
            f"{name} has shape {list(values.shape)}: give {list(shape)} for all samples, or "
            f"{[num_samples, *shape]}"
        )
    return values


def real_array(name: str, given: ArrayLike) -> NDArray[np.float64]:
    """Convert what a program passes as an array of numbers to float64.

    Args:
        name: name of the argument, for the message.
        given: what was given.

    Raises:
        InputError: it is no array of real numbers, or some of its elements are masked, under which any
            number may stand.
    """
    try:
        array = np.asarray(given)
        values = None if array.dtype.kind == "c" else array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name}: give an array of numbers") from error
    if values is None:
        raise InputError(f"{name} holds complex numbers: give an array of real ones")
    if np.ma.is_masked(given):
        raise InputError(f"{name}: elements of it are masked; give an array without a mask, such as filled()")
    return values


def _check_values(name: str, values: NDArray[np.float64], used: NDArray[np.bool_], units: DataUnits) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        normalised, data = units.normalise(values).astype(np.float32), values.astype(np.float32)
    if not (np.isfinite(normalised) & np.isfinite(data))[used].all():
        raise InputError(f"{name} is not finite: give finite numbers within float32's range")
    if units.range is None:
        return
    low, high = units.range
    lowest, highest = values[used].min(), values[used].max()
    if lowest < low or highest > high:
        raise InputError(
            f"{name} has values from {lowest:g} to {highest:g}, but the model's images have {low:g} to "
            f"{high:g}: give them in those units"
        )
