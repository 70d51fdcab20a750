"""Data of the user's own: folders of odd images, tables, and names."""

import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffusion.config import DataConfig
from diffusion.data import load_dataset
from diffusion.errors import InputError
from diffusion.image_folder import default_image_size, load_image_folder
from diffusion.presets import preset
from diffusion.sources import image_side, resolve, short_name
from diffusion.tables import load_table


def random_image(mode: str, size=(20, 16), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Forty grey images in two class folders."""
    for number in range(40):
        place = tmp_path / f"class{number % 2}"
        place.mkdir(exist_ok=True)
        random_image("L", seed=number).save(place / f"{number:02}.png")
    return tmp_path


def test_a_folder_becomes_one_array_of_squares(folder):
    images = load_image_folder(folder, 12, skip_bad=False)
    assert images.shape == (40, 1, 12, 12) and images.dtype == np.uint8
    assert default_image_size(folder) == 16, "the shorter side"
    assert load_image_folder(folder, None, skip_bad=False).shape == (40, 1, 16, 16)


def test_pixels_of_the_right_size_are_kept_as_they_are(tmp_path):
    for number in range(3):
        random_image("RGB", (16, 16), number).save(tmp_path / f"{number}.png")
    images = load_image_folder(tmp_path, None, skip_bad=False)
    for number in range(3):
        want = np.asarray(random_image("RGB", (16, 16), number)).transpose(2, 0, 1)
        np.testing.assert_array_equal(images[number], want)


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [
        ("1", ".png", 1),
        ("L", ".bmp", 1),
        ("LA", ".png", 1),
        ("P", ".gif", 3),
        ("RGB", ".jpg", 3),
        ("RGBA", ".png", 3),
        ("RGBA", ".webp", 3),
        ("CMYK", ".tiff", 3),
    ],
)
def test_every_mode_of_pillow_is_read(tmp_path, mode, suffix, channels):
    random_image(mode).save(tmp_path / f"image{suffix}")
    assert load_image_folder(tmp_path, 8, skip_bad=False).shape == (1, channels, 8, 8)


def test_one_coloured_image_makes_all_coloured(folder):
    random_image("RGB").save(folder / "colour.png")
    assert load_image_folder(folder, 8, skip_bad=False).shape == (41, 3, 8, 8)


def test_what_is_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (8, 8), (10, 0)).save(tmp_path / "grey.png")
    assert (load_image_folder(tmp_path, 8, skip_bad=False) == 255).all()


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    images = load_image_folder(tmp_path, 8, skip_bad=False)
    np.testing.assert_allclose(images[0, 0], ramp / 257.0, atol=0.51)


def test_photographs_are_turned_upright(tmp_path):
    image = Image.new("L", (16, 8))
    image.paste(255, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    square = load_image_folder(tmp_path, 8, skip_bad=False)[0, 0].astype(float)
    assert abs(square[:4].mean() - square[4:].mean()) > 100, "the bright half is above now, not beside"


def test_a_corrupt_image_among_good_ones_is_named(folder):
    bad = folder / "class0" / "bad.png"
    bad.write_bytes((folder / "class0" / "00.png").read_bytes()[:60])
    with pytest.raises(InputError) as caught:
        load_image_folder(folder, 8, skip_bad=False)
    assert str(bad) in str(caught.value) and "--skip-bad-images" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(load_image_folder(folder, 8, skip_bad=True)) == 40


def test_a_corrupt_first_image_does_not_hide_the_size_of_the_others(folder):
    (folder / "class0" / "!first.png").write_bytes(b"not an image")
    assert default_image_size(folder) == 16
    assert load_image_folder(folder, None, skip_bad=True).shape == (40, 1, 16, 16)
    with pytest.raises(InputError, match="!first.png"):
        load_image_folder(folder, None, skip_bad=False)


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="holds no images"):
        load_image_folder(tmp_path, 8, skip_bad=False)


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(folder, tmp_path_factory):
    os.symlink(folder / "class0" / "00.png", folder / "again.png")
    assert len(load_image_folder(folder, 8, skip_bad=False)) == 41
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    random_image("L").save(outside)
    os.symlink(outside, folder / "leak.png")
    with pytest.raises(InputError, match="leak.png is a link out of"):
        load_image_folder(folder, 8, skip_bad=True)


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="bomb.png"):
        load_image_folder(tmp_path, 8, skip_bad=False)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npy"])
def test_a_table_is_read_whatever_its_format(tmp_path, suffix):
    values = np.random.default_rng(0).normal(size=(30, 3))
    table = pd.DataFrame(values, columns=["a", "b", "c"])
    path = tmp_path / f"points{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    else:
        table.to_csv(path, index=False) if suffix == ".csv" else table.to_parquet(path)
    read, columns = load_table(path)
    np.testing.assert_allclose(read, values, rtol=1e-12)
    assert columns == (("x0", "x1", "x2") if suffix == ".npy" else ("a", "b", "c"))


@pytest.mark.parametrize("cell", ["nan", "", "many", "inf"])
def test_a_cell_that_is_no_number_is_named_by_row_and_column(tmp_path, cell):
    path = tmp_path / "points.csv"
    path.write_text(f"a,b\n1,2\n3,{cell}\n5,6\n")
    with pytest.raises(InputError, match=r"row 2, column b") as caught:
        load_table(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", b""),
        ("not.parquet", b"PAR1 not at all"),
        ("not.npy", b"\x93NUMPY broken"),
        ("flat.npy", None),
        ("pickle.npy", "pickle"),
    ],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        np.save(path, np.arange(5.0))
    elif content == "pickle":
        np.save(path, np.array([{"run": "this"}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_table(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_can_be_split_and_normalised_like_any_data(folder):
    dataset = load_dataset(DataConfig(name=str(folder), image_size=8))
    assert dataset.spec.kind == "image" and dataset.spec.shape == (1, 8, 8)
    assert dataset.spec.range == (0.0, 255.0)
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 40
    pixels = np.sort(
        np.concatenate([dataset.raw(split) for split in (dataset.train, dataset.val, dataset.test)]).ravel()
    )
    want = np.sort(load_image_folder(folder, 8, skip_bad=False).ravel())
    np.testing.assert_allclose(pixels, want, atol=1e-3)


def test_points_far_from_zero_keep_their_precision(tmp_path):
    path = tmp_path / "times.csv"
    values = 1.7e9 + np.random.default_rng(0).normal(size=(100, 2))
    pd.DataFrame(values, columns=["a", "b"]).to_csv(path, index=False, float_format="%.9f")
    dataset = load_dataset(DataConfig(name=str(path)))
    raw = np.concatenate([dataset.raw(split) for split in (dataset.train, dataset.val, dataset.test)])
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


def test_a_download_that_fails_is_one_line_with_the_alternative(monkeypatch, tmp_path):
    import torchvision

    def broken(*_args, download, **_kwargs):
        raise RuntimeError("Dataset not found" if not download else "no route to host")

    monkeypatch.setattr(torchvision.datasets, "MNIST", broken)
    with pytest.raises(InputError) as caught:
        load_dataset(DataConfig(name="mnist"))
    assert "no route to host" in str(caught.value) and "folder of images" in str(caught.value)
