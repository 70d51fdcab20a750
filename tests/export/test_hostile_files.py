"""Files from strangers: one clear line or samples, whatever is in them; no crash, no hang, no other file."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from diffusion.errors import InputError
from export import sampler as sampler_module
from export.sampler import Sampler

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_files_end_in_one_line_or_in_samples(point_onnx, repository, tmp_path, seed):
    (tmp_path / "sampler.onnx").write_bytes(point_onnx)
    done = subprocess.run(
        [sys.executable, FUZZ, "sampler.onnx", str(seed), "300"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    _, refused, _, drawn = line.split()
    assert int(refused) > 100 and int(drawn) > 20


def refused(content):
    with pytest.raises(InputError) as caught:
        Sampler(content, provider="cpu").sample(2, time_limit=20.0)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture(name="altered")
def _altered(point_onnx, metadata_of, with_metadata):
    """The file with one entry of its spec, found by a path of keys, replaced."""

    def alter(keys, value):
        metadata = metadata_of(point_onnx)
        spec = json.loads(metadata["ray_ddpm.spec"])
        place = spec
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return with_metadata(point_onnx, metadata | {"ray_ddpm.spec": json.dumps(spec)})

    return alter


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["data", "shape"], [2**31, 2**31]),
        (["data", "shape"], [-2]),
        (["data", "shape"], []),
        (["data", "shape"], [True, 2]),
        (["data", "shape"], "22"),
        (["data", "mean"], 1e999),
        (["data", "mean"], [[["a"]]]),
        (["data", "std"], 0.0),
        (["data", "std"], [1.0] * 10_000),
        (["data", "range"], [1.0, 0.0]),
        (["data", "classes"], {"a": 1}),
        (["data", "kind"], "program"),
        (["schedule", "betas"], []),
        (["schedule", "betas"], [2.0]),
        (["schedule", "betas"], [float("nan")]),
        (["schedule", "betas"], [1e-6] * 1_000_000),
        (["schedule", "betas"], "0.1"),
        (["sampler", "num_steps"], 10**9),
        (["sampler", "num_steps"], 2.5),
        (["sampler", "name"], "__import__('os')"),
        (["sampler", "eta"], -1.0),
        (["sampler", "guidance_scale"], 1e308),
        (["prediction_type"], "noise"),
        (["data"], None),
        (["extra"], 1),
    ],
    ids=str,
)
def test_hostile_metadata_are_refused_before_a_sample_is_drawn(altered, keys, value):
    assert refused(altered(keys, value))


@pytest.mark.parametrize(
    "spec",
    ["[" * 100_000, "{}", "null", "1e400", '{"data": ' * 5000, "\u00ff", ""],
    ids=["deep", "empty object", "null", "number", "open", "no ASCII", "nothing"],
)
def test_json_that_is_none_is_refused(point_onnx, metadata_of, with_metadata, spec):
    assert refused(with_metadata(point_onnx, metadata_of(point_onnx) | {"ray_ddpm.spec": spec}))


@pytest.mark.parametrize("name", ["timesteps", "table", "alphas_cumprod"])
@pytest.mark.parametrize("text", ["", "!!!", "AAAA", "A" * 1_000_001], ids=["none", "signs", "short", "long"])
def test_tables_that_are_none_are_refused(point_onnx, metadata_of, with_metadata, name, text):
    assert refused(with_metadata(point_onnx, metadata_of(point_onnx) | {f"ray_ddpm.{name}": text}))


def test_a_table_with_more_steps_than_anyone_asks_for_is_refused(point_onnx, metadata_of, with_metadata):
    """The timesteps may repeat, so the schedule does not bound them."""
    steps = 200_000

    def text(values, kind):
        return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode()

    row = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0]
    metadata = metadata_of(point_onnx) | {
        "ray_ddpm.timesteps": text(np.zeros(steps), "<i8"),
        "ray_ddpm.table": text(np.tile(row, (steps, 1)), "<f8"),
        "ray_ddpm.alphas_cumprod": text(np.ones(steps + 1), "<f8"),
    }
    assert "steps" in refused(with_metadata(point_onnx, metadata))


def graph_of(nodes, initializers=()):
    graph = helper.make_graph(
        nodes,
        "hostile",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("t", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("model_output", TensorProto.FLOAT, ["batch", 2])],
        list(initializers),
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()


def test_a_graph_that_asks_for_more_memory_than_there_is_is_refused(point_onnx, metadata_of, with_metadata):
    """4 TB, from a file of a few hundred bytes; neither when it is opened nor when it is run."""
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("Add", ["x", "zero"], ["model_output"]),
    ]
    size = helper.make_tensor("size", TensorProto.INT64, [1], [2**40])
    assert refused(with_metadata(graph_of(nodes, [size]), metadata_of(point_onnx)))


def test_a_graph_with_unknown_operators_is_refused(point_onnx, metadata_of, with_metadata):
    nodes = [helper.make_node("RunProgram", ["x"], ["model_output"])]
    assert refused(with_metadata(graph_of(nodes), metadata_of(point_onnx)))
    nodes = [helper.make_node("RunProgram", ["x"], ["model_output"], domain="strange")]
    assert refused(with_metadata(graph_of(nodes), metadata_of(point_onnx)))


def test_a_file_that_is_too_large_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "sampler.onnx"
    with open(path, "wb") as file:
        file.truncate(3 * 1024**3)  # of holes
    monkeypatch.setattr(sampler_module.Path, "read_bytes", None)  # not called
    assert str(path) in refused(path)


def test_a_pipe_and_a_device_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refused(tmp_path / "pipe")
    assert "not a file" in refused("/dev/zero")
