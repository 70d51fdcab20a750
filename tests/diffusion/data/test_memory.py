"""Data in memory: the same data set as the file that holds the same examples, and one-line refusals."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from diffusion import DataConfig, InputError, dataset_from_memory, load_dataset
from diffusion.data.memory import memory_source
from diffusion.data.sources import open_source

RANDOM = np.random.default_rng(0)
SPLITS = ("train", "val", "test")
PIXELS = RANDOM.integers(0, 256, (40, 8, 9, 3), dtype=np.uint8)


def same(dataset, other):
    """Whether two data sets have the same examples, splits, labels and normalisation."""
    specs = [each.spec.to_dict() | {"name": ""} for each in (dataset, other)]
    return specs[0] == specs[1] and all(
        torch.equal(getattr(dataset, split)[:], getattr(other, split)[:])
        for split in ("train", "val", "test")
    )


class Pictures(Dataset):
    """Pictures with numbered labels, as torchvision's sets have them."""

    classes = ["cat", "dog", "eel"]

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index], index % 2


class Stream(IterableDataset):
    """Examples without a number and without an order."""

    def __iter__(self):
        return iter([])


def test_a_data_frame_is_the_table_that_it_would_be_as_a_file(tmp_path):
    frame = pd.DataFrame({"a": RANDOM.normal(size=60), "kind": list("xyz") * 20, "b": range(60)})
    frame.to_parquet(tmp_path / "t.parquet")
    config = DataConfig(name=str(tmp_path / "t.parquet"), label_column="kind")
    ours = dataset_from_memory(frame, DataConfig(label_column="kind"))
    assert same(ours, load_dataset(config))
    assert (ours.spec.columns, ours.spec.classes) == (("a", "b"), ("x", "y", "z"))
    assert (ours.spec.name, ours.spec.kind) == ("dataframe", "points")


@pytest.mark.parametrize(
    "convert", [np.asarray, torch.tensor, list, lambda points: TensorDataset(torch.tensor(points))]
)
def test_points_are_the_table_that_they_would_be_as_a_file(tmp_path, convert):
    points = RANDOM.normal(size=(50, 3))
    np.save(tmp_path / "t.npy", points)
    ours = dataset_from_memory(convert(points))
    assert same(ours, load_dataset(DataConfig(name=str(tmp_path / "t.npy"))))


def test_the_layout_of_images_does_not_matter():
    expected = dataset_from_memory(PIXELS)
    assert expected.spec.shape == (3, 8, 9) and expected.spec.range == (0.0, 255.0)
    assert same(dataset_from_memory(PIXELS.transpose(0, 3, 1, 2)), expected)
    assert same(dataset_from_memory(PIXELS.astype(np.int64)), expected)
    assert same(dataset_from_memory([Image.fromarray(each) for each in PIXELS]), expected)
    assert dataset_from_memory(PIXELS[..., 0]).spec.shape == (1, 8, 9)


def test_images_are_the_folder_that_they_would_be(tmp_path):
    squares = PIXELS[:, :, :8]
    for index, each in enumerate(squares):
        Image.fromarray(each).save(tmp_path / f"{index:03}.png")
    assert same(dataset_from_memory(squares), load_dataset(DataConfig(name=str(tmp_path))))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0)])
def test_floats_keep_their_range(low, high):
    images = (low + (high - low) * PIXELS / 255.0).astype(np.float32)
    dataset = dataset_from_memory(images)
    assert dataset.spec.range == (low, high)
    train = dataset.raw(dataset.train[:])
    assert train.min() >= low and train.max() <= high and train.shape[1:] == (3, 8, 9)


def test_a_pytorch_dataset_brings_its_labels_and_the_names_of_its_classes():
    dataset = dataset_from_memory(
        Pictures([Image.fromarray(each) for each in PIXELS]), DataConfig(conditional=True)
    )
    assert (dataset.spec.name, dataset.spec.classes) == ("Pictures", ("cat", "dog", "eel"))
    labels = torch.cat([getattr(dataset, split).labels for split in SPLITS])
    assert labels.bincount().tolist() == [20, 20]
    first = dataset.raw(dataset.train[:1])[0]  # labels stay with their examples
    index = next(i for i, each in enumerate(PIXELS) if np.allclose(each.transpose(2, 0, 1), first))
    assert int(dataset.train.labels[0]) == index % 2


def test_labels_are_numbers_in_their_order_or_names():
    def classes(labels):
        return dataset_from_memory(PIXELS, DataConfig(conditional=True), labels).spec.classes

    assert classes(np.tile([10, 9, 100, 2], 10)) == ("2", "9", "10", "100")
    assert classes(["b", "a"] * 20) == ("a", "b")


def test_a_dataset_of_tensors_is_read_once_and_in_order():
    read = []

    class Counting(Pictures):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    memory_source(Counting(list(torch.tensor(PIXELS))), DataConfig()).load()
    assert read == list(range(40))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (RANDOM.normal(size=50), "data of shape .50,.: give points"),
        (RANDOM.normal(size=(9, 2)) + 1j, "dtype complex128"),
        (np.full((40, 2), np.inf), r"element \(0, 0\) is inf"),
        (PIXELS[..., :2], r"C = 1 or 3"),
        (PIXELS[:, :3], "here it could be either"),
        (PIXELS.astype(float), "floats from 0 to 255: scale them"),
        (PIXELS.astype(int) * 2, "integers from 0 to 510"),
        ([], "the data are empty"),
        (list(PIXELS[:5]) + [PIXELS[0, :4]], "item 5 of the data has shape"),
        ([{"image": 1}], "item 0 of the data is dict"),
        ([(1, 2, 3)], "item 0 of the data has 3 parts"),
        ([(PIXELS[0], 1), PIXELS[1]], "1 of 2 items of the data have a label"),
        (
            type("Stream", (IterableDataset,), {"__iter__": lambda self: iter([])})(),
            "data of type Stream: give a name",
        ),
        (3, "data of type int"),
        ([[[1.0, 2.0], [3.0]]] * 40, "item 0 of the data is list"),
        (Pictures(list(PIXELS[:9])), "too few for three splits"),
        (pd.DataFrame({"a": ["x"] * 40}), "the DataFrame: row 1, column a holds 'x'"),
        (np.ma.masked_less(RANDOM.normal(size=(40, 2)), 0.0), "the data: a masked array lacks elements"),
        (list(np.ma.masked_less(np.eye(40), 1.0)), "item 0 of the data: a masked array lacks"),
        (torch.zeros(40, 2, dtype=torch.bfloat16), "the data: numpy has no arrays such as this tensor"),
        (torch.eye(40).to_sparse(), "the data: numpy has no arrays such as this tensor"),
        ([torch.zeros(2, device="meta")] * 40, "item 0 of the data: numpy has no arrays"),
        ({"x": np.zeros(40)}, "item 0 of the data, which have 1, cannot be read"),
        (pd.Series(list(PIXELS), index=range(1, 41)), "item 0 of the data, which have 40, cannot be read"),
        (type("Table", (list,), {"to_pandas": list})(PIXELS), "type Table: give its to_pandas"),
        (
            [Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32))],
            "item 0 of the data is an image that cannot be read",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(data, message):
    with pytest.raises(InputError, match=message) as caught:
        dataset_from_memory(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "RGBA", "LA", "P", "1"])
def test_images_of_pillow_are_the_folder_that_they_would_be_whatever_their_mode(tmp_path, mode):
    ramps = [np.roll(np.linspace(0, 65535, 64), step).reshape(8, 8) for step in range(40)]
    if mode in ("I;16", "I", "F"):
        kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
        images = [Image.fromarray(ramp.astype(kinds[mode])) for ramp in ramps]
    else:
        images = [Image.fromarray((ramp / 257).astype(np.uint8)).convert(mode) for ramp in ramps]
    if mode in ("RGBA", "LA"):
        for image in images:
            image.putalpha(100)
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index:03}.tiff")
    assert same(dataset_from_memory(images), load_dataset(DataConfig(name=str(tmp_path))))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (set(range(40)), "labels of type set: give a list"),
        (dict.fromkeys(range(40)), "labels of type dict"),
        ("a" * 40, "labels of type str"),
        (3, "labels of type int"),
        (np.array(3), "labels of type ndarray"),
        ((index for index in range(40)), "labels of type generator"),
        (pd.DataFrame({"kind": range(40)}), "labels of type DataFrame"),
        (np.eye(40), "label array"),
        (torch.eye(40), "label tensor"),
    ],
)
def test_labels_that_are_not_one_for_each_example_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        dataset_from_memory(PIXELS, DataConfig(conditional=True), labels)


def test_a_data_frame_can_have_columns_of_splits_and_groups(tmp_path):
    frame = pd.DataFrame({"a": RANDOM.normal(size=90), "who": np.arange(90) // 3, "b": range(90)})
    grouped = dataset_from_memory(frame, DataConfig(group_column="who"))
    assert grouped.spec.columns == ("a", "b")
    groups = [set((grouped.raw(part[:])[:, 1].round() // 3).tolist()) for part in (grouped.val, grouped.test)]
    assert not groups[0] & groups[1] and len(grouped.val) == len(grouped.test) == 12
    frame["part"] = ["train", "val", "test"] * 30
    split = dataset_from_memory(frame.drop(columns="who"), DataConfig(split_column="part"))
    assert sorted(split.raw(split.test[:])[:, 1].round().tolist()) == list(range(2, 90, 3))


@pytest.mark.parametrize(
    ("config", "labels", "message"),
    [
        ({"split_column": "a"}, None, "--split-column a: only tables have columns"),
        ({"image_size": 8}, None, "only images of a folder are resized"),
        ({"label_column": "a"}, None, "only tables have columns"),
        ({"conditional": True}, None, "no classes"),
        ({}, [1, 2], "2 labels for 40 examples"),
        ({}, [0.5] * 40, "label 0.5: give numbers or names"),
        ({}, ["a", 1] * 20, "label 'a': give numbers or names"),
        ({}, [[1], [1, 2]] * 20, r"label \[1\]: give numbers or names"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, labels, message):
    with pytest.raises(InputError, match=message):
        dataset_from_memory(PIXELS, DataConfig(**config), labels)


def test_a_table_has_one_source_of_labels():
    frame = pd.DataFrame({"a": range(40), "b": range(40), "kind": ["x", "y"] * 20})
    with pytest.raises(InputError, match="give one of the two"):
        dataset_from_memory(frame, DataConfig(label_column="kind"), [0, 1] * 20)


def test_data_in_memory_cannot_be_opened_by_their_name():
    with pytest.raises(InputError, match="pass them again"):
        open_source(DataConfig(name="memory://array"))
