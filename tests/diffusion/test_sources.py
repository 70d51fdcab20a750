"""Data of the user's own, named sets read without a network, and names."""

import struct

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diffusion import sources
from diffusion.config import DataConfig
from diffusion.data import load_dataset
from diffusion.errors import InputError
from diffusion.image_folder import load_image_folder
from diffusion.presets import preset
from diffusion.sources import image_side, needs_streaming, number_labels, resolve, short_name


def random_grey(seed: int, size=(20, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Forty grey images in two class folders."""
    for number in range(40):
        place = tmp_path / f"class{number % 2}"
        place.mkdir(exist_ok=True)
        random_grey(number).save(place / f"{number:02}.png")
    return tmp_path


def test_a_folder_can_be_split_and_normalised_like_any_data(folder):
    dataset = load_dataset(DataConfig(name=str(folder), image_size=8, conditional=True))
    assert dataset.spec.kind == "image" and dataset.spec.shape == (1, 8, 8)
    assert dataset.spec.range == (0.0, 255.0)
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 40
    images = {image.tobytes(): name for image, name in zip(*_folder_images(folder), strict=True)}
    for part in (dataset.train, dataset.val, dataset.test):
        for image, label in zip(dataset.raw(part[:]).round().astype(np.uint8), part.labels, strict=True):
            assert images.pop(image.tobytes()) == dataset.spec.classes[label]
    assert not images, "every image is in one of the splits, with its class"


def test_bytes_are_normalised_by_the_training_split_alone(folder):
    dataset = load_dataset(DataConfig(name=str(folder), image_size=8))
    assert dataset.train.values.dtype == torch.uint8
    pixels = dataset.train.values.numpy().astype(np.float64)
    assert np.ravel(dataset.spec.mean) == pytest.approx(pixels.mean(), rel=1e-12)
    assert np.ravel(dataset.spec.std) == pytest.approx(pixels.std(), rel=1e-12)
    assert float(dataset.train[:].mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(dataset.train[:].std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert abs(float(dataset.val[:].mean())) > 1e-4


def _folder_images(folder):
    found = load_image_folder(folder, 8, skip_bad=False)
    return found.pixels, found.class_names


def test_points_far_from_zero_keep_their_precision(tmp_path):
    path = tmp_path / "times.csv"
    values = 1.7e9 + np.random.default_rng(0).normal(size=(100, 2))
    pd.DataFrame(values, columns=["a", "b"]).to_csv(path, index=False, float_format="%.9f")
    dataset = load_dataset(DataConfig(name=str(path)))
    raw = np.concatenate([dataset.raw(part[:]) for part in (dataset.train, dataset.val, dataset.test)])
    np.testing.assert_allclose(np.sort(raw[:, 0]), np.sort(values[:, 0]), atol=1e-5, rtol=0)


def test_too_few_examples_and_constant_columns_are_named(tmp_path):
    few, constant = tmp_path / "few.csv", tmp_path / "constant.csv"
    pd.DataFrame({"a": np.arange(10.0)}).to_csv(few, index=False)
    pd.DataFrame({"a": np.arange(100.0), "same": 1.0}).to_csv(constant, index=False)
    with pytest.raises(InputError, match="10 examples: too few"):
        load_dataset(DataConfig(name=str(few)))
    with pytest.raises(InputError, match="same has one value only"):
        load_dataset(DataConfig(name=str(constant)))


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert resolve("heart") == "heart"
    assert resolve("photos") == str(tmp_path / "photos")
    for nothing in ("nope", "nope/there", "x.csv"):
        with pytest.raises(InputError, match=f"--data {nothing}"):
            resolve(nothing)


def test_defaults_follow_the_kind_and_size_of_the_data(folder, tmp_path):
    assert preset(str(folder)).network.kind == "unet"
    assert preset(str(folder), image_size=8).network.kind == "mlp"
    assert preset("digits").network.kind == "mlp" and preset("mnist").network.kind == "unet"
    assert image_side(DataConfig(name="heart")) is None
    assert image_side(DataConfig(name="cifar10")) == 32


@pytest.mark.parametrize(
    ("path", "name"), [("/a/My photos!", "My-photos-"), ("/a/.hidden", "hidden"), ("/a/ö", "-")]
)
def test_folders_lend_runs_a_name_that_is_allowed(path, name):
    assert short_name(DataConfig(name=path)) in (name, "data")


def test_classes_are_numbered_in_sorted_order():
    classes, labels = number_labels(["dog", "10", "9", "dog"])
    assert classes == ("10", "9", "dog") and labels.tolist() == [2, 0, 1, 2]
    assert number_labels(None) == (None, None)


def test_a_label_column_makes_classes_and_no_coordinate(tmp_path):
    path = tmp_path / "iris.csv"
    petals = np.random.default_rng(0).normal(size=(60, 2))
    names = np.array(["setosa", "virginica", "versicolor"])[np.arange(60) % 3]
    pd.DataFrame({"length": petals[:, 0], "kind": names, "width": petals[:, 1]}).to_csv(path, index=False)
    dataset = load_dataset(DataConfig(name=str(path), label_column="kind"))
    assert dataset.spec.columns == ("length", "width") and dataset.spec.shape == (2,)
    assert dataset.spec.classes == ("setosa", "versicolor", "virginica")
    wanted = dict(zip(petals[:, 0].round(4), names, strict=True))
    for point, label in zip(dataset.raw(dataset.val[:]), dataset.val.labels, strict=True):
        assert wanted[point[0].round(4)] == dataset.spec.classes[label]


def test_labels_are_part_of_the_fingerprint(tmp_path):
    prints = []
    for names in ("aab", "aba", "xxy"):
        table = pd.DataFrame({"x": np.arange(60.0), "kind": list(names) * 20})
        table.to_csv(tmp_path / "t.csv", index=False)
        config = DataConfig(name=str(tmp_path / "t.csv"), label_column="kind")
        prints.append(load_dataset(config).spec.fingerprint)
    assert len(set(prints)) == 3


def test_values_too_large_to_normalise_are_told(tmp_path):
    pd.DataFrame({"x": np.arange(60.0) * 1e300}).to_csv(tmp_path / "t.csv", index=False)
    with np.errstate(over="ignore"), pytest.raises(InputError, match="column x has values too large"):
        load_dataset(DataConfig(name=str(tmp_path / "t.csv")))


def test_images_that_are_all_of_one_shade_are_told(tmp_path):
    for number in range(30):
        Image.new("L", (8, 8), 7).save(tmp_path / f"{number}.png")
    with pytest.raises(InputError, match="channel 0 of the images has one value only"):
        load_dataset(DataConfig(name=str(tmp_path)))


def test_only_folders_above_the_memory_limit_need_streaming(folder):
    size = 40 * 16 * 16
    for limit, streams in ((size - 1, True), (size, False)):
        assert needs_streaming(DataConfig(name=str(folder), memory_limit_gb=limit / 1e9)) is streams
    small = DataConfig(name=str(folder), image_size=8, memory_limit_gb=(size - 1) / 1e9)
    assert not needs_streaming(small), "the size asked for counts, not the files'"
    assert not needs_streaming(DataConfig(name="mnist", memory_limit_gb=1e-9))


def test_a_path_that_leads_nowhere_is_told(tmp_path):
    for use in (load_dataset, needs_streaming):
        with pytest.raises(InputError, match="there is no such folder or table"):
            use(DataConfig(name=str(tmp_path / "gone")))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CACHE", tmp_path)
    return tmp_path


def write_idx(path, array):
    """The format of MNIST's files: two zero bytes, 8 for bytes, dimensions, sizes big-endian, values."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


def write_mnist(folder, images, labels):
    """A small MNIST in torchvision's folders."""
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)


@pytest.mark.parametrize(
    ("name", "folder", "first"),
    [("mnist", "MNIST", "0 - zero"), ("fashion-mnist", "FashionMNIST", "T-shirt/top")],
)
def test_mnist_is_read_from_the_cache_with_its_labels(cache, name, folder, first):
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = (np.arange(60) % 10).astype(np.uint8)
    write_mnist(cache / folder / "raw", images, labels)
    dataset = load_dataset(DataConfig(name=name, conditional=True))
    assert dataset.spec.shape == (1, 28, 28) and dataset.spec.range == (0.0, 255.0)
    assert len(dataset.spec.classes) == 10 and dataset.spec.classes[0] == first
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for part in (dataset.train, dataset.val, dataset.test):
        assert [known.pop(image.numpy().tobytes()) for image in part.values] == part.labels.tolist()
    assert not known


def test_cifar_is_turned_channels_first(monkeypatch):
    import torchvision

    class Cifar:
        classes = ["plane", "car"]

        def __init__(self, *_args, **_kwargs):
            self.data = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
            self.targets = [number % 2 for number in range(40)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    raw = sources.load_raw(DataConfig(name="cifar10"))
    assert raw.values.shape == (40, 3, 32, 32) and raw.classes == ("plane", "car")
    np.testing.assert_array_equal(raw.values[7, 2], Cifar().data[7, :, :, 2])
    assert raw.labels.tolist() == Cifar().targets


def test_a_download_that_fails_is_one_line_with_the_alternative(monkeypatch, cache, capsys):
    """torchvision's own download, on a machine whose every connection fails."""
    import urllib.request

    def no_network(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    for name in ("mnist", "fashion-mnist", "cifar10"):
        with pytest.raises(InputError) as caught:
            load_dataset(DataConfig(name=name))
        message = str(caught.value)
        assert f"--data {name} could not be downloaded" in message and "no route to host" in message
        assert "folder of images" in message and "\n" not in message
        assert f"Downloading {name} to {cache}" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sources, "CACHE", tmp_path / "file")
    with pytest.raises(InputError, match="could not be downloaded"):
        load_dataset(DataConfig(name="mnist"))


@pytest.mark.parametrize("length", [0, 5, 5000])
def test_downloaded_files_that_are_not_whole_are_told_from_no_network(cache, length):
    images = np.zeros((60, 28, 28), dtype=np.uint8)
    write_mnist(cache / "MNIST" / "raw", images, np.zeros(60, dtype=np.uint8))
    file = cache / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match="remove that folder") as caught:
        load_dataset(DataConfig(name="mnist"))
    assert str(cache) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ({"memory_limit_gb": 0.0}, "--memory-limit-gb 0.0: give above 0"),
        ({"memory_limit_gb": float("nan")}, "--memory-limit-gb nan"),
        ({"memory_limit_gb": float("inf")}, "--memory-limit-gb inf"),
        ({"label_column": ""}, '--label-column "": give the name of a column'),
    ],
)
def test_choices_that_cannot_be_are_refused_at_once(choice, named):
    with pytest.raises(InputError, match=named):
        DataConfig(**choice)
