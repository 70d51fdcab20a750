"""Splits into training, validation and test examples, and the fingerprint of split data."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion.config import DataConfig
from diffusion.errors import InputError

# The splits must be the same in all runs, so their seed cannot be configured.
_SPLIT_SEED = 2026
_MIN_EXAMPLES = 4  # per split; fewer do not determine a covariance
# More held-out examples would not improve the metrics, and they are always kept in memory.
MAX_HELD_OUT, MAX_HELD_OUT_VALUES = 10_000, 2**30


@dataclass(frozen=True, eq=False)
class SplitIndices:
    """Indices of the examples of each split in the unsplit data, int64."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


def split_indices(num_examples: int, num_values: int, config: DataConfig) -> SplitIndices:
    """Shuffle with the fixed seed and split; the test split does not depend on `config.val_fraction`.

    The validation and test splits have at most 10,000 examples each, fewer if those would exceed 2^30 values.

    Args:
        num_examples: number of examples.
        num_values: number of values of one example.
        config: the fractions, and the name of the data for the error message.

    Raises:
        InputError: there are too few examples.
    """
    num_val, num_test = _split_sizes(num_examples, num_values, config)
    if not _large_enough(num_examples, num_val, num_test):
        enough = next(
            count
            for count in itertools.count(num_examples)
            if _large_enough(count, *_split_sizes(count, num_values, config))
        )
        raise InputError(
            f"--data {config.name} has {num_examples} examples: too few for three splits of at least "
            f"{_MIN_EXAMPLES}; give {enough} or more"
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(num_examples)
    test, val, train = np.split(order, [num_test, num_test + num_val])
    return SplitIndices(train, val, test)


def _split_sizes(num_examples: int, num_values: int, config: DataConfig) -> tuple[int, int]:
    """Number of validation and of test examples."""
    limit = max(_MIN_EXAMPLES, min(MAX_HELD_OUT, MAX_HELD_OUT_VALUES // num_values))
    num_val = min(round(num_examples * config.val_fraction), limit)
    return num_val, min(round(num_examples * config.test_fraction), limit)


def _large_enough(num_examples: int, num_val: int, num_test: int) -> bool:
    return min(num_val, num_test, num_examples - num_val - num_test) >= _MIN_EXAMPLES


def digests(values: NDArray[np.generic]) -> Iterator[bytes]:
    """Yield the sha256 of each example's values, as little-endian bytes in C order.

    Args:
        values: the examples, [examples, ...].
    """
    little_endian = values.dtype.newbyteorder("<")
    for example in values:
        yield hashlib.sha256(np.ascontiguousarray(example, dtype=little_endian).tobytes()).digest()


def fingerprint(
    shape: Sequence[int],
    dtype: np.dtype[np.generic],
    splits: SplitIndices,
    examples: Iterable[bytes],
    classes: Sequence[str] | None,
    labels: NDArray[np.int64] | None,
) -> str:
    """sha256 of a data set: its examples, labels and split.

    Args:
        shape: shape of the array of all examples, (examples, ...).
        dtype: dtype of the values.
        splits: the indices of each split.
        examples: digest of each example, see `digests`.
        classes: class names, indexed by label, or None.
        labels: label of each example, int64 [examples], or None.
    """
    dtype_name = np.dtype(dtype).newbyteorder("<").str
    names = None if classes is None else tuple(classes)
    header = (tuple(shape), dtype_name, len(splits.val), len(splits.test), _SPLIT_SEED, names)
    digest = hashlib.sha256(repr(header).encode())
    for example in examples:
        digest.update(example)
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return digest.hexdigest()
