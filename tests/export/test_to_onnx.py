import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from diffusion.config import SamplerConfig
from diffusion.training.checkpoints import TrainedModel
from export import exporter
from export.noise import normal_noise
from export.sampler import Sampler
from export.to_onnx import ParityError, export_onnx, main, sampler_spec


@pytest.fixture(name="content", params=["image", "points"])
def _content(request, image_onnx, point_onnx):
    return image_onnx if request.param == "image" else point_onnx


@pytest.fixture(name="model_folder")
def _model_folder(point_model, tmp_path):
    point_model.save(tmp_path / "model")
    return tmp_path / "model"


def refused(capsys, *arguments):
    """Run a command that ends with status 2, and return its one line of error."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


def graphs(graph):
    """Yield a graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from graphs(inner)


def test_the_file_is_valid_onnx_of_opset_20(content):
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import if not entry.domain] == [("", 20)]
    assert {node.domain for graph in graphs(proto.graph) for node in graph.node} == {""}


def test_inputs_and_output_have_a_symbolic_batch_size(content):
    proto = onnx.load_from_string(content)
    shape = list(Sampler(content, provider="cpu").spec.shape)
    actual = {}
    for value in (*proto.graph.input, *proto.graph.output):
        tensor = value.type.tensor_type
        actual[value.name] = (
            tensor.elem_type,
            [size.dim_param or size.dim_value for size in tensor.shape.dim],
        )
    assert actual == {
        "x": (onnx.TensorProto.FLOAT, ["batch", *shape]),
        "t": (onnx.TensorProto.INT64, ["batch"]),
        "model_output": (onnx.TensorProto.FLOAT, ["batch", *shape]),
    }
    assert [value.name for value in proto.graph.input] == ["x", "t"]


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_any_batch_gives_pytorchs_outputs(image_model, image_onnx, batch):
    """Every example has its own timestep."""
    session = onnxruntime.InferenceSession(image_onnx, providers=["CPUExecutionProvider"])
    x = normal_noise(0, np.arange(batch), 0, (1, 8, 8)).astype(np.float32)
    t = (np.arange(batch) * 5 + 3) % 20
    (actual,) = session.run(["model_output"], {"x": x, "t": t})
    expected = image_model.network(torch.from_numpy(x), torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_traces_shapes_and_doc_strings_are_stripped(content):
    proto = onnx.load_from_string(content)
    assert proto.doc_string == ""
    assert len(proto.functions) == 0
    for graph in graphs(proto.graph):
        assert len(graph.value_info) == 0
        assert len(graph.metadata_props) == 0
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
            assert part.doc_string == ""
        for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
            assert len(part.metadata_props) == 0


def test_the_file_contains_no_local_path(content, repository):
    paths = [
        repository,
        Path(torch.__file__).parent,
        Path(onnx.__file__).parent.parent,
        Path.home(),
        Path.cwd(),
    ]
    for path in {str(path) for path in paths if path != Path("/")}:
        assert path.encode() not in content, path
    assert b'File "' not in content
    assert b"site-packages" not in content


def test_all_weights_are_inside_and_none_is_there_twice(content, image_model, point_model):
    proto = onnx.load_from_string(content)
    model = point_model if len(proto.graph.input[0].type.tensor_type.shape.dim) == 2 else image_model
    for tensor in proto.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.DEFAULT
        assert len(tensor.external_data) == 0
    num_bytes = sum(4 * weights.numel() for weights in model.network.state_dict().values())
    assert len(content) < num_bytes + 20_000


def test_nothing_in_the_graph_is_random(content):
    """The fixtures' networks have dropout, which is only for training."""
    operators = {node.op_type for node in onnx.load_from_string(content).graph.node}
    assert not {
        name for name in operators if "Random" in name or name in ("Dropout", "Bernoulli", "Multinomial")
    }
    samplers = [Sampler(content, provider="cpu") for _ in range(2)]
    np.testing.assert_array_equal(samplers[0].sample(2), samplers[1].sample(2))


def test_the_metadata_describe_the_model(image_model):
    spec = sampler_spec(image_model)
    assert json.loads(json.dumps(spec.data)) == {
        "kind": "image", "shape": [1, 8, 8], "mean": [[[5.0]]], "std": [[[4.0]]], "range": [0.0, 16.0],
        "columns": None,
    }  # fmt: skip
    assert spec.sampler == {
        "name": "ddpm", "num_steps": 10, "eta": 0.0, "variance": "beta", "spacing": "logsnr",
        "clip": [-1.25, 2.75], "guidance_scale": 1.0,
    }  # fmt: skip
    assert spec.provenance == {
        "run_id": "abc123", "git_revision": "0123456", "data_fingerprint": "f" * 64,
        "metrics": {"val/elbo_window": 1.25},
    }  # fmt: skip
    assert spec.prediction_type == "epsilon"
    assert spec.schedule["kind"] == "linear"
    assert spec.schedule["betas"] == image_model.schedule.betas.tolist()


def test_the_metadata_of_an_unclipped_model(point_model):
    spec = sampler_spec(point_model)
    assert spec.sampler["clip"] is None
    assert spec.data["range"] is None
    assert list(spec.data["columns"]) == ["height", "weight"]


def test_a_model_without_provenance_can_be_exported(point_model, broken, give_graph, point_onnx):
    give_graph(onnx.load_from_string(point_onnx))
    content, _ = export_onnx(dataclasses.replace(point_model, provenance={}))
    provenance = Sampler(content, provider="cpu").spec.provenance
    assert provenance["run_id"] is None
    assert provenance["metrics"] == {}


def test_num_steps_is_limited_by_the_schedule(make_model, point_model):
    spec = sampler_spec(make_model(point_model.data, SamplerConfig(num_steps=100)))
    assert spec.sampler["num_steps"] == len(spec.table.timesteps) == 20


def test_a_schedule_of_one_step_can_be_exported(make_model, point_model):
    model = make_model(point_model.data, SamplerConfig(num_steps=100), num_train_timesteps=1)
    content, cases = export_onnx(model)
    assert all(case.passed for case in cases)
    assert np.isfinite(Sampler(content, provider="cpu").sample(3)).all()


def test_exporting_is_silent_and_does_not_change_the_network(make_model, point_model, capfd):
    model = make_model(point_model.data, point_model.config.sampler)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    rng = torch.get_rng_state()
    export_onnx(model)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not model.network.training
    assert all(torch.equal(before[name], value) for name, value in model.network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("damage", ["forgets the timestep", "repeats the first output"])
def test_a_broken_graph_is_not_exported(point_model, point_onnx, broken, give_graph, damage):
    give_graph(broken[damage](onnx.load_from_string(point_onnx)))
    with pytest.raises(ParityError) as caught:
        export_onnx(point_model)
    assert len(str(caught.value).splitlines()) == 1
    assert "one step" in str(caught.value)  # the first comparison that failed


def test_another_models_graph_is_not_exported(make_model, point_model, point_onnx, give_graph):
    give_graph(onnx.load_from_string(point_onnx))
    with pytest.raises(ParityError):
        export_onnx(make_model(point_model.data, point_model.config.sampler, seed=1))


def test_weights_that_change_after_the_export_are_noticed(make_model, point_model, monkeypatch):
    """With the real exporter, and a network that changes after it was exported."""
    model = make_model(point_model.data, point_model.config.sampler)
    export_graph = exporter.denoiser_graph

    def export_and_change(network, spec):
        proto = export_graph(network, spec)
        network.blocks[0].linear.weight.mul_(1.5)
        return proto

    monkeypatch.setattr(exporter, "denoiser_graph", export_and_change)
    with pytest.raises(ParityError):
        export_onnx(model)


def test_the_command_writes_one_file_that_samples(model_folder, point_sampler, tmp_path, capsys):
    output = tmp_path / "out" / "my.onnx"
    output.parent.mkdir()
    assert main([str(model_folder), "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert str(output) in captured.out
    assert "python -m export.sampler" in captured.out  # the next step
    assert [entry.name for entry in output.parent.iterdir()] == ["my.onnx"]
    expected = point_sampler.sample(5)
    actual = Sampler(output, provider="cpu").sample(5)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())


@pytest.mark.slow
def test_the_module_runs_as_a_program(model_folder, repository, tmp_path):
    """By default it writes sampler.onnx into the current folder."""
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "export.to_onnx", str(model_folder)],
        cwd=tmp_path / "here",
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 4
    assert "samples were not compared with the data: heart" in done.stdout  # another fingerprint
    assert [entry.name for entry in (tmp_path / "here").iterdir()] == ["sampler.onnx"]
    content = (tmp_path / "here" / "sampler.onnx").read_bytes()
    assert str(tmp_path).encode() not in content
    assert Sampler(content, provider="cpu").sample(1).shape == (1, 2)


def test_a_failed_comparison_writes_nothing_and_returns_1(
    model_folder, point_onnx, broken, give_graph, tmp_path, capsys
):
    """An existing file is kept."""
    give_graph(broken["forgets the timestep"](onnx.load_from_string(point_onnx)))
    output = tmp_path / "out" / "sampler.onnx"
    output.parent.mkdir()
    assert main([str(model_folder), "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: parity failed")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(output.parent.iterdir()) == []

    output.write_bytes(b"an older file")
    assert main([str(model_folder), "--output", str(output)]) == 1
    assert output.read_bytes() == b"an older file"
    assert [entry.name for entry in output.parent.iterdir()] == ["sampler.onnx"]


def test_a_full_disk_is_one_line_and_keeps_an_older_file(
    model_folder, point_onnx, give_graph, tmp_path, monkeypatch, capsys
):
    give_graph(onnx.load_from_string(point_onnx))
    output = tmp_path / "sampler.onnx"
    output.write_bytes(b"an older file")

    def fail(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as context:
        context.setattr(Path, "write_bytes", fail)
        message = refused(capsys, model_folder, "--output", output)
    assert f"--output {output} cannot be written (No space left on device)" in message
    assert output.read_bytes() == b"an older file"
    assert {entry.name for entry in tmp_path.iterdir()} <= {"sampler.onnx", model_folder.name}


def test_a_missing_model_folder_is_refused_by_name(tmp_path, capsys):
    path = tmp_path / "none"
    assert str(path) in refused(capsys, path, "--output", tmp_path / "sampler.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [None, b"", b"damaged"], ids=str)
def test_a_missing_or_damaged_part_of_the_model_is_refused(model_folder, tmp_path, capsys, name, damage):
    (model_folder / name).unlink()
    if damage is not None:
        (model_folder / name).write_bytes(damage)
    assert str(model_folder) in refused(capsys, model_folder, "--output", tmp_path / "sampler.onnx")
    assert not (tmp_path / "sampler.onnx").exists()


def test_a_missing_output_folder_is_refused_before_any_work(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exporter, "export_onnx", None)  # must not be called
    path = tmp_path / "none" / "sampler.onnx"
    assert str(path.parent) in refused(capsys, model_folder, "--output", path)
    assert not path.parent.exists()


def test_an_output_that_is_a_folder_is_refused_before_any_work(model_folder, tmp_path, capsys, monkeypatch):
    """Such as `--output .`."""
    monkeypatch.setattr(exporter, "export_onnx", lambda model: (b"content", []))
    assert str(model_folder) in refused(capsys, model_folder, "--output", model_folder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("arguments", [[], ["model", "--opset", "17"], ["model", "--output"]], ids=str)
def test_arguments_that_cannot_be_parsed_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err.splitlines()[-1]


def test_a_saved_and_loaded_model_gives_the_same_file(model_folder, point_model, point_onnx):
    """A model from disk gives the same weights and the same metadata."""
    loaded = TrainedModel.load(model_folder)
    assert sampler_spec(loaded).to_metadata() == sampler_spec(point_model).to_metadata()
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in _initializers(point_onnx)}
    for name, expected in loaded.network.state_dict().items():
        if name in weights:
            np.testing.assert_array_equal(weights[name], expected.numpy())
    assert {"inward.weight", "outward.weight", "outward.bias"} <= set(weights)


def _initializers(content):
    return onnx.load_from_string(content).graph.initializer
