"""Which example is for training, validation and test, and the fingerprint of data so split."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion.config import DataConfig
from diffusion.errors import InputError

# The splits must never move between runs, so their seed is not a choice.
_SPLIT_SEED = 20_26
_FEWEST = 4  # examples of a split: fewer have no covariance to speak of
# More held-out examples would not make the figures better, and they stay in memory whatever the data.
_MOST_HELD_OUT, _MOST_HELD_OUT_VALUES = 10_000, 2**30


@dataclass(frozen=True, eq=False)
class Splits:
    """Places of the examples of each split in the data as they were found, int64."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


def split(count: int, num_values: int, config: DataConfig) -> Splits:
    """Shuffle by the fixed seed and divide; the test split does not depend on the validation's share.

    Validation and test have at most 10,000 examples, fewer where those would hold more than 2^30
    values.

    Args:
        count: examples.
        num_values: of one example.
        config: the fractions, and the name for the error.

    Raises:
        InputError: too few examples.
    """
    num_val, num_test = _sizes(count, num_values, config)
    if not _suffice(count, num_val, num_test):
        enough = next(
            more for more in itertools.count(count) if _suffice(more, *_sizes(more, num_values, config))
        )
        raise InputError(
            f"--data {config.name} has {count} examples: too few for three splits of at least {_FEWEST}; "
            f"give {enough} or more"
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(count)
    test, val, train = np.split(order, [num_test, num_test + num_val])
    return Splits(train, val, test)


def _sizes(count: int, num_values: int, config: DataConfig) -> tuple[int, int]:
    most = max(_FEWEST, min(_MOST_HELD_OUT, _MOST_HELD_OUT_VALUES // num_values))
    return min(round(count * config.val_fraction), most), min(round(count * config.test_fraction), most)


def _suffice(count: int, num_val: int, num_test: int) -> bool:
    return min(num_val, num_test, count - num_val - num_test) >= _FEWEST


def digests(values: NDArray[np.generic]) -> Iterator[bytes]:
    """sha256 of each example's values, little-endian in C order.

    Args:
        values: [examples, ...].
    """
    little = values.dtype.newbyteorder("<")
    for example in values:
        yield hashlib.sha256(np.ascontiguousarray(example, dtype=little).tobytes()).digest()


def fingerprint(
    shape: Sequence[int],
    dtype: np.dtype[np.generic],
    splits: Splits,
    examples: Iterable[bytes],
    classes: Sequence[str] | None,
    labels: NDArray[np.int64] | None,
) -> str:
    """sha256 over what the examples are, their labels and their split.

    Args:
        shape: of all examples, [examples, ...].
        dtype: of their values.
        splits: of the examples.
        examples: the digest of each, see `digests`.
        classes, labels: names by number, and each example's number.
    """
    kind = np.dtype(dtype).newbyteorder("<").str
    names = None if classes is None else tuple(classes)
    header = (tuple(shape), kind, len(splits.val), len(splits.test), _SPLIT_SEED, names)
    digest = hashlib.sha256(repr(header).encode())
    for example in examples:
        digest.update(example)
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return digest.hexdigest()
