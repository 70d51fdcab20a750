import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from diffusion.errors import InputError
from export import session
from export.sampler import Sampler
from export.session import open_session

HAS_CUDA = torch.cuda.is_available()


def refused(model, provider="cpu"):
    """Open a model that is refused, and return the one-line message."""
    with pytest.raises(InputError) as caught:
        Sampler(model, provider=provider)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 800
    return message


def test_provider_cpu_runs_on_the_cpu(image_onnx):
    opened, runs_on = open_session(image_onnx, "cpu")
    assert opened.get_providers() == ["CPUExecutionProvider"]
    assert opened.get_session_options().intra_op_num_threads == 1, "a tiny MLP needs one thread"
    assert runs_on == "CPU"
    assert Sampler(image_onnx, provider="cpu").runs_on == "CPU"


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_cuda_is_refused_if_it_is_not_available(image_onnx, image_file):
    message = refused(image_onnx, "cuda")
    assert "cuda" in message
    assert "provider auto or cpu" in message
    assert str(image_file) in refused(image_file, "cuda")


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_auto_falls_back_to_the_cpu_and_gives_the_reason(image_onnx):
    """It is the default provider, and draws the same samples as provider cpu."""
    sampler = Sampler(image_onnx)
    assert sampler.runs_on.startswith("CPU, since ")
    assert len(sampler.runs_on) > len("CPU, since ")
    assert Sampler(image_onnx, provider="auto").runs_on == sampler.runs_on
    expected = Sampler(image_onnx, provider="cpu").sample(2)
    np.testing.assert_array_equal(sampler.sample(2), expected)


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_cuda_draws_the_same_samples_as_the_cpu(image_onnx):
    sampler = Sampler(image_onnx, provider="cuda")
    assert sampler.runs_on == "CUDA"
    expected = Sampler(image_onnx, provider="cpu").sample(16)
    np.testing.assert_allclose(sampler.sample(16), expected, rtol=0, atol=1e-3 * expected.std())


def test_a_build_without_cuda_is_the_reason(image_onnx, monkeypatch):
    monkeypatch.setattr(session.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert Sampler(image_onnx, provider="auto").runs_on.startswith("CPU, since this build")
    assert "this build" in refused(image_onnx, "cuda")


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_a_session_that_silently_fell_back_is_not_taken_for_cuda(image_onnx, monkeypatch):
    """Without its CUDA libraries, ONNX Runtime opens a session on the CPU and raises nothing."""
    monkeypatch.setattr(session, "cuda_unavailable_reason", lambda device_id=0: None)
    assert Sampler(image_onnx, provider="auto").runs_on.startswith("CPU, since ")
    assert "provider cuda" in refused(image_onnx, "cuda")


@pytest.mark.parametrize("provider", ["gpu", "CPU", "", "CPUExecutionProvider"])
def test_an_unknown_provider_is_refused_by_name(image_onnx, provider):
    message = refused(image_onnx, provider)
    assert repr(provider) in message
    assert "auto, cpu, cuda" in message


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(100), b"\n" * 50])
def test_bytes_that_are_not_an_onnx_model_are_refused(content, tmp_path):
    assert refused(content)
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert str(path) in refused(path)


def test_a_truncated_model_is_refused(image_onnx):
    for fraction in (0.1, 0.5, 0.9, 0.999):
        assert refused(image_onnx[: int(fraction * len(image_onnx))])


def test_a_path_that_cannot_be_read_is_refused_by_name(tmp_path):
    for path in (tmp_path / "none.onnx", tmp_path / "no" / "folder.onnx", tmp_path):
        assert str(path) in refused(path)
        assert str(path) in refused(str(path))


def small_graph(inputs, outputs, metadata, extra=()):
    """A model that returns x as model_output, with the given inputs, outputs and metadata."""
    values = {
        "inputs": [helper.make_tensor_value_info(*value) for value in inputs],
        "outputs": [helper.make_tensor_value_info(*value) for value in outputs],
    }
    node = helper.make_node("Identity", [inputs[0][0]], [outputs[0][0]])
    graph = helper.make_graph([node, *extra], "small", **values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, metadata)
    return model.SerializeToString()


X = ("x", TensorProto.FLOAT, ["batch", 1, 8, 8])
T = ("t", TensorProto.INT64, ["batch"])
OUTPUT = ("model_output", TensorProto.FLOAT, ["batch", 1, 8, 8])


def test_any_model_with_the_right_inputs_is_accepted(image_onnx, metadata_of):
    sampler = Sampler(small_graph([X, T], [OUTPUT], metadata_of(image_onnx)), provider="cpu")
    assert sampler.sample(3).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([("image", *X[1:]), T], [OUTPUT]),
        ([X, ("timesteps", *T[1:])], [OUTPUT]),
        ([X], [OUTPUT]),
        ([X, T, ("y", TensorProto.INT64, ["batch"])], [OUTPUT]),
        ([X, T], [("epsilon", *OUTPUT[1:])]),
        ([("x", TensorProto.DOUBLE, X[2]), T], [("model_output", TensorProto.DOUBLE, X[2])]),
        ([X, ("t", TensorProto.FLOAT, ["batch"])], [OUTPUT]),
        ([X, ("t", TensorProto.INT32, ["batch"])], [OUTPUT]),
        ([("x", TensorProto.FLOAT, ["batch", 3, 8, 8]), T], [("model_output", TensorProto.FLOAT, None)]),
        ([("x", TensorProto.FLOAT, ["batch", 64]), T], [("model_output", TensorProto.FLOAT, None)]),
        ([("x", TensorProto.FLOAT, ["batch", 1, "h", "w"]), T], [("model_output", TensorProto.FLOAT, None)]),
        ([X, ("t", TensorProto.INT64, ["batch", 1])], [OUTPUT]),
        ([X, ("t", TensorProto.INT64, [])], [OUTPUT]),
        ([("x", TensorProto.FLOAT, [2, 1, 8, 8]), ("t", TensorProto.INT64, [2])], [OUTPUT]),
    ],
    ids=[
        "x under another name", "t under another name", "no t", "labels", "output under another name",
        "x float64", "t float32", "t int32", "three channels", "flat x", "x of any height and width",
        "t a column", "t a scalar", "fixed batch",
    ],
)  # fmt: skip
def test_a_model_with_other_inputs_is_refused(inputs, outputs, image_onnx, metadata_of):
    """Before the first sample, not in the middle of drawing."""
    assert "export" in refused(small_graph(inputs, outputs, metadata_of(image_onnx)))


@pytest.mark.parametrize(
    ("dtype", "shape"), [(TensorProto.DOUBLE, OUTPUT[2]), (TensorProto.FLOAT, ["batch", 64])], ids=str
)
def test_a_model_with_another_output_is_refused(dtype, shape, image_onnx, metadata_of):
    metadata = metadata_of(image_onnx)
    if dtype == TensorProto.DOUBLE:
        node = helper.make_node("Cast", ["x"], ["model_output"], to=dtype)
    else:
        node = helper.make_node("Flatten", ["x"], ["model_output"])
    content = small_graph([X, T], [("unused", *X[1:])], metadata, extra=[node])
    proto = onnx.load_from_string(content)
    del proto.graph.node[0]
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("model_output", dtype, shape))
    assert refused(proto.SerializeToString())


def test_a_graph_that_does_not_match_its_metadata_is_refused(
    image_onnx, point_onnx, metadata_of, with_metadata
):
    """The points' metadata on the images' graph."""
    assert "['batch', 2]" in refused(with_metadata(image_onnx, metadata_of(point_onnx)))


def test_a_model_cannot_read_other_files(tmp_path, monkeypatch, image_onnx):
    """Weights outside the file are refused, so an untrusted model cannot read other files."""
    proto = onnx.load_from_string(image_onnx)
    tensor = next(value for value in proto.graph.initializer if value.name == "outward.bias")
    (tmp_path / "secret.bin").write_bytes(onnx.numpy_helper.to_array(tensor).tobytes())
    tensor.ClearField("raw_data")
    del tensor.float_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    assert refused(tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    assert refused("model.onnx")
