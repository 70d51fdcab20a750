"""Tests of the GPU loop, run on the CPU with the same graphs, bindings and buffers as on a GPU."""

from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest

from diffusion.process.samplers import step
from export import gpu_loop
from export.gpu_loop import DeviceLoopCache, step_file
from export.limits import OutOfMemory, RequestGuard
from export.noise import normal_noise
from export.sampler import Sampler
from export.session import open_session, open_static_session
from export.step_graph import step_model

CPU = ["CPUExecutionProvider"]


@pytest.mark.parametrize("guided", [False, True])
def test_the_graphs_in_the_repository_are_up_to_date(guided):
    stored = onnx.load(step_file(guided=guided))
    assert stored.graph == step_model(guided=guided).graph


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape", [(2,), (3, 4, 5)])
@pytest.mark.parametrize("clip", [(-1.0, 1.0), (-np.inf, np.inf)])
def test_the_graph_computes_a_step_of_the_sampler(guided, shape, clip):
    rng = np.random.default_rng(0)
    x, previous, z = (rng.standard_normal((6, *shape)) for _ in range(3))
    out = rng.standard_normal((12 if guided else 6, *shape)).astype(np.float32)
    row = np.append(rng.standard_normal(7), [*clip, 3.0])
    session = onnxruntime.InferenceSession(step_file(guided=guided), providers=CPU)
    inputs = {"x": x, "out": out, "x0_previous": previous, "z": z, "row": row}
    x_next, x0, network_input = session.run(["x_next", "x0", "network_input"], inputs)
    output = out.astype(np.float64)
    if guided:
        output = output[:6] + 3.0 * (output[6:] - output[:6])
    expected_x, expected_x0 = step(row[:9], x, output, previous, z)
    np.testing.assert_allclose(x_next, expected_x, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(x0, expected_x0, rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(network_input, np.concatenate([x_next] * (1 + guided)).astype(np.float32))


def make_loops(content, labelled=False):
    session, _ = open_session(content, "cpu")
    spec = Sampler(content, provider="cpu").spec
    return DeviceLoopCache(content, session, spec.shape, labelled=labelled, device="cpu"), spec


def draw(loop, spec, table, batch_size, seed=3, labels=None, scale=1.0, after_row=lambda x0: None):
    indices = np.arange(batch_size)

    def noise(row):
        return normal_noise(seed, indices, row + 1, spec.shape)

    for state in loop.states(noise(-1), table, noise, labels, scale, RequestGuard()):
        after_row(state.x0)
    return spec.denormalise(state.x())


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"sampler": "ddpm"},
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "dpmpp_2m"},
        {"sampler": "dpmpp_2m_sde", "spacing": "karras"},
        {"sampler": "heun_churn", "num_steps": 6, "eta": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["image", "points"])
def test_samples_equal_those_of_the_numpy_loop(kind, choices, request):
    content = request.getfixturevalue("image_onnx" if kind == "image" else "point_onnx")
    sampler = Sampler(content, provider="cpu")
    loops, spec = make_loops(content)
    expected = sampler.sample(5, seed=3, **choices)
    for _ in range(3):  # from the second time on, with a session for a fixed batch size and used buffers
        actual = draw(loops.loop(5, guided=False), spec, sampler.table(**choices), 5)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())


def test_previews_equal_those_of_the_numpy_loop(image_onnx, image_sampler):
    expected, actual = [], []
    image_sampler.sample(2, seed=3, on_preview=expected.append)
    loops, spec = make_loops(image_onnx)
    draw(
        loops.loop(2, guided=False),
        spec,
        image_sampler.table(),
        2,
        after_row=lambda x0: actual.append(spec.denormalise(x0().copy())),
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_a_batch_size_used_again_gets_its_own_session(image_onnx, monkeypatch):
    opened = []
    open_real = gpu_loop.open_static_session
    monkeypatch.setattr(
        gpu_loop,
        "open_static_session",
        lambda *arguments: opened.append(arguments[1:]) or open_real(*arguments),
    )
    loops, _ = make_loops(image_onnx)
    first = loops.loop(3, guided=False)
    assert opened == []
    second = loops.loop(3, guided=False)
    assert opened == [(3, "cpu")]
    assert second is not first
    assert loops.loop(3, guided=False) is second
    loops.loop(3, guided=True)
    loops.loop(3, guided=True)
    assert opened == [(3, "cpu"), (6, "cpu")]
    for batch_size in range(10, 20):  # the cache is limited
        loops.loop(batch_size, guided=False)
    assert len(loops) == 4
    assert loops.loop(3, guided=False) is not second


def test_a_denoiser_that_cannot_be_captured_runs_without_graphs(image_onnx, image_sampler, monkeypatch):
    monkeypatch.setattr(gpu_loop, "open_static_session", partial(open_broken, image_onnx))
    loops, spec = make_loops(image_onnx)
    assert loops.graph_error is None
    for _ in range(3):
        actual = draw(loops.loop(4, guided=False), spec, image_sampler.table(), 4)
        np.testing.assert_allclose(actual, image_sampler.sample(4, seed=3), rtol=0, atol=1e-4)
    assert "run" in loops.graph_error


def open_broken(content, *_):
    """Open a session for a batch size that differs from the buffers'."""
    return open_static_session(content, 9, "cpu")


def test_buffers_that_do_not_fit_raise_out_of_memory(image_onnx):
    loops, _ = make_loops(image_onnx)
    with pytest.raises(OutOfMemory):
        loops.loop(2**45, guided=False)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m"])
def test_a_start_from_given_samples_runs_in_the_loop(image_onnx, image_sampler, name, monkeypatch):
    """The rows that are left and their noise are the loop's own; known parts need the loop on the host."""
    images = np.random.default_rng(0).uniform(0.0, 16.0, (3, 1, 8, 8))
    choices = {"sampler": name, "num_steps": 10, "start_from": images, "strength": 0.5}
    expected = image_sampler.sample(3, **choices)
    own = Sampler(image_onnx, provider="cpu")
    own._engine._gpu_loops, _ = make_loops(image_onnx)
    calls = []
    states = gpu_loop.DeviceLoop.states
    monkeypatch.setattr(
        gpu_loop.DeviceLoop, "states", lambda *given: calls.append(given[2].num_rows) or states(*given)
    )
    np.testing.assert_allclose(own.sample(3, **choices), expected, rtol=0, atol=1e-5 * expected.std())
    assert calls == [5]
    inpainting = choices | {"known": images, "mask": np.eye(8), "resampling": 2}
    np.testing.assert_array_equal(own.sample(3, **inpainting), image_sampler.sample(3, **inpainting))
    assert calls == [5]


def test_a_table_of_order_3_runs_in_the_loop_on_the_host(image_onnx, image_sampler, monkeypatch):
    """The step's graph does not have x0_previous_2."""
    own = Sampler(image_onnx, provider="cpu")
    own._engine._gpu_loops, _ = make_loops(image_onnx)
    monkeypatch.setattr(gpu_loop.DeviceLoop, "states", lambda *_: pytest.fail("it ran on the device"))
    choices = {"sampler": "dpmpp_3m", "num_steps": 10}
    assert "e2" in own.table(**choices).columns
    np.testing.assert_array_equal(own.sample(3, **choices), image_sampler.sample(3, **choices))
