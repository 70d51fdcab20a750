"""Conversion between data units and normalised units, in numpy: data = x * std + mean."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
    axes = (0, 2, 3) if values.ndim == 4 else (0,)
    mean = values.mean(axis=axes, keepdims=True, dtype=np.float64)[0]
    return mean, values.std(axis=axes, keepdims=True, dtype=np.float64)[0]


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
