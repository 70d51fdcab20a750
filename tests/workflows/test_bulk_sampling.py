"""Bulk sampling: the samples do not depend on the number of actors, and none is drawn twice."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch

from diffusion.config import Config, NetworkConfig, SamplerConfig, ScheduleConfig
from diffusion.data.dataset import DataSpec
from diffusion.errors import InputError
from diffusion.networks.build import build_network
from diffusion.training.checkpoints import TrainedModel
from export.sampler import Sampler
from export.to_onnx import export_onnx
from workflows import bulk_sampling as bulk
from workflows.bulk_sampling import SamplingOptions, encode_samples

ROOT = Path(__file__).parents[2]


def write_model(tmp_path, shape=(2,), classes=()):
    """Write a sampler.onnx of a network with random weights, and return its path."""
    image = len(shape) == 3
    spec = DataSpec(
        name="some",
        kind="image" if image else "points",
        shape=shape,
        mean=[[[5.0]]] if image else [1.0, -2.0],
        std=[[[4.0]]] if image else [0.5, 3.0],
        range=(0.0, 16.0) if image else None,
        columns=None if image else ("height", "weight"),
        clip=(-2.5, 2.5),
        log_snr_window=(-8.0, 5.0),
        fingerprint="0" * 64,
        **({"classes": classes} if classes else {}),
    )
    config = Config(
        schedule=ScheduleConfig(num_train_timesteps=20, beta_start=0.01, beta_end=0.3),
        network=NetworkConfig(hidden_size=32, num_blocks=2, time_embedding_size=16, data_embedding_size=8),
        sampler=SamplerConfig(name="ddim", num_steps=5, eta=0.5),
    )
    torch.manual_seed(0)
    network = build_network(config, spec.shape, len(classes))
    torch.nn.init.normal_(network.outward.weight, std=0.1)
    path = tmp_path / "sampler.onnx"
    network = network.eval().requires_grad_(False)
    path.write_bytes(export_onnx(TrainedModel(config, spec, network, {}))[0])
    return path


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def no_ray(monkeypatch):
    """Draw blocks in this process instead of in Ray; the list of the first indices of the drawn blocks."""
    drawn = []

    def draw(content, starts, record, options, suffix, *_):
        sampler = Sampler(content, "cpu", threads=1)
        for start in starts:
            drawn.append(start)
            count = min(record["block_size"], record["num_samples"] - start)
            samples = sampler.sample(count, first_index=start, seed=options.seed)
            yield start, encode_samples(samples, start, sampler.spec, options.labels, suffix)

    monkeypatch.setattr(bulk, "draw_blocks", draw)
    monkeypatch.setattr(bulk, "start_ray", lambda verbose: None)
    return drawn


def blocks(folder):
    """Finished .npy files of a folder; those that are still being written have a hidden name."""
    return sorted(Path(folder).glob("[0-9]*.npy"))


def read(folder):
    """All samples of the .npy files in a folder, in the order of the file names."""
    return np.concatenate([np.load(path) for path in blocks(folder)])


def test_all_blocks_together_equal_the_samples_of_one_call(onnx, tmp_path, no_ray, capsys):
    bulk.generate(onnx, str(tmp_path / "out"), 23, SamplingOptions(seed=3), block_size=10)
    np.testing.assert_allclose(read(tmp_path / "out"), Sampler(onnx).sample(23, seed=3), rtol=1e-5, atol=1e-5)
    assert no_ray == [0, 10, 20]
    assert "23 samples in 3 files of 10" in capsys.readouterr().out


def test_existing_samples_are_not_drawn_again(onnx, tmp_path, no_ray, capsys):
    out = tmp_path / "out"
    bulk.generate(onnx, str(out), 50, SamplingOptions(), block_size=10)
    samples = read(out)
    for name in ("0000000010.npy", "0000000040.npy"):
        (out / name).unlink()
    no_ray.clear()
    bulk.generate(onnx, str(out), 50, SamplingOptions(), block_size=10)
    assert no_ray == [10, 40]
    np.testing.assert_array_equal(read(out), samples)
    bulk.generate(onnx, str(out), 50, SamplingOptions(), block_size=10)
    assert no_ray == [10, 40]
    assert "30 of 50 samples already exist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "num_samples", "words"),
    [
        (SamplingOptions(seed=1), 20, "drawn with seed 0, not 1"),
        (SamplingOptions(num_steps=3), 20, "drawn with num_steps None, not 3"),
        (SamplingOptions(), 30, "drawn with num_samples 20, not 30"),
    ],
)
def test_samples_with_other_options_are_not_mixed_in(onnx, tmp_path, no_ray, options, num_samples, words):
    bulk.generate(onnx, str(tmp_path / "out"), 20, SamplingOptions(), block_size=10)
    with pytest.raises(InputError, match=words):
        bulk.generate(onnx, str(tmp_path / "out"), num_samples, options, block_size=10)


def test_a_folder_of_an_earlier_version_is_resumed(onnx, tmp_path, no_ray):
    """Its record had a name that a reader of Parquet folders takes for data."""
    out = tmp_path / "out.parquet"
    bulk.generate(onnx, str(out), 30, SamplingOptions(), block_size=10)
    (out / "_generation.json").rename(out / "generation.json")
    (out / "0000000010.parquet").unlink()
    no_ray.clear()
    with pytest.raises(InputError, match="drawn with seed 0, not 1"):
        bulk.generate(onnx, str(out), 30, SamplingOptions(seed=1), block_size=10)
    bulk.generate(onnx, str(out), 30, SamplingOptions(), block_size=10)
    assert no_ray == [10]
    table = pd.read_parquet(out)
    assert table["index"].tolist() == list(range(30))


def test_a_folder_with_other_files_is_refused(onnx, tmp_path, no_ray):
    (tmp_path / "letter.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        bulk.generate(onnx, str(tmp_path), 20, SamplingOptions())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_samples": 0}, "--num-samples 0: give 1 to"),
        ({"num_actors": 0}, "--num-actors 0: give 1 to"),
        ({"block_size": 0}, "--block-size 0: give 1 to"),
        ({"options": SamplingOptions(num_steps=99)}, "99"),
        ({"options": SamplingOptions(labels="seven")}, "this model has no classes"),
        ({"model": Path("none.onnx")}, "none.onnx cannot be read"),
    ],
)
def test_bad_input_is_refused_before_the_output_is_created(onnx, tmp_path, arguments, words):
    given = {"model": onnx, "num_samples": 10, "options": SamplingOptions(), **arguments}
    with pytest.raises(InputError, match=words):
        bulk.generate(output=str(tmp_path / "out"), **given)
    assert not (tmp_path / "out").exists()


def test_parquet_of_points_has_one_column_per_coordinate(onnx, tmp_path, no_ray):
    out = tmp_path / "points.parquet"
    bulk.generate(onnx, str(out), 25, SamplingOptions(), block_size=10)
    table = pd.read_parquet(out)
    assert list(table) == ["index", "height", "weight"]
    assert table["index"].tolist() == list(range(25))
    expected = Sampler(onnx).sample(25)
    np.testing.assert_allclose(table[["height", "weight"]], expected, rtol=1e-5, atol=1e-5)


def test_parquet_of_images_keeps_their_shape_and_class(tmp_path):
    path = write_model(tmp_path, (1, 4, 4), ("zero", "one", "two"))
    sampler = Sampler(path)
    samples = sampler.sample(4, first_index=7)
    table = pyarrow.parquet.read_table(io.BytesIO(encode_samples(samples, 7, sampler.spec, None, ".parquet")))
    assert table["class"].to_pylist() == ["one", "two", "zero", "one"]
    np.testing.assert_array_equal(table["sample"].combine_chunks().to_numpy_ndarray(), samples)
    one_class = encode_samples(samples, 7, sampler.spec, "two", ".parquet")
    assert set(pyarrow.parquet.read_table(io.BytesIO(one_class))["class"].to_pylist()) == {"two"}


@pytest.mark.slow
def test_samples_do_not_depend_on_the_number_of_actors(onnx, tmp_path):
    for actors in (1, 2):
        run(onnx, tmp_path / str(actors), actors)
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    np.testing.assert_array_equal(one, two)
    assert one.shape == (500, 2)
    np.testing.assert_allclose(one, Sampler(onnx).sample(500), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_resumes_without_drawing_samples_again(onnx, tmp_path):
    out = tmp_path / "out"
    process = start(onnx, out, 2, "--num-samples", "200000", "--block-size", "100")
    deadline = time.monotonic() + 600
    while len(blocks(out)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode == 3
    drawn = {path: path.stat().st_mtime_ns for path in blocks(out)}
    record = (out / "_generation.json").read_text()
    assert 3 <= len(drawn) < 2000
    (out / "_generation.json").write_text(record.replace('"num_samples": 200000', '"num_samples": 5000'))
    for path in drawn:
        if int(path.stem) >= 4000:
            path.unlink()
    kept = {path: when for path, when in drawn.items() if int(path.stem) < 4000}
    printed = run(onnx, out, 2, "--num-samples", "5000", "--block-size", "100")
    assert f"{100 * len(kept)} of 5000 samples already exist" in printed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    np.testing.assert_allclose(read(out), Sampler(onnx).sample(5000), rtol=1e-5, atol=1e-5)


def start(onnx, out, actors, *arguments):
    """Start generate.py in a process group of its own."""
    command = [sys.executable, str(ROOT / "workflows" / "generate.py"), "--model", str(onnx)]
    command += ["--num-samples", "500", "--block-size", "64"] if not arguments else list(arguments)
    return subprocess.Popen(
        [*command, "--output", str(out), "--num-actors", str(actors)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(onnx, out, actors, *arguments):
    """Run generate.py to its end, and return what it printed."""
    process = start(onnx, out, actors, *arguments)
    try:
        printed, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, printed
    return printed
