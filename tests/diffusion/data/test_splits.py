"""Splits, and the differences that fingerprints detect."""

import numpy as np
import pytest

from diffusion.config import DataConfig
from diffusion.data.splits import digests, fingerprint, split_indices
from diffusion.errors import InputError


def parts(splits):
    return splits.train, splits.val, splits.test


@pytest.mark.parametrize("count", [30, 1797, 66_700])
def test_every_example_is_in_exactly_one_split(count):
    indices = np.concatenate(parts(split_indices(count, 64, DataConfig())))
    np.testing.assert_array_equal(np.sort(indices), np.arange(count))


def test_held_out_splits_follow_the_fractions_up_to_ten_thousand():
    config = DataConfig(val_fraction=0.1, test_fraction=0.2)
    assert [len(part) for part in parts(split_indices(1000, 3072, config))] == [700, 100, 200]
    assert [len(part) for part in parts(split_indices(60_000, 784, config))] == [44_000, 6000, 10_000]
    assert [len(part) for part in parts(split_indices(1_300_000, 784, config))] == [
        1_280_000,
        10_000,
        10_000,
    ]


def test_fewer_large_images_are_held_out():
    """Held-out examples are kept in memory: 2^30 values are 5461 images of 3 x 256 x 256."""
    splits = split_indices(1_300_000, 3 * 256 * 256, DataConfig())
    assert len(splits.val) == len(splits.test) == 2**30 // (3 * 256 * 256) == 5461


def test_the_test_split_does_not_move_when_the_validation_split_does():
    small, large = (split_indices(5000, 2, DataConfig(val_fraction=fraction)) for fraction in (0.05, 0.4))
    np.testing.assert_array_equal(small.test, large.test)
    np.testing.assert_array_equal(small.val, large.val[: len(small.val)])


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.4])
def test_too_few_examples_are_refused_with_the_number_needed(fraction):
    config = DataConfig(val_fraction=fraction, test_fraction=0.15)
    with pytest.raises(InputError, match="9 examples: too few for three splits of at least 4") as caught:
        split_indices(9, 2, config)
    enough = int(str(caught.value).split("give ")[1].split()[0])
    assert min(len(part) for part in parts(split_indices(enough, 2, config))) >= 4
    with pytest.raises(InputError):
        split_indices(enough - 1, 2, config)


@pytest.fixture(name="arguments")
def _arguments():
    """The arguments of a fingerprint."""
    values = np.random.default_rng(0).integers(0, 256, (40, 1, 3, 3), dtype=np.uint8)
    return {
        "shape": values.shape,
        "dtype": values.dtype,
        "splits": split_indices(40, 9, DataConfig()),
        "examples": list(digests(values)),
        "classes": ("cat", "dog"),
        "labels": np.arange(40) % 2,
    }


def test_the_fingerprint_is_the_same_for_the_same_data(arguments):
    same = {**arguments, "shape": list(arguments["shape"]), "examples": iter(arguments["examples"])}
    assert fingerprint(**same) == fingerprint(**arguments)
    assert len(fingerprint(**arguments)) == 64


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shape", lambda shape: (40, 1, 9, 1)),
        ("dtype", lambda dtype: np.dtype("float64")),
        ("splits", lambda splits: split_indices(40, 9, DataConfig(val_fraction=0.2))),
        ("splits", lambda splits: split_indices(40, 9, DataConfig(test_fraction=0.2))),
        ("examples", lambda examples: [examples[1], examples[0], *examples[2:]]),
        ("examples", lambda examples: [bytes(32), *examples[1:]]),
        ("classes", lambda classes: ("cat", "fox")),
        ("labels", lambda labels: 1 - labels),
    ],
)
def test_the_fingerprint_changes_with_each_argument(arguments, name, change):
    assert fingerprint(**{**arguments, name: change(arguments[name])}) != fingerprint(**arguments)


def test_digests_depend_on_the_values_and_not_on_their_memory_layout():
    values = np.random.default_rng(0).normal(size=(5, 4, 3))
    expected = list(digests(values))
    assert list(digests(np.asfortranarray(values))) == expected
    assert list(digests(values.astype(">f8"))) == expected
    assert list(digests(np.repeat(values, 2, axis=0)[::2])) == expected
    assert len(set(expected)) == 5
