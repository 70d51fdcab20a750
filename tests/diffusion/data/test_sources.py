"""Data sources: folders, tables, named data sets without a network, and those of other packages."""

import itertools
import os
import shutil
import struct
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diffusion import registry
from diffusion.config import DataConfig
from diffusion.data import named
from diffusion.data.dataset import load_dataset, load_source
from diffusion.data.sources import DataSource, RawData, encode_labels, open_source, resolve, short_name
from diffusion.errors import InputError
from diffusion.presets import preset, source_preset
from diffusion.registry import DATA_SOURCES


def random_grey(seed: int, size=(20, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Forty grey images in two class folders."""
    for number in range(40):
        class_folder = tmp_path / f"class{number % 2}"
        class_folder.mkdir(exist_ok=True)
        random_grey(number).save(class_folder / f"{number:02}.png")
    return tmp_path


def test_a_folder_can_be_split_and_normalised_like_any_data(folder):
    dataset = load_dataset(DataConfig(name=str(folder), image_size=8, conditional=True))
    assert dataset.spec.kind == "image" and dataset.spec.shape == (1, 8, 8)
    assert dataset.spec.range == (0.0, 255.0)
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 40
    raw = open_source(DataConfig(name=str(folder), image_size=8)).load()
    images = {
        image.tobytes(): raw.classes[label] for image, label in zip(raw.values, raw.labels, strict=True)
    }
    for part in (dataset.train, dataset.val, dataset.test):
        for image, label in zip(dataset.raw(part[:]).round().astype(np.uint8), part.labels, strict=True):
            assert images.pop(image.tobytes()) == dataset.spec.classes[label]
    assert not images, "every image is in one of the splits, with its class"


def test_images_are_normalised_by_the_training_split_alone(folder):
    dataset = load_dataset(DataConfig(name=str(folder), image_size=8))
    assert dataset.train.values.dtype == torch.uint8
    pixels = dataset.train.values.numpy().astype(np.float64)
    assert np.ravel(dataset.spec.mean) == pytest.approx(pixels.mean(), rel=1e-12)
    assert np.ravel(dataset.spec.std) == pytest.approx(pixels.std(), rel=1e-12)
    assert float(dataset.train[:].mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(dataset.train[:].std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert abs(float(dataset.val[:].mean())) > 1e-4


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


def test_paths_become_absolute_and_names_stay_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert resolve("heart") == "heart"
    assert resolve("photos") == str(tmp_path / "photos")
    for missing in ("nope", "nope/there", "x.csv"):
        with pytest.raises(InputError, match=f"--data {missing}: there is no such data set"):
            resolve(missing)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="--data notes.txt: this file is not a table"):
        resolve("notes.txt")


def test_presets_depend_on_the_kind_and_size_of_the_data(folder, tmp_path):
    assert preset(str(folder)).network.kind == "unet"
    assert preset(str(folder), image_size=8).network.kind == "mlp"
    assert preset("digits").network.kind == "mlp" and preset("mnist").network.kind == "unet"
    assert open_source(DataConfig(name="heart")).image_side is None
    assert open_source(DataConfig(name="cifar10")).image_side == 32


def test_images_in_colour_are_predicted_as_v_and_all_else_as_epsilon(tmp_path):
    for mode, expected in (("RGB", "v_prediction"), ("L", "epsilon")):
        folder = tmp_path / mode
        folder.mkdir()
        Image.new(mode, (20, 20)).save(folder / "one.png")
        assert open_source(DataConfig(name=str(folder))).image_channels == (3 if mode == "RGB" else 1)
        assert {preset(str(folder), image_size=side).prediction_type for side in (8, 14, 20)} == {expected}
    assert preset("cifar10").prediction_type == "v_prediction"
    assert {preset(name).prediction_type for name in ("heart", "digits", "mnist")} == {"epsilon"}


@pytest.mark.parametrize(
    ("path", "name"), [("/a/My photos!", "My-photos-"), ("/a/.hidden", "hidden"), ("/a/ö", "-")]
)
def test_a_path_gives_a_short_name_that_is_allowed_for_runs(path, name):
    assert short_name(DataConfig(name=path)) in (name, "data")


def test_labels_are_indices_of_the_sorted_classes():
    classes, labels = encode_labels(["dog", "10", "9", "dog"])
    assert classes == ("10", "9", "dog") and labels.tolist() == [2, 0, 1, 2]
    assert encode_labels(None) == (None, None)


def test_a_label_column_gives_classes_instead_of_a_coordinate(tmp_path):
    path = tmp_path / "iris.csv"
    petals = np.random.default_rng(0).normal(size=(60, 2))
    names = np.array(["setosa", "virginica", "versicolor"])[np.arange(60) % 3]
    pd.DataFrame({"length": petals[:, 0], "kind": names, "width": petals[:, 1]}).to_csv(path, index=False)
    dataset = load_dataset(DataConfig(name=str(path), label_column="kind"))
    assert dataset.spec.columns == ("length", "width") and dataset.spec.shape == (2,)
    assert dataset.spec.classes == ("setosa", "versicolor", "virginica")
    expected = dict(zip(petals[:, 0].round(4), names, strict=True))
    for point, label in zip(dataset.raw(dataset.val[:]), dataset.val.labels, strict=True):
        assert expected[point[0].round(4)] == dataset.spec.classes[label]


def write_split_folder(root, names, classes=("cat", "dog")):
    """20 images of each class for each name of a split."""
    for number, (name, kind, index) in enumerate(itertools.product(names, classes, range(20))):
        path = root / name / kind / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("names", "sizes"), [(("train", "Validation", "test"), (40, 40, 40)), (("train", "test"), (28, 12, 40))]
)
def test_folders_named_as_splits_are_the_split(tmp_path, names, sizes):
    write_split_folder(tmp_path, names)
    dataset = load_dataset(DataConfig(name=str(tmp_path), conditional=True))
    assert tuple(len(part) for part in (dataset.train, dataset.val, dataset.test)) == sizes
    assert dataset.spec.classes == ("cat", "dog")
    expected = {Image.open(path).tobytes() for path in (tmp_path / "test").rglob("*.png")}
    found = dataset.raw(dataset.test[:]).round().astype(np.uint8)
    assert {image.tobytes() for image in found} == expected


@pytest.mark.parametrize("names", [("test", "val"), ("train", "car"), ("train",)])
def test_other_folders_are_classes(tmp_path, names):
    write_split_folder(tmp_path, names)
    dataset = load_dataset(DataConfig(name=str(tmp_path), conditional=True))
    assert dataset.spec.classes == tuple(sorted(names))


def test_images_without_classes_may_be_split_by_folders(tmp_path):
    write_split_folder(tmp_path, ("train", "test"), classes=(".",))
    assert len(load_dataset(DataConfig(name=str(tmp_path))).test) == 20
    with pytest.raises(InputError, match="has no classes"):
        load_dataset(DataConfig(name=str(tmp_path), conditional=True))


def test_equal_images_are_on_one_side_and_it_is_said(tmp_path):
    write_split_folder(tmp_path, ("a", "b"))
    for path in sorted(tmp_path.rglob("*.png"))[:40]:
        shutil.copy(path, path.with_name(f"again-{path.name}"))
    said = []
    dataset = load_source(open_source(DataConfig(name=str(tmp_path))), said.append)
    train, val, test = (
        {image.tobytes() for image in dataset.raw(part[:]).round().astype(np.uint8)}
        for part in (dataset.train, dataset.val, dataset.test)
    )
    assert not train & val and not train & test and not val & test and len(train | val | test) == 80
    assert said == [f"--data {tmp_path}: 40 examples equal others; equal ones are kept in one split"]


def test_labels_are_part_of_the_fingerprint(tmp_path):
    fingerprints = []
    for names in ("aab", "aba", "xxy"):
        table = pd.DataFrame({"x": np.arange(60.0), "kind": list(names) * 20})
        table.to_csv(tmp_path / "t.csv", index=False)
        config = DataConfig(name=str(tmp_path / "t.csv"), label_column="kind")
        fingerprints.append(load_dataset(config).spec.fingerprint)
    assert len(set(fingerprints)) == 3


def test_values_too_large_to_normalise_are_refused(tmp_path):
    pd.DataFrame({"x": np.arange(60.0) * 1e300}).to_csv(tmp_path / "t.csv", index=False)
    with np.errstate(over="ignore"), pytest.raises(InputError, match="column x has values too large"):
        load_dataset(DataConfig(name=str(tmp_path / "t.csv")))


def test_images_of_a_single_shade_are_refused(tmp_path):
    for number in range(30):
        Image.new("L", (8, 8), 7).save(tmp_path / f"{number}.png")
    with pytest.raises(InputError, match="channel 0 of the images has one value only"):
        load_dataset(DataConfig(name=str(tmp_path)))


def test_only_folders_above_the_memory_limit_need_streaming(folder):
    size = 40 * 16 * 16
    for limit, streams in ((size - 1, True), (size, False)):
        source = open_source(DataConfig(name=str(folder), memory_limit_gb=limit / 1e9))
        assert source.larger_than_memory is streams
    small = DataConfig(name=str(folder), image_size=8, memory_limit_gb=(size - 1) / 1e9)
    assert not open_source(small).larger_than_memory, "image_size counts, not the size of the files"
    assert not open_source(DataConfig(name="mnist", memory_limit_gb=1e-9)).larger_than_memory


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    for function in (load_dataset, open_source):
        with pytest.raises(InputError, match="there is no such folder or table"):
            function(DataConfig(name=str(tmp_path / "gone")))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(named, "CACHE", tmp_path)
    return tmp_path


def write_idx(path, array):
    """Write MNIST's file format: two zero bytes, type code 8, number of dimensions, sizes, values."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(folder, images, labels):
    """Write a small MNIST in the folder layout of torchvision."""
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
    expected = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for part in (dataset.train, dataset.val, dataset.test):
        assert [expected.pop(image.numpy().tobytes()) for image in part.values] == part.labels.tolist()
    assert not expected


def test_cifar_is_converted_to_channels_first(monkeypatch):
    import torchvision

    class Cifar:
        classes = ["plane", "car"]

        def __init__(self, *_args, **_kwargs):
            self.data = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
            self.targets = [number % 2 for number in range(40)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    raw = open_source(DataConfig(name="cifar10")).load()
    assert raw.values.shape == (40, 3, 32, 32) and raw.classes == ("plane", "car")
    np.testing.assert_array_equal(raw.values[7, 2], Cifar().data[7, :, :, 2])
    assert raw.labels.tolist() == Cifar().targets


def test_a_failed_download_is_reported_in_one_line_with_the_alternative(monkeypatch, cache, capsys):
    """This runs the real download of torchvision on a machine where all connections fail."""
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


def test_a_cache_that_cannot_be_written_is_reported(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(named, "CACHE", tmp_path / "file")
    with pytest.raises(InputError, match="could not be downloaded"):
        load_dataset(DataConfig(name="mnist"))


@pytest.mark.parametrize("length", [0, 5, 5000])
def test_incomplete_downloads_are_distinguished_from_a_missing_network(cache, length):
    images = np.zeros((60, 28, 28), dtype=np.uint8)
    write_mnist(cache / "MNIST" / "raw", images, np.zeros(60, dtype=np.uint8))
    file = cache / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match="remove that folder") as caught:
        load_dataset(DataConfig(name="mnist"))
    assert str(cache) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"memory_limit_gb": 0.0}, "--memory-limit-gb 0.0: give above 0"),
        ({"memory_limit_gb": float("nan")}, "--memory-limit-gb nan"),
        ({"memory_limit_gb": float("inf")}, "--memory-limit-gb inf"),
        ({"label_column": ""}, '--label-column "": give the name of a column'),
    ],
)
def test_invalid_settings_are_refused_at_construction(setting, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**setting)


def test_a_folder_is_listed_once_by_the_source_that_is_handed_on(folder, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    source = open_source(DataConfig(name=str(folder)))
    assert not listed, "opening a source reads nothing"
    assert source_preset(source).network.kind == "unet" and not source.larger_than_memory
    assert load_source(source).spec.shape == (1, 16, 16)
    assert sorted(listed) == [str(folder), str(folder / "class0"), str(folder / "class1")]


class Spiral(DataSource):
    """A data source of another package."""

    kind = "points"

    def load(self):
        angles = np.linspace(0.0, 6.0, 200)
        return RawData(values=np.stack([angles * np.cos(angles), angles * np.sin(angles)], axis=1))


class Noise(DataSource):
    """A file format of another package: a size and a count of random images."""

    kind = "image"

    @property
    def image_side(self):
        return int(Path(self.config.name).read_text().split()[0])

    def load(self):
        side = self.image_side
        values = np.random.default_rng(0).integers(0, 256, (50, 1, side, side), dtype=np.uint8)
        return RawData(values=values, value_range=(0.0, 255.0))


@pytest.fixture
def installed(monkeypatch):
    """The data sources of this file, as entry points of an installed package."""
    monkeypatch.setattr(DATA_SOURCES, "_loaded", {})
    values = {"spiral": f"{__name__}:Spiral", ".noise": f"{__name__}:Noise"}
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group: [
            EntryPoint(*item, group) for item in values.items() if group == "ray_ddpm.data_sources"
        ],
    )


def test_another_package_adds_a_named_data_set(installed):
    assert resolve("spiral") == "spiral"
    dataset = load_dataset(DataConfig(name="spiral"))
    assert dataset.spec.name == "spiral" and dataset.spec.kind == "points" and dataset.spec.shape == (2,)
    assert preset("spiral").network == preset("heart").network
    with pytest.raises(InputError, match="--data sprial: .*cifar10, spiral, or the path"):
        resolve("sprial")
    with pytest.raises(InputError, match="--horizontal-flips: --data spiral holds points"):
        open_source(DataConfig(name="spiral", horizontal_flips=True))


def test_another_package_adds_a_file_format(installed, tmp_path):
    path = tmp_path / "some.noise"
    path.write_text("12 pixels")
    assert resolve(str(path)) == str(path)
    assert load_dataset(DataConfig(name=str(path))).spec.shape == (1, 12, 12)
    assert preset(str(path)).network.kind == "unet"


def test_a_source_that_loads_another_kind_than_it_says_is_refused(monkeypatch):
    monkeypatch.setattr(Spiral, "kind", "image")
    with pytest.raises(ValueError, match="Spiral has kind image but loads points"):
        load_source(Spiral(DataConfig(name="/spiral")))
