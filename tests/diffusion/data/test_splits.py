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


def test_the_users_split_is_kept():
    sides = np.random.default_rng(0).choice(3, 500, p=[0.5, 0.2, 0.3])
    for side, part in enumerate(parts(split_indices(500, 2, DataConfig(), sides=sides))):
        np.testing.assert_array_equal(np.sort(part), np.flatnonzero(sides == side))


@pytest.mark.parametrize("missing", [1, 2])
def test_a_side_that_the_users_split_lacks_is_drawn_from_its_training_examples(missing):
    """Of all examples it has the fraction of the config, 15%."""
    sides = np.zeros(400, dtype=np.int64)
    sides[::4] = 3 - missing
    splits = parts(split_indices(400, 2, DataConfig(), sides=sides))
    np.testing.assert_array_equal(np.sort(splits[3 - missing]), np.arange(0, 400, 4))
    assert len(splits[missing]) == 60 and len(splits[0]) == 240
    assert not np.isin(splits[missing], splits[0]).any()


@pytest.mark.parametrize("size", [3, 17])
def test_groups_stay_on_one_side(size):
    groups = np.random.default_rng(0).permutation(np.arange(900) // size)
    splits = parts(split_indices(900, 2, DataConfig(), groups=groups))
    of_parts = [set(groups[part].tolist()) for part in splits]
    assert not of_parts[0] & of_parts[1] and not of_parts[0] & of_parts[2] and not of_parts[1] & of_parts[2]
    assert sum(map(len, splits)) == 900
    for part in splits[1:]:
        assert 135 - size < len(part) <= 135


def test_a_large_group_is_in_training():
    groups = np.where(np.arange(900) < 500, 0, np.arange(900))
    splits = split_indices(900, 2, DataConfig(), groups=groups)
    assert set(range(500)) <= set(splits.train.tolist()) and len(splits.val) == len(splits.test) == 135


def test_users_splits_are_drawn_the_same_every_time():
    groups = np.arange(300) // 3
    for _ in range(2):
        first, second = (split_indices(300, 2, DataConfig(), groups=groups) for _ in range(2))
        for a, b in zip(parts(first), parts(second), strict=True):
            np.testing.assert_array_equal(a, b)


def test_held_out_splits_of_the_user_have_a_limit():
    sides = np.repeat([0, 1, 2], 15_000)
    splits = split_indices(45_000, 2, DataConfig(), sides=sides)
    assert [len(part) for part in parts(splits)] == [15_000, 10_000, 10_000]
    assert len(np.unique(splits.test // 100)) == 150, "not the first rows of the file"


@pytest.mark.parametrize(
    ("sides", "groups", "message"),
    [
        (None, np.zeros(60, dtype=np.int64), "its groups would leave 0 examples for val; .*those of patient"),
        (None, np.arange(60) // 30, "its groups would leave 0 examples for val"),
        (np.repeat([0, 1, 2], [50, 7, 3]), None, "its split would leave 3 examples for test; give 4 or more"),
        (
            np.repeat([0, 1, 2], 20),
            np.arange(60) // 15,
            "--group-column patient: the group of row 16 is in two splits of --split-column part",
        ),
    ],
)
def test_splits_that_cannot_be_made_are_refused(sides, groups, message):
    config = DataConfig(split_column="part", group_column="patient")
    with pytest.raises(InputError, match=message):
        split_indices(60, 2, config, sides=sides, groups=groups)


def digests_of(values):
    return list(digests(np.array(values)[:, None]))


def values_of(splits, values):
    return [set(np.array(values)[part].tolist()) for part in parts(splits)]


@pytest.mark.parametrize(
    ("values", "repeated"),
    [
        ([index - (index % 10 == 9) for index in range(2000)], 200),
        ([index // 2 for index in range(2000)], 1000),
        ([index // 9 for index in range(2000)], 1777),
    ],
    ids=["a tenth twice", "all twice", "all nine times"],
)
def test_equal_examples_are_in_one_split(values, repeated):
    splits = split_indices(2000, 1, DataConfig(), example_digests=digests_of(values))
    train, val, test = values_of(splits, values)
    assert not train & val and not train & test and not val & test
    np.testing.assert_array_equal(np.sort(np.concatenate(parts(splits))), np.arange(2000))
    assert all(290 < len(part) <= 300 for part in parts(splits)[1:])
    assert splits.notes == (f"{repeated} examples equal others; equal ones are kept in one split",)


def test_without_equal_examples_the_split_is_that_of_earlier_versions():
    splits = split_indices(500, 1, DataConfig(), example_digests=digests_of(range(500)))
    for a, b in zip(parts(splits), parts(split_indices(500, 1, DataConfig())), strict=True):
        np.testing.assert_array_equal(a, b)
    assert splits.is_random and splits.notes == ()


def test_held_out_examples_that_equal_others_are_left_out_of_the_users_split():
    values = [*range(100), *range(5), *range(200, 230), *range(3), *range(300, 330)]
    sides = np.repeat([0, 1, 2], [100, 35, 33])
    splits = split_indices(168, 1, DataConfig(), sides=sides, example_digests=digests_of(values))
    assert values_of(splits, values) == [set(range(100)), set(range(200, 230)), set(range(300, 330))]
    assert splits.notes == ("8 held-out examples are left out, because they equal examples of another split",)


def test_frequent_values_are_no_duplicates():
    """A third of the rows is zero, the others come in pairs."""
    values = [0] * 200 + [1 + index // 2 for index in range(400)]
    splits = split_indices(600, 1, DataConfig(), example_digests=digests_of(values))
    train, val, test = values_of(splits, values)
    assert train & val == train & test == val & test == {0}
    share = [np.mean(np.array(values)[part] == 0) for part in parts(splits)]
    np.testing.assert_allclose(share, 1 / 3, atol=0.12)
    assert (
        splits.notes[1] == "1 values make up a hundredth of the examples or more each, and are in all splits"
    )
    sides = np.arange(600) // 2 % 3
    given = split_indices(600, 1, DataConfig(), sides=sides, example_digests=digests_of(values))
    assert sum(map(len, parts(given))) == 600, "pairs are on one side, and zeros are left"


def test_columns_with_few_values_are_split_as_in_earlier_versions():
    values = [index % 7 for index in range(400)]
    splits = split_indices(400, 1, DataConfig(), example_digests=digests_of(values))
    np.testing.assert_array_equal(splits.val, split_indices(400, 1, DataConfig()).val)
    assert splits.is_random and splits.notes[0].startswith("7 values make up a hundredth")


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
        ("splits", lambda splits: split_indices(40, 9, DataConfig(), groups=np.arange(40))),
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


def test_equal_examples_that_leave_too_few_are_named_as_the_cause():
    equal = [bytes([index // 15]) for index in range(60)]
    with pytest.raises(
        InputError, match="its equal examples, .* 0 examples for val; .*fewer that equal others"
    ):
        split_indices(60, 2, DataConfig(), example_digests=equal)
