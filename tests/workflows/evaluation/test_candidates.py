"""Candidates of `ray-ddpm evaluate`: models and samples in every form, in the units and shape of the data."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffusion.data.dataset import DataSpec
from diffusion.errors import InputError
from export.sampler import Sampler
from tests.diffusion.conftest import make_gaussian_dataset
from tests.workflows.test_bulk_sampling import write_model
from workflows.evaluation.candidates import Draw, open_candidate

DRAW = Draw(30, {"seed": 3})
POINTS = dataclasses.replace(make_gaussian_dataset().spec, columns=("height", "weight"))
COLOUR = DataSpec(
    name="colours",
    kind="image",
    shape=(3, 8, 8),
    mean=[[[100.0]]] * 3,
    std=[[[50.0]]] * 3,
    range=(0.0, 255.0),
    columns=None,
    clip=(-2.0, 3.1),
    log_snr_window=(-8.0, 3.0),
    fingerprint="1" * 64,
)
GREY = dataclasses.replace(COLOUR, shape=(1, 8, 8), mean=[[[100.0]]], std=[[[50.0]]])
PIXELS = np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def read(name, spec):
    return open_candidate(str(name))(spec, DRAW)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_columns_of_a_table_are_found_by_name(tmp_path, suffix):
    frame = pd.DataFrame({"weight": np.arange(25.0), "note": ["x"] * 25, "height": np.arange(25.0) + 100.0})
    path = tmp_path / f"samples{suffix}"
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    np.testing.assert_array_equal(read(path, POINTS).samples, frame[["height", "weight"]])


def test_columns_of_an_array_are_those_of_the_data(tmp_path):
    values = np.random.default_rng(0).normal(size=(25, 2))
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", values + 1.0)
    np.testing.assert_array_equal(read(tmp_path / "a.npy", POINTS).samples, values)
    both = read(tmp_path, POINTS)
    np.testing.assert_array_equal(both.samples, np.concatenate([values, values + 1.0]))
    assert both.trained_on is None and both.name == str(tmp_path)


@pytest.mark.parametrize(
    "array",
    [PIXELS, PIXELS.transpose(0, 3, 1, 2), PIXELS / 255.0, PIXELS / 127.5 - 1.0, PIXELS.astype(np.float32)],
    ids=["bytes", "channels first", "0 to 1", "-1 to 1", "floats in the data's range"],
)
def test_arrays_of_images_get_the_range_of_the_data(tmp_path, array):
    np.save(tmp_path / "samples.npy", array)
    samples = read(tmp_path / "samples.npy", COLOUR).samples
    np.testing.assert_allclose(samples, PIXELS.transpose(0, 3, 1, 2), atol=1e-4)


def test_folders_of_images_are_read_like_data(tmp_path):
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{index:02d}.png")
    np.testing.assert_array_equal(read(tmp_path, COLOUR).samples, PIXELS.transpose(0, 3, 1, 2))


def test_grey_samples_of_data_in_colour_have_three_equal_channels(tmp_path):
    np.save(tmp_path / "grey.npy", PIXELS[..., 0])
    samples = read(tmp_path / "grey.npy", COLOUR).samples
    for channel in range(3):
        np.testing.assert_array_equal(samples[:, channel], PIXELS[..., 0])


@pytest.mark.parametrize("place", [".", "champion", "model"])
def test_models_draw_the_samples_of_the_exported_sampler(model, tmp_path, place):
    spec = dataclasses.replace(POINTS, fingerprint="7" * 64)
    folder = tmp_path / "run" / place
    folder.mkdir(parents=True)
    shutil.copy(model, folder)
    expected = Sampler(model).sample(30, seed=3)
    for name in (model, tmp_path / "run"):
        candidate = read(name, spec)
        np.testing.assert_array_equal(candidate.samples, expected)
        assert candidate.trained_on == Sampler(model).spec.provenance.get("data_fingerprint")


def test_models_of_a_registry_are_downloaded(model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Sampler, "from_registry", classmethod(lambda cls, uri, provider: asked.append(uri) or cls(model))
    )
    assert read("models:/ray-ddpm-some@champion", POINTS).samples.shape == (30, 2)
    assert asked == ["models:/ray-ddpm-some@champion"]


@pytest.mark.parametrize(
    ("file", "spec", "message"),
    [
        ("three.npy", POINTS, "points of 3 columns, and the data are points of 2 columns"),
        ("few.npy", POINTS, "holds 19 samples: too few to judge; give 20 or more"),
        ("other.csv", POINTS, "has no column height, .*: give samples with the columns height, weight"),
        ("nan.csv", POINTS, "row 2, column weight"),
        ("other.csv", COLOUR, "is a table, and the data are images"),
        ("three.npy", COLOUR, "holds points, and the data are images"),
        ("large.npy", COLOUR, "images of 3 x 9 x 9 .*, and the data are images of 3 x 8 x 8"),
        ("colour.npy", GREY, "images of 3 x 8 x 8 .*, and the data are images of 1 x 8 x 8"),
        ("bright.npy", COLOUR, "from 0 to 300"),
        ("broken.npy", POINTS, "cannot be read as an array"),
        ("broken.npy", COLOUR, "cannot be read as an array"),
        ("folder", POINTS, "is a folder of no arrays, and the data are points"),
        ("model.onnx", COLOUR, "draws points of 2 columns, and the data are images of 3 x 8 x 8"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_in_one_line(model, tmp_path, file, spec, message):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "three.npy", rng.normal(size=(25, 3)))
    np.save(tmp_path / "few.npy", rng.normal(size=(19, 2)))
    np.save(tmp_path / "large.npy", np.zeros((25, 9, 9, 3), dtype=np.uint8))
    np.save(tmp_path / "colour.npy", PIXELS)
    np.save(tmp_path / "bright.npy", np.linspace(0.0, 300.0, PIXELS.size).reshape(PIXELS.shape))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    (tmp_path / "folder").mkdir()
    pd.DataFrame(rng.normal(size=(25, 2)), columns=["weight", "age"]).to_csv(
        tmp_path / "other.csv", index=False
    )
    (tmp_path / "nan.csv").write_text("height,weight\n" + "1,2\n1,\n" * 15)
    if file == "model.onnx":
        shutil.copy(model, tmp_path / file)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / file, spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.csv", "note.txt"])
def test_what_is_no_candidate_is_refused_before_the_data_are_read(tmp_path, name):
    (tmp_path / "note.txt").touch()
    with pytest.raises(InputError, match=r"give a sampler.onnx, the folder of a run, samples as .csv"):
        open_candidate(str(tmp_path / name))
