"""The command `ray-ddpm evaluate`: what it prints and writes, and what it refuses."""

import json
import shutil

import numpy as np
import pytest

from tests.workflows.test_bulk_sampling import write_model
from workflows.cli.process import exit_status
from workflows.evaluate import main


def points(count, scale=1.0, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 2)) * [0.5 * scale, 3.0 * scale] + [1.0, -2.0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path, monkeypatch, model):
    """Current folder with a table as data, and samples of three kinds."""
    monkeypatch.chdir(tmp_path)
    data = points(3000)
    np.savetxt("data.csv", data, delimiter=",", header="height,weight", comments="")
    np.save("good.npy", points(1000, seed=1))
    np.save("<wide>.npy", points(1000, scale=2.0, seed=2))
    np.save("copies.npy", data[:1000])
    shutil.copy(model, tmp_path)
    return tmp_path


def test_models_and_samples_are_judged_together(folder, capsys):
    names = ["<wide>.npy", "sampler.onnx", "good.npy", "copies.npy"]
    assert exit_status(main, [*names, "--data", "data.csv", "--num-samples", "900"]) == 0
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if line.startswith("reading")] == [
        f"reading {name}" for name in names
    ]
    assert "900 samples of each, compared with 2580 examples, 900 of them held out" in output
    assert "\n<wide>.npy: worse by distance and auc (distance +" in output
    assert "\ncopies.npy: It copies training examples: " in output
    assert "\nsampler.onnx: Its model was trained on other data or another split" in output
    tree = json.loads((folder / "evaluation.json").read_text())
    assert {each["name"]: each["copying"] for each in tree["candidates"]} == {
        "good.npy": "no sign", "<wide>.npy": "no sign", "sampler.onnx": None, "copies.npy": "copies",
    }  # fmt: skip
    best, *others = tree["candidates"]
    assert (best["name"], best["outcome"], best["minus_best"]) == ("good.npy", "the best", {})
    assert all(each["minus_best"]["auc"]["standard_error"] > 0.0 for each in others)
    page = (folder / "evaluation.html").read_text()
    assert page.count("<img ") == 5 and "<wide>" not in page and "&lt;wide&gt;.npy" in page
    assert "neighbour_kl" in page and "No sign of copying" in page


def test_samples_that_are_not_finite_leave_valid_json(folder, capsys):
    broken = points(100)
    broken[7, 1] = np.inf
    np.save("broken.npy", broken)
    assert exit_status(main, ["broken.npy", "--data", "data.csv"]) == 2
    assert "row 8, column x1 holds inf, not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.npy", "--data", "data.csv"], "missing.npy: there is no such file or folder; give"),
        (["good.npy", "--data", "missing.csv"], "--data missing.csv: there is no such data set"),
        (["good.npy", "--data", "data.csv", "--output", "page.pdf"], "--output page.pdf: give a file ending"),
        (["good.npy", "--data", "data.csv", "--output", "no/a.html"], "the folder no does not exist"),
        (["good.npy", "--data", "data.csv", "--num-samples", "19"], "--num-samples 19: give 20 to 1,000,000"),
        (["good.npy", "--data", "data.csv", "--image-size", "3"], "--image-size 3: give"),
        (["good.npy", "--data", "digits"], "holds points, and the data are images"),
        (["sampler.onnx", "--data", "data.csv", "--steps", "0"], "num_inference_steps 0"),
        (["good.npy", "--data", "data.csv", "--label-column", "age"], "no such column"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(folder, capsys, arguments, message):
    before = sorted(folder.iterdir())
    assert exit_status(main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(folder.iterdir()) == before
