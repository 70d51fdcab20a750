"""Conversion between data units and normalised units, in numpy: data = x * std + mean."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion.json_values import fits, short_repr


def normalise(values: ArrayLike, mean: Sequence[Any], std: Sequence[Any]) -> NDArray[np.float64]:
    """Convert values [batch, *shape] in data units to normalised ones, float64; mean and std broadcast."""
    return (np.asarray(values, dtype=np.float64) - np.array(mean)) / np.array(std)


def denormalise(
    x: ArrayLike, mean: Sequence[Any], std: Sequence[Any], value_range: Sequence[float] | None
) -> NDArray[np.float64]:
    """Convert normalised values to data units.

    Args:
        x: normalised values, [batch, *shape].
        mean, std: mean and standard deviation in data units, nested lists that broadcast against shape.
        value_range: smallest and largest possible value in data units, to which the result is
            clipped; None for no clipping.

    Returns:
        float64 [batch, *shape].
    """
    data = np.asarray(x, dtype=np.float64) * np.array(std) + np.array(mean)
    return data if value_range is None else data.clip(*value_range)


_MAX_VALUES = 2**28  # in one example


def check_description(data: Mapping[str, Any]) -> None:
    """Check the description of data that is stored with a model, which anyone may have written.

    Args:
        data: "kind", "shape", "mean", "std", "range", "columns" and "classes"; the last two may be missing.

    Raises:
        KeyError: another one is missing.
        ValueError: a value has another type or contradicts another one.
    """
    kind, shape, columns, classes = data["kind"], data["shape"], data.get("columns"), data.get("classes")
    if kind not in ("image", "points"):
        raise ValueError(f"data kind {short_repr(kind)}")
    check_normalisation(shape, data["mean"], data["std"])
    if len(shape) != (3 if kind == "image" else 1):
        raise ValueError(f"{kind} of shape {short_repr(shape)}")
    if kind == "image" and not is_interval(data["range"]):
        raise ValueError(f"images have range {short_repr(data['range'])}")
    if kind == "points" and data["range"] is not None:
        raise ValueError(f"points have range {short_repr(data['range'])}")
    if columns is not None and not (
        kind == "points" and fits(columns, list[str]) and len(columns) == shape[0]
    ):
        raise ValueError(f"columns {short_repr(columns)} are not a name for each value of a point")
    if classes is not None and not fits(classes, list[str]):
        raise ValueError("classes is not a list of names")


def check_normalisation(shape: Any, mean: Any, std: Any) -> None:
    """Check the shape of an example, and its mean and standard deviation.

    Raises:
        ValueError: a size is not positive, the shape is too large, or the others are no finite numbers that
            broadcast against it, or a standard deviation is not positive.
    """
    if not fits(shape, list[int]) or min(shape, default=1) < 1:
        raise ValueError(f"shape {short_repr(shape)}")
    if math.prod(shape) > _MAX_VALUES:
        raise ValueError(f"shape {short_repr(shape)} is too large")
    arrays = []
    for name, value in (("mean", mean), ("std", std)):
        # numpy would convert strings and booleans to numbers.
        if not _holds_numbers(value):
            raise ValueError(f"{name} is not a number or a list of numbers")
        arrays.append(np.array(value, dtype=np.float64))
        if not (np.abs(arrays[-1]) <= np.finfo(np.float32).max).all():  # samples are float32
            raise ValueError(f"{name} is not finite")
    if np.broadcast_shapes(*(array.shape for array in arrays), tuple(shape)) != tuple(shape):
        raise ValueError("mean and std do not fit the shape")
    if not (arrays[1] > 0.0).all():
        raise ValueError("std is not positive")


def is_interval(pair: Any) -> bool:
    """Whether a value from JSON is a list of two finite numbers, the smaller one first."""
    return fits(pair, tuple[float, float]) and bool(np.isfinite(pair).all()) and pair[0] < pair[1]


def _holds_numbers(value: Any, depth: int = 4) -> bool:
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(_holds_numbers(each, depth - 1) for each in value)
    return fits(value, float)


# Distance in normalised units that float32 can barely resolve.
_MIN_DISTANCE = 1e-7


def pixel_sums(images: NDArray[np.uint8], max_chunk_values: int = 2**23) -> NDArray[np.int64]:
    """Sum and sum of squares of the pixels of each channel, exact and so independent of any order.

    Args:
        images: [examples, C, H, W].
        max_chunk_values: how many values to convert to int64 at a time, which limits the memory used.

    Returns:
        int64 [examples, C, 2]: sum, sum of squares.
    """
    sums = np.empty((*images.shape[:2], 2), dtype=np.int64)
    step = max(1, max_chunk_values // math.prod(images.shape[1:]))
    for start in range(0, len(images), step):
        chunk = images[start : start + step].astype(np.int64)
        sums[start : start + step, :, 0] = chunk.sum(axis=(2, 3))
        sums[start : start + step, :, 1] = np.einsum("nchw,nchw->nc", chunk, chunk)
    return sums


def pixel_moments(
    sums: NDArray[np.int64], num_pixels: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel, exact up to the rounding of the result.

    Args:
        sums: int64 [examples, C, 2], as `pixel_sums` returns.
        num_pixels: number of pixels of one image, H * W.

    Returns:
        Mean and standard deviation, each float64 [C, 1, 1].
    """
    count = len(sums) * num_pixels
    totals = [(int(total), int(squares)) for total, squares in sums.sum(axis=0)]
    mean = [total / count for total, _ in totals]
    # Python integers are exact: nothing cancels even if the standard deviation is far below the mean.
    std = [math.sqrt((count * squares - total**2) / count**2) for total, squares in totals]
    return np.array(mean).reshape(-1, 1, 1), np.array(std).reshape(-1, 1, 1)


def value_moments(values: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel of images, or of each column of points.

    Args:
        values: [examples, C, H, W] or [examples, D].

    Returns:
        Mean and standard deviation, each float64 [C, 1, 1] or [D].
    """
    axes = _axes(values)
    with np.errstate(over="ignore", invalid="ignore"):  # of values that are too large, which `std` then shows
        mean = values.mean(axis=axes, keepdims=True, dtype=np.float64)[0]
        return mean, values.std(axis=axes, keepdims=True, dtype=np.float64)[0]


def rounding(values: NDArray[np.generic]) -> NDArray[np.float64]:
    """The largest standard deviation of each channel or column that rounding can make of a constant.

    Whole numbers are not rounded. Others are as exact as float64, or as float32 if that holds all of them.

    Args:
        values: [examples, C, H, W] or [examples, D].

    Returns:
        float64 [C] or [D].
    """
    axes = _axes(values)
    if values.dtype.kind != "f":
        return np.zeros(values.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        in_float32 = (values.astype(np.float32) == values).all(axis=axes)
    precision = np.where(in_float32, np.finfo(np.float32).eps, np.finfo(np.float64).eps)
    whole = (np.rint(values) == values).all(axis=axes)
    return np.where(whole, 0.0, 4.0 * precision * np.abs(values).max(axis=axes).astype(np.float64))


def _axes(values: NDArray[np.generic]) -> tuple[int, ...]:
    """Axes over which the values of a channel or column lie."""
    return (0, 2, 3) if values.ndim == 4 else (0,)


def smallest_step(values: NDArray[np.generic], std: NDArray[np.float64]) -> float:
    """Smallest distance between different values of the same channel or column, in normalised units.

    Values closer than 1e-7, about the resolution of float32, count as equal. If all do, the result is 1e-7.

    Args:
        values: [examples, C, H, W] or [examples, D], in data units.
        std: standard deviation of each channel or column, C or D values.
    """
    smallest = math.inf
    for channel, scale in zip(np.moveaxis(values, 1, 0), std.ravel(), strict=True):
        gaps = np.diff(np.unique(channel).astype(np.float64)) / scale
        smallest = min(smallest, gaps[gaps > _MIN_DISTANCE].min(initial=math.inf))
    return smallest if math.isfinite(smallest) else _MIN_DISTANCE


def clip_interval(
    train: NDArray[np.float32],
    value_range: tuple[float, float] | None,
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
) -> tuple[float, float]:
    """Interval that contains every clean example, in normalised units.

    Args:
        train: normalised training examples; used only if there is no `value_range`.
        value_range: smallest and largest possible value in data units. With None, the interval is the
            range of the training examples, widened by 5%.
        mean, std: mean and standard deviation of the normalisation.
    """
    if value_range is not None:
        ends = (np.array(value_range)[:, None] - mean.ravel()) / std.ravel()
        return float(ends.min()), float(ends.max())
    low, high = float(train.min()), float(train.max())
    margin = 0.05 * (high - low) / 2.0
    return low - margin, high + margin
