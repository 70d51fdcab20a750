import itertools
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from diffusion.config import DataConfig
from diffusion.data.dataset import DataSpec, Split, load_dataset, make_split
from diffusion.data.memory import dataset_from_memory
from diffusion.errors import InputError

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
    """All examples of each split, normalised."""
    return dataset.train[:], dataset.val[:], dataset.test[:]


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


def test_the_splits_together_contain_every_example_once(name, dataset):
    """This also shows that they are disjoint and that denormalising inverts the normalisation."""
    all_examples = np.concatenate([dataset.raw(split) for split in splits(dataset)])
    np.testing.assert_allclose(sorted_rows(all_examples), sorted_rows(source(name)), atol=2e-4)


def test_splits_are_shuffled(name, dataset):
    assert np.abs(dataset.raw(dataset.train[:100]) - source(name)[:100]).max() > 1.0


def test_normalisation_is_fitted_on_the_training_split_alone(dataset):
    axes = (0, 2, 3) if dataset.spec.kind == "image" else (0,)
    train = dataset.train[:].double().numpy()
    np.testing.assert_allclose(train.mean(axis=axes), 0.0, atol=1e-5)
    np.testing.assert_allclose(train.std(axis=axes), 1.0, atol=1e-5)
    raw = dataset.raw(dataset.train[:])
    np.testing.assert_allclose(np.ravel(dataset.spec.mean), raw.mean(axis=axes), atol=1e-5)
    np.testing.assert_allclose(np.ravel(dataset.spec.std), raw.std(axis=axes), atol=1e-5)
    assert np.abs(dataset.val[:].double().numpy().mean(axis=axes)).max() > 1e-4


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
    denormalised = images.denormalise(np.array([[[[1.0]], [[8.0]]], [[[5.0]], [[0.0]]]]))
    np.testing.assert_allclose(denormalised.reshape(2, 2), [[11.0, 2.0], [20.0, 0.0]])
    assert denormalised.dtype == np.float64


def test_heart_is_the_curve_at_known_points():
    """Some of the 8,000 random points are close to the curve (16 sin^3 u, 13 cos u - 5 cos 2u - 2 cos 3u -
    cos 4u) / 5 at u = 0, pi/2, pi and 3 pi/2, and none is far from the curve."""
    dataset = load_dataset(DataConfig(name="heart"))
    all_examples = np.concatenate([dataset.raw(split) for split in splits(dataset)])
    for point in ([0.0, 5 / 5], [16 / 5, 4 / 5], [0.0, -17 / 5], [-16 / 5, 4 / 5]):
        assert np.linalg.norm(all_examples - point, axis=1).min() < 0.02
    u = np.linspace(0.0, 2.0 * np.pi, 10_001)
    x, y = 16 * np.sin(u) ** 3, 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
    curve = np.stack([x, y], axis=1) / 5
    sample = all_examples[::40]
    assert np.sqrt(((sample[:, None] - curve[None]) ** 2).sum(-1)).min(axis=1).max() < 2e-3


def test_specs_have_the_kind_range_and_columns_of_the_data():
    heart, digits = (load_dataset(DataConfig(name=name)).spec for name in ("heart", "digits"))
    assert (heart.kind, heart.range, heart.columns) == ("points", None, ("x", "y"))
    assert (digits.kind, digits.range, digits.columns) == ("image", (0.0, 16.0), None)


def test_loading_twice_gives_the_same_splits_whatever_the_global_random_state(name, dataset):
    np.random.seed(5)
    torch.manual_seed(5)
    again = load_dataset(DataConfig(name=name))
    assert again.spec == dataset.spec
    for one, other in zip(splits(dataset), splits(again), strict=True):
        assert torch.equal(one, other)


def test_the_test_split_stays_when_the_validation_split_grows(name, dataset):
    other = load_dataset(DataConfig(name=name, val_fraction=0.3))
    assert len(other.val) > len(dataset.val)
    np.testing.assert_allclose(other.raw(other.test[:]), dataset.raw(dataset.test[:]), atol=1e-4)


def test_fingerprints_of_different_data_and_splits_differ():
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


def test_the_clip_interval_contains_every_example(dataset):
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
    smallest, largest = dataset.train[:].min().item(), dataset.train[:].max().item()
    assert high - low == pytest.approx(1.05 * (largest - smallest), rel=1e-6)
    assert high + low == pytest.approx(largest + smallest, abs=1e-6)


def test_the_log_snr_window_ends_at_less_noise_for_a_curve_than_for_images():
    """Other digits tell little about a digit at less noise; neighbours on a curve are close."""
    ends = {name: load_dataset(DataConfig(name=name)).spec.log_snr_window for name in NAMES}
    assert max(low for low, _ in ends.values()) <= -8.0
    assert 1.0 < ends["digits"][1] < 3.0 and ends["heart"][1] == 9.0


def test_spec_survives_json(dataset):
    assert DataSpec.from_dict(json.loads(json.dumps(dataset.spec.to_dict()))) == dataset.spec


def test_a_spec_of_an_older_version_without_classes_is_read(dataset):
    older = dataset.spec.to_dict()
    del older["classes"]
    assert DataSpec.from_dict(older) == replace(dataset.spec, classes=None)


@pytest.mark.parametrize(
    ("classes", "scale", "message"),
    [
        (["a", "\udcff"], 1.0, r"the name of the class '\\udcff' is not text in UTF-8: rename it"),
        (["a", "b"], 1e150, "column x0 has values too large to work with"),
    ],
)
def test_data_whose_models_could_not_be_read_again_are_refused(classes, scale, message):
    points = np.random.default_rng(0).normal(size=(40, 1)) * scale
    with pytest.raises(InputError, match=message):
        dataset_from_memory(points, DataConfig(conditional=True), classes * 20)


def test_a_mean_beyond_float32_is_refused_however_small_the_differences():
    points = 1e39 + 1e30 * np.random.default_rng(0).normal(size=(40, 1))
    with pytest.raises(InputError, match="no model could be stored with these data .*mean is not finite"):
        dataset_from_memory(points)


def test_digits_carry_their_labels_through_the_split():
    dataset = load_dataset(DataConfig(name="digits", conditional=True))
    assert dataset.spec.classes == tuple("0123456789")
    expected = {image.tobytes(): label for image, label in zip(*load_digits(return_X_y=True), strict=True)}
    for part in (dataset.train, dataset.val, dataset.test):
        raw = dataset.raw(part[:]).round().reshape(len(part), -1)
        assert [expected[image.tobytes()] for image in raw] == part.labels.tolist()


def test_points_without_a_label_column_have_no_labels():
    dataset = load_dataset(DataConfig(name="heart"))
    assert dataset.spec.classes is None and dataset.train.labels is None


def test_moving_to_a_device_keeps_everything(dataset):
    moved = dataset.to("cpu")
    assert moved.spec == dataset.spec
    assert torch.equal(moved.train[:], dataset.train[:])
    assert torch.equal(moved.test[:], dataset.test[:])


def test_moving_a_split_moves_its_moments_and_labels(images):
    moved = images.to("meta")
    assert {tensor.device.type for tensor in (moved.values, moved.mean, moved.std, moved.labels)} == {"meta"}
    assert moved.device.type == "meta" and images.device.type == "cpu"


@pytest.fixture(name="images")
def _images():
    """Fifty uint8 colour images with their moments and labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 4), dtype=np.uint8)
    mean, std = pixels.mean(axis=(0, 2, 3)), pixels.std(axis=(0, 2, 3))
    return make_split(pixels, mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1), np.arange(50))


def test_images_are_stored_as_uint8_and_returned_normalised(images):
    assert images.values.dtype == torch.uint8 and len(images) == 50
    taken = images[10:20]
    assert taken.dtype == torch.float32
    expected = (images.values[10:20].double() - images.mean.double()) / images.std.double()
    torch.testing.assert_close(taken.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_example_is_bit_identical_however_it_is_indexed(images):
    whole = images[:]
    index = torch.tensor([7, 3, 3, 49, 0])
    assert torch.equal(images[index], whole[index])
    assert torch.equal(images[20:30], whole[20:30])
    assert torch.equal(images[torch.tensor([5])], images[5:6])
    values = images.values.float()
    assert torch.equal(whole, (values - images.mean) / images.std)


def test_batches_are_the_examples_at_the_index_tensors(images):
    order = [torch.tensor([1, 2]), torch.tensor([49]), torch.tensor([2, 1, 0])]
    for index, batch in zip(order, images.batches(iter(order)), strict=True):
        assert torch.equal(batch, images[index])
    endless = images.batches(torch.tensor([number % 50]) for number in itertools.count())
    assert len([batch for _, batch in zip(range(200), endless, strict=False)]) == 200


def test_splits_survive_pickling_into_read_only_memory(images):
    """Ray passes them to its workers in this way."""
    buffers = []
    packed = pickle.dumps(images, protocol=5, buffer_callback=buffers.append)
    assert len(packed) < 2000, "the data are in out-of-band buffers, not in the pickle"
    again = pickle.loads(packed, buffers=[bytes(buffer) for buffer in buffers])
    assert isinstance(again, Split) and torch.equal(again[:], images[:])
    assert torch.equal(again.labels, images.labels)
    plain = pickle.loads(pickle.dumps(load_dataset(DataConfig(name="heart")).val))
    assert plain.labels is None and plain.mean is None and len(plain) == 1200


def test_flips_of_points_and_label_columns_of_images_are_refused():
    with pytest.raises(InputError, match="only images can be flipped"):
        load_dataset(DataConfig(name="heart", horizontal_flips=True))
    with pytest.raises(InputError, match="--label-column kind: only tables have columns"):
        load_dataset(DataConfig(name="digits", label_column="kind"))
    assert load_dataset(DataConfig(name="digits", horizontal_flips=True)).spec.kind == "image"
