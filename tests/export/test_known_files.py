"""Known parts, masks and starts from files, on the command line of the sampler."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import InputError
from diffusion.plots import draw_samples
from export.cli import sampler_parser
from export.known_files import read_given
from export.sampler import main

SIDE = 8


def run(capsys, *arguments):
    """Run a command that succeeds, and return what it prints."""
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys, *arguments):
    """Run a command that ends with status 2, and return its one line of error."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:  # of argparse
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(name="files")
def _files(tmp_path, monkeypatch):
    """A folder, which is the current one, with an image of levels 0 to 15 of 17, and two masks."""
    monkeypatch.chdir(tmp_path)
    levels = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) // 4
    Image.fromarray((levels * 255 // 16).astype(np.uint8)).save("known.png")
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save("mask.png")
    mask[:4], mask[4:] = 100, 150  # as an image editor may leave it
    Image.fromarray(mask).convert("RGB").save("grey.png")
    return tmp_path


@pytest.fixture(name="known")
def _known(files):
    """The image in data units, whose range is 0 to 16."""
    return np.asarray(Image.open("known.png"))[None] / 255.0 * 16.0


MASK = np.arange(SIDE)[:, None].repeat(SIDE, axis=1) >= 4


@pytest.mark.parametrize("mask", ["mask.png", "grey.png"])
def test_white_pixels_are_drawn_and_black_ones_kept(image_file, image_sampler, known, capsys, mask):
    printed = run(
        capsys, image_file, "--known", "known.png", "--mask", mask, "--num-samples", 3, "--seed", 2,
        "--resampling", 2, "--jump-length", 3, "--output", "a.npy",
    )  # fmt: skip
    assert f"known.png: 32 of 64 pixels are known, those that are black in {mask}" in printed
    expected = image_sampler.sample(3, seed=2, known=known, mask=MASK, resampling=2, jump_length=3)
    np.testing.assert_array_equal(np.load("a.npy"), expected)
    np.testing.assert_array_equal(
        expected[:, :, :4], np.broadcast_to(known.astype(np.float32), (3, 1, 8, 8))[:, :, :4]
    )


def test_64_samples_of_an_image_are_drawn_by_default(image_file, files, capsys):
    assert "64 samples" in run(capsys, image_file, "--known", "known.png", "--mask", "mask.png", "--steps", 2)
    assert (files / "samples.png").exists()


def test_a_start_from_an_image(image_file, image_sampler, known, capsys):
    run(capsys, image_file, "--start-from-image", "known.png", "--strength", 0.4, "--num-samples", 2,
        "--output", "a.npy")  # fmt: skip
    np.testing.assert_array_equal(np.load("a.npy"), image_sampler.sample(2, start_from=known, strength=0.4))


def test_frames_between_two_images(image_file, image_sampler, known, capsys):
    """8 frames by default, in one row."""
    Image.open("known.png").transpose(Image.Transpose.ROTATE_180).save("turned.png")
    assert "8 samples" in run(capsys, image_file, "--interpolate", "known.png", "turned.png", "--steps", 5)
    expected = image_sampler.interpolate(known, known[:, ::-1, ::-1], 8, num_steps=5)
    drawn = draw_samples(expected, (0.0, 16.0), columns=8)
    assert drawn.width > 7 * drawn.height
    np.testing.assert_array_equal(np.asarray(Image.open("samples.png")), np.asarray(drawn))


def test_known_and_start_of_an_array(image_file, image_sampler, known, capsys):
    """Of rows, with two samples of each."""
    rows = np.stack([known, 16.0 - known])
    np.save("start.npy", rows)
    rows = np.where(MASK, np.nan, rows)
    np.save("known.npy", rows)
    printed = run(capsys, image_file, "--known", "known.npy", "--start-from-image", "start.npy", "--steps", 5,
                  "--num-samples", 2, "--output", "a.npy")  # fmt: skip
    assert "known.npy: 2 rows, 64 of 128 values are known" in printed
    expected = image_sampler.sample(
        4, num_steps=5, known=rows.repeat(2, axis=0), start_from=np.load("start.npy").repeat(2, axis=0)
    )
    np.testing.assert_array_equal(np.load("a.npy"), expected)


TABLE = "weight,height\n-3.25,\n,1.5\n0.125,\n"


def test_empty_cells_of_a_table_are_drawn(point_file, point_sampler, tmp_path, capsys, monkeypatch):
    """One row for each, whatever the order of the columns."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("\ufeff" + TABLE, encoding="utf-8")
    printed = run(capsys, point_file, "--known", "rows.csv", "--output", "a.csv")
    assert "rows.csv: 3 rows, 3 of 6 values are known" in printed
    assert "3 samples" in printed
    known = np.array([[np.nan, -3.25], [1.5, np.nan], [np.nan, 0.125]])
    with open("a.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["height", "weight"]
    values = np.array(rows, dtype=np.float64)
    np.testing.assert_array_equal(values.astype(np.float32), point_sampler.sample(3, known=known))
    np.testing.assert_array_equal(values[np.isfinite(known)], known[np.isfinite(known)])


def test_several_samples_of_each_row_follow_each_other(
    point_file, point_sampler, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("weight\n-3.25\n0.125\n")
    run(capsys, point_file, "--known", "rows.csv", "--num-samples", 3, "--output", "a.npy")
    np.testing.assert_array_equal(np.load("a.npy")[:, 1], np.float32([-3.25] * 3 + [0.125] * 3))
    assert np.unique(np.load("a.npy")[:, 0]).size == 6


def test_points_start_from_a_table(point_file, point_sampler, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("height,weight\n1,2\n3,4\n")
    run(capsys, point_file, "--start-from-image", "rows.csv", "--output", "a.npy")
    np.testing.assert_array_equal(np.load("a.npy"), point_sampler.sample(2, start_from=[[1, 2], [3, 4]]))


def picture(name, shape, value=0, mode=None):
    image = Image.fromarray(np.full(shape, value, dtype=np.uint8))
    (image if mode is None else image.convert(mode)).save(name)


def test_grey_pixels_of_a_colour_file_are_grey(image_file, image_sampler, known, capsys):
    """And a transparent mask counts as white where it is transparent, whatever the colour below."""
    Image.open("known.png").convert("RGB").save("rgb.png")
    rgba = np.zeros((SIDE, SIDE, 4), dtype=np.uint8)
    rgba[..., 3] = np.where(MASK, 0, 255)
    Image.fromarray(rgba).save("rgba.png")
    run(
        capsys,
        image_file,
        "--known",
        "rgb.png",
        "--mask",
        "rgba.png",
        "--num-samples",
        1,
        "--output",
        "a.npy",
    )
    np.testing.assert_array_equal(np.load("a.npy"), image_sampler.sample(1, known=known, mask=MASK))


@pytest.fixture(name="colour_spec")
def _colour_spec(image_sampler):
    """Of colour images of 4 x 6 pixels from -1 to 1."""
    data = {
        "kind": "image",
        "shape": [3, 4, 6],
        "mean": 0.0,
        "std": 1.0,
        "range": [-1.0, 1.0],
        "columns": None,
    }
    return replace(image_sampler.spec, data=data)


def given(spec, *flags):
    return read_given(sampler_parser().parse_args(["model", *flags]), spec)


def test_images_have_the_shape_and_units_of_the_model(colour_spec, files):
    """Not necessarily square; grey images get three equal channels, and a mask holds for all channels."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("wide.png")
    Image.fromarray(pixels[..., 0]).save("grey_wide.png")
    mask = pixels[..., 1] >= 128
    Image.fromarray(pixels[..., 1]).save("mask_wide.png")
    known = given(colour_spec, "--known", "wide.png", "--mask", "mask_wide.png").arguments["known"]
    expected = pixels.transpose(2, 0, 1) / 255.0 * 2.0 - 1.0
    np.testing.assert_array_equal(known, np.where(mask, np.nan, expected))
    start = given(colour_spec, "--start-from-image", "grey_wide.png").arguments["start_from"]
    np.testing.assert_array_equal(start, expected[[0, 0, 0]])
    Image.fromarray(pixels.transpose(1, 0, 2)).save("high.png")
    with pytest.raises(InputError, match="has 4 x 6 pixels, but the model's images have 6 x 4"):
        given(colour_spec, "--start-from-image", "high.png")


def test_images_of_other_channels_are_given_as_arrays(colour_spec, files):
    spec = replace(colour_spec, data=colour_spec.data | {"shape": [2, 8, 8]})
    with pytest.raises(InputError, match="have 2 channels; give a .npy array"):
        given(spec, "--start-from-image", "known.png")
    np.save("two.npy", np.zeros((2, 8, 8), dtype=np.uint8))
    assert given(spec, "--start-from-image", "two.npy").arguments["start_from"].shape == (2, 8, 8)


def test_points_without_names_have_numbered_columns(point_sampler, files):
    spec = replace(point_sampler.spec, data=point_sampler.spec.data | {"columns": None})
    (files / "rows.csv").write_text("x1\n2.5\n")
    known = given(spec, "--known", "rows.csv").arguments["known"]
    np.testing.assert_array_equal(known, [[np.nan, 2.5]])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mask mask.png", "--mask: it needs --known"),
        ("--resampling 2", "--resampling: it needs --known"),
        ("--known known.png --mask mask.png --jump-length 2", "--jump-length: it needs --resampling"),
        ("--strength 0.5", "--strength: it needs --start-from-image or --interpolate"),
        ("--known known.png --mask mask.png --strength 0.5", "--strength: it needs --start-from-image or"),
        ("--start-from-image known.png --strength 0", "strength 0: give a number above 0, up to 1"),
        ("--start-from-image known.png --strength 1.01", "strength 1.01: give a number above 0, up to 1"),
        ("--start-from-image known.png --strength nan", "strength nan: give a number above 0, up to 1"),
        ("--start-from-image known.png --strength much", "argument --strength: invalid float value: 'much'"),
        ("--interpolate known.png known.png --start-from-image known.png", "not go with --start-from-image"),
        ("--interpolate known.png known.png --known known.png", "does not go with --known"),
        ("--interpolate known.png", "--interpolate: expected 2 arguments"),
        ("--interpolate known.png known.png --num-samples 1", "num_frames 1: give 2 to"),
        ("--known none.png --mask mask.png", "none.png does not exist: give an image"),
        ("--known known.png --mask none.png", "none.png does not exist: give an image"),
        ("--known . --mask mask.png", ". is no file"),
        ("--known known.png", "every value is known, so nothing is to be drawn; give --mask too"),
        ("--known known.png --mask mask.png --resampling 0", "resampling 0: give a whole number from 1"),
        ("--known known.png --mask mask.png --num-samples 0", "num_samples 0: give 1 to"),
        ("--known text.png --mask mask.png", "text.png cannot be read as an image"),
        ("--known large.png --mask mask.png", "large.png has 9 x 8 pixels, but the model's images have"),
        ("--known known.png --mask large.png", "large.png has 9 x 8 pixels, but the model's images have"),
        ("--known colour.png --mask mask.png", "colour.png is in colour, but this model draws grey images"),
        ("--start-from-image colour.png", "colour.png is in colour, but this model draws grey images"),
        ("--known known.png --mask black.png", "black.png has no white pixel, so nothing is drawn"),
        ("--known known.png --mask white.png", "white.png has no black pixel, so all of it is drawn"),
        ("--known rows.csv", "rows.csv: this model draws images"),
        ("--known pairs.npy", "holds float64 [3, 2]: give numbers of shape [1, 8, 8] or [rows, 1, 8, 8]"),
        ("--known text.npy", "text.npy cannot be read as an array"),
        ("--start-from-image nan.npy", "--start-from-image nan.npy has empty cells or NaN: give every value"),
        ("--known nan.npy --start-from-image rows.npy", "has 2 rows and --start-from-image rows.npy 3"),
        ("--known nan.npy --num-samples 0", "--num-samples 0: give 1 or more"),
        ("--interpolate rows.npy known.png", "--interpolate rows.npy has 3 rows: give one"),
    ],
)  # fmt: skip
def test_bad_files_of_images_are_refused_in_one_line(image_file, files, capsys, flags, message):
    picture("large.png", (8, 9))
    picture("black.png", (8, 8))
    picture("white.png", (8, 8), 255)
    Image.fromarray(np.tile(np.uint8([200, 30, 30]), (8, 8, 1))).save("colour.png")
    for name in ("text.png", "text.npy"):
        (files / name).write_text("no such file")
    (files / "rows.csv").write_text(TABLE)
    np.save("pairs.npy", np.ones((3, 2)))
    np.save("rows.npy", np.ones((3, 1, 8, 8)))
    np.save("nan.npy", np.where(MASK, np.nan, np.ones((2, 1, 8, 8))))
    assert message in refused(capsys, image_file, *flags.split())
    assert not (files / "samples.png").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("height,age\n1,\n", "the model has no column 'age': give one of height, weight"),
        ("hight,weight\n1,\n", "the model has no column 'hight': did you mean height"),
        ("height,weight\n1,tall\n", "row 1, column weight holds 'tall', not a finite number"),
        ("height,weight\n1,\n2,nan\n", "row 2, column weight holds 'nan', not a finite number"),
        ("height,weight\n1,1e999\n", "row 1, column weight holds '1e999', not a finite number"),
        ("height,weight\n1_0,\n", "row 1, column height holds '1_0', not a finite number"),
        (
            "height,weight\n1,2\n3,4\n",
            "every value is known, so nothing is to be drawn; leave the cells to draw",
        ),
        ("height,weight\n,\n,\n", "every value is missing"),
        ("height,weight\n1\n", "row 1 has 1 cells, but the table has 2 columns"),
        ("height,height\n1,\n", "has two columns called height"),
        ("height, height\n1,\n", "has two columns called height"),
        ("height,weight\n", "has no rows below its line of names"),
        ("", "has no rows below its line of names"),
        ("height,weight\n1,1e200\n3,\n", "known is not finite"),
    ],
)
def test_bad_tables_are_refused_in_one_line(point_file, tmp_path, capsys, monkeypatch, table, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(table)
    assert message in refused(capsys, point_file, "--known", "rows.csv", "--output", "a.csv")
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--known known.png", "this model draws points with the columns height, weight; give a .csv"),
        ("--known rows.csv --mask known.png", "--mask known.png: this model draws points; leave the cells"),
        ("--start-from-image rows.csv", "rows.csv has empty cells or NaN: give every value"),
        ("--known latin.csv", "latin.csv cannot be read as a .csv table"),
    ],
)  # fmt: skip
def test_files_of_images_are_refused_for_points(point_file, files, capsys, flags, message):
    (files / "rows.csv").write_text(TABLE)
    (files / "latin.csv").write_bytes("hëight\n1".encode("latin-1"))
    assert message in refused(capsys, point_file, *flags.split())


@pytest.mark.parametrize("version_2", ["variance"], indirect=True)
def test_rows_of_a_model_with_classes_need_a_class(version_2, tmp_path, capsys, monkeypatch):
    """Not an image that is known for all samples, whose classes take turns as usual."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sampler.onnx").write_bytes(version_2[2])
    known = np.full((2, 1, 4, 4), 3.0)
    known[:, :, 2:] = np.nan
    np.save("rows.npy", known)
    np.save("one.npy", known[0])
    assert "give --label" in refused(capsys, "sampler.onnx", "--known", "rows.npy")
    for flags in (["--known", "rows.npy", "--label", "dog"], ["--known", "rows.npy", "--guidance-scale", 0]):
        assert "2 samples" in run(capsys, "sampler.onnx", *flags)
    assert "6 samples" in run(capsys, "sampler.onnx", "--known", "one.npy", "--num-samples", 6)
    np.save("one.npy", np.ones((1, 4, 4)))
    assert "needs the same class" in refused(capsys, "sampler.onnx", "--interpolate", "one.npy", "one.npy")


def test_flags_are_checked_before_the_model_is_opened(tmp_path, capsys):
    """The model does not exist; what is wrong with the flags is said first."""
    missing = tmp_path / "none.onnx"
    assert "strength 7" in refused(capsys, missing, "--interpolate", "a.png", "b.png", "--strength", 7)
    assert "a.png does not exist" in refused(capsys, missing, "--known", "a.png")
