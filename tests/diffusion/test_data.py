import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from diffusion.config import DataConfig
from diffusion.data import DataSpec, _smallest_step, load_dataset

NAMES = ("digits", "heart")


@pytest.fixture(scope="module", params=NAMES, name="name")
def _name(request):
    return request.param


@pytest.fixture(scope="module", name="dataset")
def _dataset(name):
    return load_dataset(DataConfig(name=name))


def heart_values():
    u = np.random.default_rng(42).uniform(0.0, 2.0 * np.pi, 8000)
    x = 16 * np.sin(u) ** 3
    y = 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
    return np.stack([x, y], axis=1) / 5


def source(name):
    return heart_values() if name == "heart" else load_digits().images[:, None]


def sorted_rows(values):
    flat = np.round(np.asarray(values, dtype=np.float64).reshape(len(values), -1), 4)
    return flat[np.lexsort(flat.T)]


def splits(dataset):
    return dataset.train, dataset.val, dataset.test


@pytest.mark.parametrize(
    ("name", "shape", "sizes"), [("digits", (1, 8, 8), (1257, 270, 270)), ("heart", (2,), (5600, 1200, 1200))]
)
def test_shapes_and_sizes_of_the_splits(name, shape, sizes):
    dataset = load_dataset(DataConfig(name=name, val_fraction=0.15, test_fraction=0.15))
    assert tuple(len(split) for split in splits(dataset)) == sizes
    for split in splits(dataset):
        assert split.shape[1:] == shape
        assert split.dtype == torch.float32
    assert dataset.spec.shape == shape
    assert dataset.spec.name == name


def test_splits_together_are_the_data_set_each_example_once(name, dataset):
    """So they are disjoint, and denormalising undoes the normalisation."""
    together = np.concatenate([dataset.raw(split) for split in splits(dataset)])
    np.testing.assert_allclose(sorted_rows(together), sorted_rows(source(name)), atol=2e-4)


def test_splits_are_shuffled(name, dataset):
    assert np.abs(dataset.raw(dataset.train)[:100] - source(name)[:100]).max() > 1.0


def test_normalisation_is_fitted_on_the_training_split_alone(dataset):
    axes = (0, 2, 3) if dataset.spec.kind == "image" else (0,)
    train = dataset.train.double().numpy()
    np.testing.assert_allclose(train.mean(axis=axes), 0.0, atol=1e-5)
    np.testing.assert_allclose(train.std(axis=axes), 1.0, atol=1e-5)
    raw = dataset.raw(dataset.train)
    np.testing.assert_allclose(np.ravel(dataset.spec.mean), raw.mean(axis=axes), atol=1e-5)
    np.testing.assert_allclose(np.ravel(dataset.spec.std), raw.std(axis=axes), atol=1e-5)
    assert np.abs(dataset.val.double().numpy().mean(axis=axes)).max() > 1e-4


def test_denormalise_scales_each_column_or_channel_by_its_own_numbers():
    def spec(kind, shape, mean, std, value_range):
        return DataSpec(
            name="x",
            kind=kind,
            shape=shape,
            mean=mean,
            std=std,
            range=value_range,
            columns=None,
            clip=(-1.0, 1.0),
            log_snr_window=(-8.0, 5.0),
            fingerprint="",
        )

    points = spec("points", (2,), [1.0, -2.0], [10.0, 0.5], None)
    np.testing.assert_allclose(
        points.denormalise(np.array([[0.0, 0.0], [3.0, 4.0]])), [[1.0, -2.0], [31.0, 0.0]]
    )
    images = spec("image", (2, 1, 1), [[[1.0]], [[-2.0]]], [[[10.0]], [[0.5]]], (0.0, 20.0))
    found = images.denormalise(np.array([[[[1.0]], [[8.0]]], [[[5.0]], [[0.0]]]]))
    np.testing.assert_allclose(found.reshape(2, 2), [[11.0, 2.0], [20.0, 0.0]])
    assert found.dtype == np.float64


def test_heart_is_the_curve_at_known_points():
    """(16 sin^3 u, 13 cos u - 5 cos 2u - 2 cos 3u - cos 4u) / 5 at u = 0, pi/2, pi and 3 pi/2, which
    its 8,000 random points pass closely, and from which none of them is far."""
    dataset = load_dataset(DataConfig(name="heart"))
    together = np.concatenate([dataset.raw(split) for split in splits(dataset)])
    for point in ([0.0, 5 / 5], [16 / 5, 4 / 5], [0.0, -17 / 5], [-16 / 5, 4 / 5]):
        assert np.linalg.norm(together - point, axis=1).min() < 0.02
    u = np.linspace(0.0, 2.0 * np.pi, 10_001)
    x, y = 16 * np.sin(u) ** 3, 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
    curve = np.stack([x, y], axis=1) / 5
    some = together[::40]
    assert np.sqrt(((some[:, None] - curve[None]) ** 2).sum(-1)).min(axis=1).max() < 2e-3


def test_specs_say_what_kind_of_data_they_describe():
    heart, digits = (load_dataset(DataConfig(name=name)).spec for name in ("heart", "digits"))
    assert (heart.kind, heart.range, heart.columns) == ("points", None, ("x", "y"))
    assert (digits.kind, digits.range, digits.columns) == ("image", (0.0, 16.0), None)


def test_loading_twice_gives_the_same_splits_whatever_the_process_drew_before(name, dataset):
    np.random.seed(5)
    torch.manual_seed(5)
    again = load_dataset(DataConfig(name=name))
    assert again.spec == dataset.spec
    for one, other in zip(splits(dataset), splits(again), strict=True):
        assert torch.equal(one, other)


def test_the_test_split_stays_when_the_validation_split_grows(name, dataset):
    other = load_dataset(DataConfig(name=name, val_fraction=0.3))
    assert len(other.val) > len(dataset.val)
    np.testing.assert_allclose(other.raw(other.test), dataset.raw(dataset.test), atol=1e-4)


def test_the_fingerprint_tells_data_and_splits_apart():
    configs = [
        DataConfig(name="digits"),
        DataConfig(name="digits", val_fraction=0.2),
        DataConfig(name="digits", test_fraction=0.2),
        DataConfig(name="digits", val_fraction=0.2, test_fraction=0.2),
        DataConfig(name="heart"),
    ]
    fingerprints = [load_dataset(config).spec.fingerprint for config in configs]
    assert len(set(fingerprints)) == len(configs)
    assert load_dataset(DataConfig(name="digits")).spec.fingerprint == fingerprints[0]


def test_the_clip_interval_holds_every_example(dataset):
    low, high = dataset.spec.clip
    for split in splits(dataset):
        assert low <= split.min().item() + 1e-6
        assert split.max().item() - 1e-6 <= high


def test_images_clip_to_their_possible_values():
    spec = load_dataset(DataConfig(name="digits")).spec
    ends = spec.denormalise(np.array(spec.clip).reshape(2, 1, 1, 1))
    np.testing.assert_allclose(ends.ravel(), [0.0, 16.0], atol=1e-9)


def test_points_clip_to_the_training_range_over_all_columns_widened_by_5_percent():
    dataset = load_dataset(DataConfig(name="heart"))
    low, high = dataset.spec.clip
    smallest, largest = dataset.train.min().item(), dataset.train.max().item()
    assert high - low == pytest.approx(1.05 * (largest - smallest), rel=1e-6)
    assert high + low == pytest.approx(largest + smallest, abs=1e-6)


def test_the_window_of_digits_ends_at_five_and_holds_every_strong_direction():
    """A grey level is coarse enough to keep the upper end at 5; the lower is -8 or below."""
    low, high = load_dataset(DataConfig(name="digits")).spec.log_snr_window
    assert low <= -8.0 and high == 5.0


def test_smallest_step_is_one_grey_level_and_no_larger_than_any_gap():
    images = np.random.default_rng(0).integers(0, 17, (50, 1, 8, 8)).astype(np.uint8)
    assert _smallest_step(images, np.array([4.0])) == pytest.approx(0.25)
    points = np.random.default_rng(1).normal(size=(100, 2))
    gaps = [np.diff(np.sort(column)).min() for column in points.T]
    assert _smallest_step(points, np.ones(2)) == pytest.approx(min(gap for gap in gaps if gap > 1e-7))


def test_spec_survives_json(dataset):
    assert DataSpec.from_dict(json.loads(json.dumps(dataset.spec.to_dict()))) == dataset.spec


def test_moving_to_a_device_keeps_everything(dataset):
    moved = dataset.to("cpu")
    assert moved.spec == dataset.spec
    assert torch.equal(moved.train, dataset.train)
    assert torch.equal(moved.test, dataset.test)
