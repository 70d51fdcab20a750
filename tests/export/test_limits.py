"""Requests end on a time limit or cancellation, and use smaller batches when memory is short."""

import threading
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from diffusion.errors import InputError
from export.limits import WATCHER_THREAD, Cancelled, OutOfMemory, RequestGuard
from export.sampler import Sampler


def test_a_call_that_never_ends_is_ended_by_the_time_limit(endless):
    sampler, started = Sampler(endless, provider="cpu"), time.monotonic()
    with pytest.raises(InputError, match=r"time_limit 0\.5"):
        sampler.sample(1, time_limit=0.5)
    assert time.monotonic() - started < 30.0


def test_a_call_that_never_ends_can_be_cancelled_from_another_thread(endless):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Cancelled):
        Sampler(endless, provider="cpu").sample(1, stop=stop)


def test_a_request_is_cancelled_between_two_calls(image_sampler):
    """And the sampler can be used again."""
    stop, calls = threading.Event(), []

    def on_row(done, total):
        calls.append(done)
        if done == 3:
            stop.set()

    expected = image_sampler.sample(2)
    with pytest.raises(Cancelled):
        image_sampler.sample(2, stop=stop, on_row=on_row)
    assert calls == [1, 2, 3]
    np.testing.assert_array_equal(image_sampler.sample(2), expected)


def test_a_request_within_its_limit_is_not_affected(image_sampler):
    actual = image_sampler.sample(2, time_limit=600.0, stop=threading.Event())
    np.testing.assert_array_equal(actual, image_sampler.sample(2))
    assert not [thread for thread in threading.enumerate() if thread.name == WATCHER_THREAD]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_not_positive_is_refused(image_sampler, seconds):
    with pytest.raises(InputError, match="time_limit"):
        image_sampler.sample(1, time_limit=seconds)


def test_a_batch_that_does_not_fit_is_halved(image_onnx, monkeypatch):
    """Again and again, until it fits; samples and progress are those of the smaller batches."""
    sampler, sizes, progress = Sampler(image_onnx, provider="cpu"), [], []
    run_session = onnxruntime.InferenceSession.run
    max_batch_size = 3

    def run(session, names, inputs, options):
        sizes.append(len(inputs["x"]))
        if len(inputs["x"]) > max_batch_size:
            raise RuntimeError("bfc_arena.cc: Failed to allocate memory for requested buffer of size 99")
        return run_session(session, names, inputs, options)

    expected = sampler.sample(10, seed=2, batch_size=3)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)
    actual = sampler.sample(
        10, seed=2, batch_size=8, on_row=lambda done, total: progress.append((done, total))
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())
    assert sizes[:3] == [8, 4, 2] and set(sizes[2:]) == {2}
    assert progress == [(done, 50) for done in range(1, 51)]

    max_batch_size = 0
    with pytest.raises(InputError, match="one sample does not fit into memory"):
        sampler.sample(2)


def raise_memory_error(_options):
    raise MemoryError


def test_an_error_of_onnx_runtime_becomes_one_line():
    def call(options):
        raise RuntimeError("first line\nsecond line")

    with pytest.raises(InputError) as caught:
        RequestGuard().run(call)
    assert "first line" in str(caught.value) and "second" not in str(caught.value)
    with pytest.raises(OutOfMemory):
        RequestGuard().run(raise_memory_error)


def test_samples_that_are_not_finite_are_refused(image_onnx):
    proto = onnx.load_from_string(image_onnx)
    for tensor in proto.graph.initializer:
        if tensor.name == "outward.bias":
            broken = np.full(list(tensor.dims), np.nan, dtype=np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(broken, tensor.name))
    with pytest.raises(InputError, match="not finite"):
        Sampler(proto.SerializeToString(), provider="cpu").sample(2)


def test_an_output_of_another_shape_than_declared_is_refused(image_onnx, metadata_of, with_metadata):
    """ONNX Runtime only warns about it, and numpy would broadcast it."""
    nodes = [
        helper.make_node("Cast", ["t"], ["t_float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axis"], ["model_output"], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "narrow",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8]),
            helper.make_tensor_value_info("t", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("axis", TensorProto.INT64, [1]),
        ][:2],
        [helper.make_tensor_value_info("model_output", TensorProto.FLOAT, ["batch", 1, "h", 8])],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(InputError, match="shape|inputs and outputs"):
        Sampler(with_metadata(model.SerializeToString(), metadata_of(image_onnx)), provider="cpu").sample(2)
