"""Splits into training, validation and test examples, and the fingerprint of split data."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diffusion.config import DataConfig
from diffusion.errors import InputError

# The splits must be the same in all runs, so their seed cannot be configured.
_SPLIT_SEED = 2026
# Fraction, and number, of the examples from which on a repeated value is no duplicate.
_FREQUENT, _MIN_FREQUENT = 0.01, 20
_MIN_EXAMPLES = 4  # per split; fewer do not determine a covariance
# More held-out examples would not improve the metrics, and they are always kept in memory.
MAX_HELD_OUT, MAX_HELD_OUT_VALUES = 10_000, 2**30


SIDES = ("train", "val", "test")
_TRAIN, _VAL, _TEST = range(3)
# Names of the sides in columns and folders, in lower case.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), _TRAIN),
    **dict.fromkeys(("val", "valid", "validation"), _VAL),
    "test": _TEST,
}


@dataclass(frozen=True, eq=False)
class SplitIndices:
    """Indices of the examples of each split in the unsplit data, int64.

    Attributes:
        train, val, test: the indices.
        is_random: whether examples were drawn one by one by the fixed seed, so that the numbers of examples
            tell which ones.
        notes: lines about the split that the user should read.
    """

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]
    is_random: bool = True
    notes: tuple[str, ...] = ()


def split_indices(
    num_examples: int,
    num_values: int,
    config: DataConfig,
    *,
    sides: NDArray[np.int64] | None = None,
    groups: NDArray[np.int64] | None = None,
    example_digests: Sequence[bytes] = (),
) -> SplitIndices:
    """Split by the fixed seed; the test split does not depend on `config.val_fraction`.

    The validation and test splits have at most 10,000 examples each, fewer if those would exceed 2^30 values.
    Equal examples are in one split. In a split by the user's sides or groups, which others would break, the
    held-out ones that equal an example of another split are left out. A value that 20 examples and a
    hundredth of all have, as in columns with few values, is no duplicate and may be in all splits.

    Args:
        num_examples: number of examples.
        num_values: number of values of one example.
        config: the fractions, and the name of the data for the error message.
        sides: the user's split, indices into `SIDES` [examples]; a side that it lacks is drawn from the
            training examples. None draws all.
        groups: [examples], numbers of groups whose examples stay on one side, or None.
        example_digests: digest of each example, by which equal ones are found, see `digests`.

    Raises:
        InputError: there are too few examples, or a group is on two sides or too large.
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
    sizes, limit = (num_val, num_test), _max_held_out(num_values)
    equal, num_frequent = _equal_examples(example_digests) if len(example_digests) else (None, 0)
    if sides is not None or groups is not None:
        splits = _assigned(num_examples, sizes, limit, config, sides, groups)
        splits = splits if equal is None else _without_duplicates(splits, equal)
    elif equal is not None and len(np.unique(equal)) < num_examples:
        splits = _assigned(num_examples, sizes, limit, config, None, equal)
        count = num_examples - len(np.unique(equal))
        splits = replace(splits, notes=(f"{count} examples equal others; equal ones are kept in one split",))
    else:
        order = np.random.default_rng(_SPLIT_SEED).permutation(num_examples)
        test, val, train = np.split(order, [num_test, num_test + num_val])
        splits = SplitIndices(train, val, test)
    if num_frequent:
        note = (
            f"{num_frequent} values make up a hundredth of the examples or more each, and are in all splits"
        )
        splits = replace(splits, notes=(*splits.notes, note))
    return splits


def _assigned(
    num_examples: int,
    sizes: tuple[int, int],
    limit: int,
    config: DataConfig,
    sides: NDArray[np.int64] | None,
    groups: NDArray[np.int64] | None,
) -> SplitIndices:
    """The user's split, the sides that it lacks drawn by groups, or a split drawn by groups."""
    rng = np.random.default_rng(_SPLIT_SEED)
    assigned = np.zeros(num_examples, dtype=np.int64) if sides is None else sides.copy()
    members = np.arange(num_examples) if groups is None else groups
    if sides is not None and groups is not None:
        first = np.zeros(members.max() + 1, dtype=np.int64)
        first[members] = sides
        if (torn := np.flatnonzero(first[members] != sides)).size:
            raise InputError(
                f"--group-column {config.group_column}: the group of row {torn[0] + 1} is in two splits of "
                f"--split-column {config.split_column}; give each group one split, or leave one flag out"
            )
    for side, wanted in zip((_VAL, _TEST), sizes, strict=True):
        if sides is None or not (sides == side).any():
            assigned[np.isin(members, _drawn_groups(members[assigned == _TRAIN], wanted, rng))] = side
    order = rng.permutation(num_examples)
    train, val, test = (order[assigned[order] == side] for side in range(len(SIDES)))
    for name, part in zip(SIDES, (train, val, test), strict=True):
        if len(part) < _MIN_EXAMPLES:
            cause, remedy = "split", ""
            if groups is not None and config.group_column is None:
                cause, remedy = "equal examples, which stay in one split,", ", or fewer that equal others"
            elif groups is not None:
                cause, remedy = "groups", f", or smaller groups than those of {config.group_column}"
            raise InputError(
                f"--data {config.name}: its {cause} would leave {len(part)} examples for {name}; give "
                f"{_MIN_EXAMPLES} or more{remedy}"
            )
    # Their order is random, so the first are as good as any.
    return SplitIndices(train, val[:limit], test[:limit], is_random=False)


def _drawn_groups(members: NDArray[np.int64], wanted: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Groups with at most so many examples in all, drawn at random; those that are too large are left out.

    Args:
        members: group of each example.
        wanted: number of examples.
        rng: random generator.
    """
    groups, sizes = np.unique(members, return_counts=True)
    chosen, total = [], 0
    for index in rng.permutation(len(groups)):
        if total + sizes[index] <= wanted:
            chosen.append(groups[index])
            total += sizes[index]
    return np.array(chosen, dtype=np.int64)


def _equal_examples(example_digests: Sequence[bytes]) -> tuple[NDArray[np.int64], int]:
    """Numbers that equal examples share, int64 [examples], and how many values are too frequent for that.

    Each example of such a value, which 20 examples and a hundredth of all have, has a number of its own.
    """
    first: dict[bytes, int] = {}
    equal = np.array([first.setdefault(digest, index) for index, digest in enumerate(example_digests)])
    values, counts = np.unique(equal, return_counts=True)
    frequent = values[counts >= max(_MIN_FREQUENT, _FREQUENT * len(equal))]
    return np.where(np.isin(equal, frequent), np.arange(len(equal)), equal), len(frequent)


def _without_duplicates(splits: SplitIndices, equal: NDArray[np.int64]) -> SplitIndices:
    """A split without the held-out examples that equal one of an earlier side, in the order of `SIDES`.

    Args:
        splits: the split.
        equal: numbers that equal examples share.
    """
    val = splits.val[~np.isin(equal[splits.val], equal[splits.train])]
    earlier = np.concatenate([equal[splits.train], equal[val]])
    test = splits.test[~np.isin(equal[splits.test], earlier)]
    count = len(splits.val) + len(splits.test) - len(val) - len(test)
    if not count:
        return splits
    if min(len(val), len(test)) < _MIN_EXAMPLES:
        note = f"{count} held-out examples equal examples of another split"
        return replace(splits, notes=(*splits.notes, note))
    note = f"{count} held-out examples are left out, because they equal examples of another split"
    return replace(splits, val=val, test=test, notes=(*splits.notes, note))


def _split_sizes(num_examples: int, num_values: int, config: DataConfig) -> tuple[int, int]:
    """Number of validation and of test examples."""
    limit = _max_held_out(num_values)
    num_val = min(round(num_examples * config.val_fraction), limit)
    return num_val, min(round(num_examples * config.test_fraction), limit)


def _max_held_out(num_values: int) -> int:
    """Maximum number of examples of a held-out split."""
    return max(_MIN_EXAMPLES, min(MAX_HELD_OUT, MAX_HELD_OUT_VALUES // num_values))


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
    if not splits.is_random:
        for part in (splits.train, splits.val, splits.test):
            digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    for example in examples:
        digest.update(example)
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return digest.hexdigest()
