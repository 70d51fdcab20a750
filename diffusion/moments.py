"""What normalisation and the clip interval are fitted to."""

import math

import numpy as np
from numpy.typing import NDArray

# Wide integers are made for so many values at a time.
_AT_ONCE = 2**23
_INDISTINCT = 1e-7


def pixel_sums(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Sum and sum of squares over the pixels of each channel: exact, so they add up in any order.

    Args:
        images: [examples, C, H, W].

    Returns:
        int64 [examples, C, 2].
    """
    sums = np.empty((*images.shape[:2], 2), dtype=np.int64)
    step = max(1, _AT_ONCE // math.prod(images.shape[1:]))
    for start in range(0, len(images), step):
        wide = images[start : start + step].astype(np.int64)
        sums[start : start + step, :, 0] = wide.sum(axis=(2, 3))
        sums[start : start + step, :, 1] = np.einsum("nchw,nchw->nc", wide, wide)
    return sums


def pixel_moments(
    sums: NDArray[np.int64], num_pixels: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel, the nearest floats to the exact ones.

    Args:
        sums: [examples, C, 2], see `pixel_sums`.
        num_pixels: of one image.

    Returns:
        Two float64 [C, 1, 1].
    """
    count = len(sums) * num_pixels
    totals = [(int(total), int(squares)) for total, squares in sums.sum(axis=0)]
    mean = [total / count for total, _ in totals]
    # In whole numbers: no digits cancel where the deviation is small against the mean.
    std = [math.sqrt((count * squares - total**2) / count**2) for total, squares in totals]
    return np.array(mean).reshape(-1, 1, 1), np.array(std).reshape(-1, 1, 1)


def value_moments(values: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel of images or column of points.

    Args:
        values: [examples, C, H, W] or [examples, D].

    Returns:
        Two float64 [C, 1, 1] or [D].
    """
    axes = (0, 2, 3) if values.ndim == 4 else (0,)
    mean = values.mean(axis=axes, keepdims=True, dtype=np.float64)[0]
    return mean, values.std(axis=axes, keepdims=True, dtype=np.float64)[0]


def smallest_step(values: NDArray[np.generic], std: NDArray[np.float64]) -> float:
    """Smallest distance between values of one channel or column, in normalised units.

    Numbers closer than float32 can tell apart count as equal; where all do, it is their distance.

    Args:
        values: [examples, C, H, W] or [examples, D], in data units.
        std: C or D values.
    """
    smallest = math.inf
    for channel, scale in zip(np.moveaxis(values, 1, 0), std.ravel(), strict=True):
        gaps = np.diff(np.unique(channel).astype(np.float64)) / scale
        smallest = min(smallest, gaps[gaps > _INDISTINCT].min(initial=math.inf))
    return smallest if math.isfinite(smallest) else _INDISTINCT


def clip_interval(
    train: NDArray[np.float32],
    value_range: tuple[float, float] | None,
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
) -> tuple[float, float]:
    """An interval that holds every clean example, in normalised units.

    Args:
        train: normalised training examples; not looked at where there is a range.
        value_range: smallest and largest possible value in data units, or None: then it is the
            training examples' own, widened by 5%.
        mean, std: of the normalisation.
    """
    if value_range is not None:
        ends = (np.array(value_range)[:, None] - mean.ravel()) / std.ravel()
        return float(ends.min()), float(ends.max())
    low, high = float(train.min()), float(train.max())
    margin = 0.05 * (high - low) / 2.0
    return low - margin, high + margin
