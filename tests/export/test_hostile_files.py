"""Untrusted files give samples or a one-line error: no crash, no hang, no access to other files."""

import base64
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper

from diffusion.errors import InputError
from export import sampler as sampler_module
from export.sampler import Sampler


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_files_give_samples_or_a_one_line_error(point_onnx, repository, tmp_path, seed):
    (tmp_path / "sampler.onnx").write_bytes(point_onnx)
    command = [sys.executable, "-m", "benchmarks.fuzz", tmp_path / "sampler.onnx", "--folder", tmp_path]
    done = subprocess.run(
        [*command, "--seed", str(seed), "--copies", "300"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    refused, read = (int(cell) for cell in done.stdout.splitlines()[-1].split(" | ")[1:3])
    assert refused > 100 and read > 20


def refused(content):
    with pytest.raises(InputError) as caught:
        Sampler(content, provider="cpu").sample(2, time_limit=20.0)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture(name="altered")
def _altered(point_onnx, metadata_of, with_metadata):
    """Function that replaces one entry of the spec, given by a path of keys, in the points' file."""

    def alter(keys, value):
        metadata = metadata_of(point_onnx)
        spec = json.loads(metadata["ray_ddpm.spec"])
        parent = spec
        for key in keys[:-1]:
            parent = parent[key]
        parent[keys[-1]] = value
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
        (["sampler", "fast"], None),
        (["sampler", "fast"], {"name": "ddim", "num_steps": 10**9}),
        (["sampler", "fast"], {"name": "__import__('os')", "num_steps": 5}),
        (["sampler", "fast"], {"name": 5, "num_steps": 5}),
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
    ids=["deep", "empty object", "null", "number", "unclosed", "not ASCII", "empty"],
)
def test_invalid_json_is_refused(point_onnx, metadata_of, with_metadata, spec):
    assert refused(with_metadata(point_onnx, metadata_of(point_onnx) | {"ray_ddpm.spec": spec}))


@pytest.mark.parametrize("name", ["timesteps", "table", "alphas_cumprod"])
@pytest.mark.parametrize(
    "text", ["", "!!!", "AAAA", "A" * 1_000_001], ids=["empty", "not base64", "short", "long"]
)
def test_invalid_tables_are_refused(point_onnx, metadata_of, with_metadata, name, text):
    assert refused(with_metadata(point_onnx, metadata_of(point_onnx) | {f"ray_ddpm.{name}": text}))


def test_a_table_with_too_many_steps_is_refused(point_onnx, metadata_of, with_metadata):
    """Timesteps may repeat, so a short schedule alone would not limit their number."""
    steps = 200_000

    def encode(values, dtype):
        return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()

    row = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0]
    metadata = metadata_of(point_onnx) | {
        "ray_ddpm.timesteps": encode(np.zeros(steps), "<i8"),
        "ray_ddpm.table": encode(np.tile(row, (steps, 1)), "<f8"),
        "ray_ddpm.alphas_cumprod": encode(np.ones(steps + 1), "<f8"),
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


def test_a_graph_that_needs_too_much_memory_is_refused(point_onnx, metadata_of, with_metadata):
    """A file of a few hundred bytes that asks for 4 TB, either when it is opened or when it is run."""
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


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "sampler.onnx"
    with open(path, "wb") as file:
        file.truncate(3 * 1024**3)  # a sparse file
    monkeypatch.setattr(sampler_module.Path, "read_bytes", None)  # must not be called
    assert str(path) in refused(path)


def test_a_pipe_and_a_device_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refused(tmp_path / "pipe")
    assert "not a file" in refused("/dev/zero")
