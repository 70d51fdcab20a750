"""Which example goes where, and what the fingerprint tells apart."""

import numpy as np
import pytest

from diffusion.config import DataConfig
from diffusion.errors import InputError
from diffusion.splits import digests, fingerprint, split


def places(splits):
    return splits.train, splits.val, splits.test


@pytest.mark.parametrize("count", [30, 1797, 66_700])
def test_every_example_is_in_exactly_one_split(count):
    together = np.concatenate(places(split(count, 64, DataConfig())))
    np.testing.assert_array_equal(np.sort(together), np.arange(count))


def test_held_out_splits_follow_the_fractions_up_to_ten_thousand():
    config = DataConfig(val_fraction=0.1, test_fraction=0.2)
    assert [len(part) for part in places(split(1000, 3072, config))] == [700, 100, 200]
    assert [len(part) for part in places(split(60_000, 784, config))] == [44_000, 6000, 10_000]
    assert [len(part) for part in places(split(1_300_000, 784, config))] == [1_280_000, 10_000, 10_000]


def test_held_out_images_that_are_large_are_fewer():
    """They stay in memory: 2^30 values of 3 x 256 x 256 images are 5461."""
    splits = split(1_300_000, 3 * 256 * 256, DataConfig())
    assert len(splits.val) == len(splits.test) == 2**30 // (3 * 256 * 256) == 5461


def test_the_test_split_does_not_move_when_the_validation_split_does():
    small, large = (split(5000, 2, DataConfig(val_fraction=share)) for share in (0.05, 0.4))
    np.testing.assert_array_equal(small.test, large.test)
    np.testing.assert_array_equal(small.val, large.val[: len(small.val)])


@pytest.mark.parametrize("share", [0.01, 0.15, 0.4])
def test_too_few_examples_are_told_how_many_would_do(share):
    config = DataConfig(val_fraction=share, test_fraction=0.15)
    with pytest.raises(InputError, match="9 examples: too few for three splits of at least 4") as caught:
        split(9, 2, config)
    enough = int(str(caught.value).split("give ")[1].split()[0])
    assert min(len(part) for part in places(split(enough, 2, config))) >= 4
    with pytest.raises(InputError):
        split(enough - 1, 2, config)


@pytest.fixture(name="facts")
def _facts():
    """The arguments of a fingerprint."""
    values = np.random.default_rng(0).integers(0, 256, (40, 1, 3, 3), dtype=np.uint8)
    return {
        "shape": values.shape,
        "dtype": values.dtype,
        "splits": split(40, 9, DataConfig()),
        "examples": list(digests(values)),
        "classes": ("cat", "dog"),
        "labels": np.arange(40) % 2,
    }


def test_the_fingerprint_is_the_same_for_the_same_data(facts):
    same = {**facts, "shape": list(facts["shape"]), "examples": iter(facts["examples"])}
    assert fingerprint(**same) == fingerprint(**facts)
    assert len(fingerprint(**facts)) == 64


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shape", lambda shape: (40, 1, 9, 1)),
        ("dtype", lambda dtype: np.dtype("float64")),
        ("splits", lambda splits: split(40, 9, DataConfig(val_fraction=0.2))),
        ("splits", lambda splits: split(40, 9, DataConfig(test_fraction=0.2))),
        ("examples", lambda examples: [examples[1], examples[0], *examples[2:]]),
        ("examples", lambda examples: [bytes(32), *examples[1:]]),
        ("classes", lambda classes: ("cat", "fox")),
        ("labels", lambda labels: 1 - labels),
    ],
)
def test_the_fingerprint_differs_wherever_one_fact_does(facts, name, change):
    assert fingerprint(**{**facts, name: change(facts[name])}) != fingerprint(**facts)


def test_a_digest_is_of_the_values_whatever_their_layout_in_memory():
    values = np.random.default_rng(0).normal(size=(5, 4, 3))
    want = list(digests(values))
    assert list(digests(np.asfortranarray(values))) == want
    assert list(digests(values.astype(">f8"))) == want
    assert list(digests(np.repeat(values, 2, axis=0)[::2])) == want
    assert len(set(want)) == 5
