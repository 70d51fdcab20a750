import csv
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion.plots import draw_samples
from export.conditions import read_conditions
from export.output import save_samples
from export.sampler import Sampler, main


def refused(capsys, *arguments):
    """Run a command that ends with status 2, and return its one line of error."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


def run(capsys, *arguments):
    """Run a command that succeeds, and return what it prints."""
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def read_csv(path):
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    return header, np.array(rows, dtype=np.float64)


def test_npy_holds_the_samplers_samples(image_file, image_sampler, tmp_path, capsys):
    path = tmp_path / "samples.npy"
    printed = run(capsys, image_file, "--num-samples", 5, "--seed", 3, "--output", path)
    samples = np.load(path)
    assert samples.dtype == np.float32
    assert samples.shape == (5, 1, 8, 8)
    np.testing.assert_array_equal(samples, image_sampler.sample(5, seed=3))
    assert str(path) in printed


def test_the_provider_is_printed(image_file, tmp_path, capsys):
    arguments = (image_file, "--num-samples", 1, "--output", tmp_path / "samples.npy")
    assert "CPU" in run(capsys, *arguments, "--provider", "cpu")
    printed = run(capsys, *arguments)
    assert "CUDA" in printed or "CPU, since " in printed


def test_png_of_images_is_the_grid_of_the_samples(image_file, image_sampler, tmp_path, capsys):
    path = tmp_path / "samples.png"
    run(capsys, image_file, "--num-samples", 6, "--seed", 1, "--output", path)
    with Image.open(path) as picture:
        assert picture.mode == "L"
        pixels = np.asarray(picture)
    np.testing.assert_array_equal(pixels, draw_samples(image_sampler.sample(6, seed=1), (0.0, 16.0)))
    assert pixels.std() > 0


def test_png_of_points_is_a_scatter(point_file, tmp_path, capsys):
    path = tmp_path / "points.png"
    run(capsys, point_file, "--num-samples", 50, "--output", path)
    with Image.open(path) as picture:
        assert picture.width == picture.height
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 2


def test_csv_of_points_has_their_columns_and_loses_no_bit(point_file, point_sampler, tmp_path, capsys):
    path = tmp_path / "points.csv"
    run(capsys, point_file, "--num-samples", 7, "--seed", 5, "--output", path)
    header, rows = read_csv(path)
    assert header == ["height", "weight"]
    np.testing.assert_array_equal(rows.astype(np.float32), point_sampler.sample(7, seed=5))
    assert b"\r\r" not in path.read_bytes()


def test_npy_of_points_has_one_row_per_point(point_file, point_sampler, tmp_path, capsys):
    run(capsys, point_file, "--num-samples", 3, "--output", tmp_path / "points.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "points.npy"), point_sampler.sample(3))


def test_every_flag_reaches_the_sampler(point_file, point_sampler, tmp_path, capsys):
    path = tmp_path / "points.npy"
    flags = ["--num-samples", 4, "--seed", 9, "--sampler", "ddim", "--steps", 6, "--eta", 0.75]
    run(capsys, point_file, *flags, "--spacing", "linspace", "--provider", "cpu", "--output", path)
    choices = {"sampler": "ddim", "num_steps": 6, "eta": 0.75, "spacing": "linspace"}
    np.testing.assert_array_equal(np.load(path), point_sampler.sample(4, seed=9, **choices))
    for change in ({"sampler": "ddpm", "eta": None}, {"num_steps": 5}, {"eta": 0.5}, {"spacing": "leading"}):
        other = point_sampler.sample(4, seed=9, **{**choices, **change})
        assert np.abs(other - np.load(path)).max() > 1e-4


def test_without_flags_64_samples_go_to_samples_png(point_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "64 samples" in run(capsys, point_file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.png"]


def test_progress_is_shown_only_on_a_terminal(image_file, tmp_path, capsys, monkeypatch):
    arguments = [str(image_file), "--num-samples", "2", "--steps", "4", "--output", str(tmp_path / "a.npy")]
    run(capsys, *arguments)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(arguments) == 0
    assert capsys.readouterr().err.endswith("4/4 network calls\n")


@pytest.mark.parametrize("name", ["samples.jpg", "samples", "samples.csv", "samples.npz", "samples.npy.txt"])
def test_another_suffix_is_refused_for_images(image_file, tmp_path, capsys, name):
    message = refused(capsys, image_file, "--output", tmp_path / name)
    assert str(tmp_path / name) in message
    assert ".png, .npy" in message
    assert list(tmp_path.iterdir()) == []


def test_another_suffix_is_refused_for_points(point_file, tmp_path, capsys):
    assert ".png, .npy, .csv" in refused(capsys, point_file, "--output", tmp_path / "points.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "a.npy"])
def test_a_missing_folder_is_refused_and_not_created(image_file, tmp_path, capsys, name):
    path = tmp_path / "none" / name
    assert str(path.parent) in refused(capsys, image_file, "--output", path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.csv"])
def test_an_output_that_is_a_folder_is_refused(point_file, tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    assert str(tmp_path / name) in refused(
        capsys, point_file, "--num-samples", 1, "--output", tmp_path / name
    )


def test_a_model_that_cannot_be_used_is_refused(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    assert str(path) in refused(capsys, path, "--output", tmp_path / "a.png")
    path.write_bytes(b"not a model")
    assert str(path) in refused(capsys, path, "--output", tmp_path / "a.png")
    assert str(tmp_path) in refused(capsys, tmp_path, "--output", tmp_path / "a.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    "flags", [["--num-samples", "0"], ["--steps", "0"], ["--steps", "21"], ["--eta", "1.5"], ["--eta", "nan"]]
)
def test_a_number_out_of_range_is_refused_by_value(image_file, tmp_path, capsys, flags):
    assert flags[1] in refused(capsys, image_file, *flags, "--output", tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sampler.onnx", "--num-samples", "many"],
        ["sampler.onnx", "--sampler", "euler"],
        ["sampler.onnx", "--spacing", "even"],
        ["sampler.onnx", "--provider", "tpu"],
        ["sampler.onnx", "--no-such-flag"],
    ],
    ids=str,
)
def test_arguments_that_cannot_be_parsed_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error" in last


def test_ctrl_c_is_one_line_and_writes_nothing(point_file, tmp_path, capsys, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "sample", interrupt)
    assert main([str(point_file), "--output", str(tmp_path / "samples.npy")]) == 3
    assert capsys.readouterr().err == "stopped; nothing was written\n"
    assert not list(tmp_path.glob("samples*"))


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("num-samples", "steps", "sampler", "eta", "spacing", "seed", "provider", "output"):
        assert f"--{flag}" in printed


def test_save_samples_refuses_what_it_cannot_write(image_sampler, tmp_path):
    with pytest.raises(ValueError, match="csv"):
        save_samples(image_sampler.sample(1), image_sampler.spec, tmp_path / "images.csv")
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_as_a_program(point_file, point_sampler, repository, tmp_path):
    """From any folder: it draws the same samples as the library; bad input gives one line and status 2."""
    command = [sys.executable, "-W", "error", "-m", "export.sampler", str(point_file)]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([*command, "--num-samples", "3", "--output", "points.csv"], **options)
    assert (done.returncode, done.stderr) == (0, "")
    _, rows = read_csv(tmp_path / "points.csv")
    expected = point_sampler.sample(3)
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5 * expected.std())

    bad = subprocess.run([*command, "--output", "points.gif"], **options)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: --output points.gif")
    assert bad.stderr.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["points.csv"]


def test_first_index_continues_an_earlier_call(point_file, point_sampler, tmp_path, capsys):
    path = tmp_path / "samples.npy"
    flags = ["--num-samples", 3, "--first-index", 4, "--threads", 1, "--time-limit", 600]
    run(capsys, point_file, "--output", path, *flags)
    expected = point_sampler.sample(7)[4:]
    np.testing.assert_allclose(np.load(path), expected, rtol=0, atol=1e-5 * expected.std())


@pytest.mark.parametrize(
    ("flag", "value"), [("--threads", "0"), ("--time-limit", "0"), ("--first-index", "-1")]
)
def test_limits_out_of_range_are_refused_and_nothing_is_written(point_file, tmp_path, capsys, flag, value):
    name = flag.removeprefix("--").replace("-", "_")
    assert f"{name} {value}" in refused(capsys, point_file, "--output", tmp_path / "a.npy", f"{flag}={value}")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(name="conditional")
def _conditional(version_2, tmp_path):
    """A model with the conditions low_resolution and known, and a .npy file of each."""
    rng = np.random.default_rng(1)
    files = {"model": tmp_path / "sampler.onnx"}
    files["model"].write_bytes(version_2[2])
    for name, shape in (("low_resolution", (1, 2, 2)), ("known", (4, 3))):
        files[name] = tmp_path / f"{name}.npy"
        np.save(files[name], rng.uniform(0.0, 5.0, shape))
    return files


@pytest.mark.parametrize("version_2", ["conditions"], indirect=True)
def test_conditions_are_read_from_files(conditional, version_2, tmp_path, capsys):
    given = [f"--condition={name}={conditional[name]}" for name in ("known", "low_resolution")]
    run(capsys, conditional["model"], "--num-samples", 4, "--output", tmp_path / "samples.npy", *given)
    values = {name: np.load(conditional[name]) for name in ("known", "low_resolution")}
    expected = Sampler(version_2[2], provider="cpu").sample(4, conditions=values)
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy"), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"known": None}, "this model needs 'known' of shape [3]"),
        (
            {"knwon": "known.npy"},
            "condition 'knwon': this model has no such condition, it has low_resolution, ",
        ),
        ({"known": "low_resolution.npy"}, "condition 'known' has shape [1, 2, 2]: give [3] for all"),
        ({"known": "2.5"}, "condition 'known' has shape []: give [3] for all"),
        ({"known": "missing.npy"}, "missing.npy cannot be read (No such file or directory)"),
        ({"known": "sampler.onnx"}, "sampler.onnx cannot be read as an array"),
        ({"known": ""}, "--condition known=: give NAME=FILE.npy or NAME=NUMBER"),
        ({"known": "known.npy --condition=known=known.npy"}, "'known' is given twice"),
    ],
)
@pytest.mark.parametrize("version_2", ["conditions"], indirect=True)
def test_bad_conditions_are_refused_in_one_line(conditional, change, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"low_resolution": "low_resolution.npy", "known": "known.npy"} | change
    flags = [f"--condition={name}={value}" for name, value in given.items() if value is not None]
    error = refused(capsys, "sampler.onnx", "--num-samples", 4, *" ".join(flags).split())
    assert words in error
    assert not (tmp_path / "samples.png").exists()


def test_a_condition_that_is_one_number_needs_no_file():
    assert read_conditions(["strength=0.5", "width=1e3"]) == {"strength": 0.5, "width": 1000.0}
