"""The loop that keeps x on a device, here on the CPU: the same graphs, bindings and buffers as on a GPU."""

from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest

from diffusion.sampling import step
from export import cuda_loops
from export.cuda_loops import CudaLoops
from export.device_loop import step_file
from export.limits import OutOfMemory, Watch
from export.noise import normal_noise
from export.sampler import Sampler
from export.session import open_session, open_static_session
from export.step_graph import step_model

CPU = ["CPUExecutionProvider"]


@pytest.mark.parametrize("guided", [False, True])
def test_the_graphs_in_the_repository_are_those_that_the_module_writes(guided):
    found = onnx.load(step_file(guided=guided))
    assert found.graph == step_model(guided=guided).graph


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape", [(2,), (3, 4, 5)])
@pytest.mark.parametrize("clip", [(-1.0, 1.0), (-np.inf, np.inf)])
def test_a_step_is_that_of_the_sampler(guided, shape, clip):
    rng = np.random.default_rng(0)
    x, previous, z = (rng.standard_normal((6, *shape)) for _ in range(3))
    out = rng.standard_normal((12 if guided else 6, *shape)).astype(np.float32)
    row = np.append(rng.standard_normal(7), [*clip, 3.0])
    session = onnxruntime.InferenceSession(step_file(guided=guided), providers=CPU)
    inputs = {"x": x, "out": out, "x0_previous": previous, "z": z, "row": row}
    x_next, x0, network_input = session.run(["x_next", "x0", "network_input"], inputs)
    used = out.astype(np.float64)
    if guided:
        used = used[:6] + 3.0 * (used[6:] - used[:6])
    expected_x, expected_x0 = step(row[:9], x, used, previous, z)
    np.testing.assert_allclose(x_next, expected_x, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(x0, expected_x0, rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(network_input, np.concatenate([x_next] * (1 + guided)).astype(np.float32))


def loops_of(content, labelled=False):
    session, _ = open_session(content, "cpu")
    spec = Sampler(content, provider="cpu").spec
    return CudaLoops(content, session, spec.shape, labelled=labelled, device="cpu"), spec


def drawn(loop, spec, table, batch, seed=3, labels=None, scale=1.0, after_row=lambda x0: None):
    indices = np.arange(batch)

    def noise(row):
        return normal_noise(seed, indices, row + 1, spec.shape)

    return spec.denormalise(loop.run(noise(-1), table, noise, labels, scale, Watch(), after_row))


@pytest.mark.parametrize(
    "choices", [{}, {"sampler": "ddpm"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "dpmpp_2m"}], ids=str
)
@pytest.mark.parametrize("kind", ["image", "points"])
def test_its_samples_are_those_of_the_numpy_loop(kind, choices, request):
    content = request.getfixturevalue("image_onnx" if kind == "image" else "point_onnx")
    sampler = Sampler(content, provider="cpu")
    loops, spec = loops_of(content)
    expected = sampler.sample(5, seed=3, **choices)
    for _ in range(3):  # the second and third time by the session of a fixed batch, from used buffers
        found = drawn(loops.loop(5, guided=False), spec, sampler.table(**choices), 5)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.std())


def test_previews_are_those_of_the_numpy_loop(image_onnx, image_sampler):
    expected, found = [], []
    image_sampler.sample(2, seed=3, on_preview=expected.append)
    loops, spec = loops_of(image_onnx)
    drawn(
        loops.loop(2, guided=False),
        spec,
        image_sampler.table(),
        2,
        after_row=lambda x0: found.append(spec.denormalise(x0().copy())),
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_size_asked_for_again_gets_a_session_of_its_own(image_onnx, monkeypatch):
    opened = []
    real = cuda_loops.open_static_session
    monkeypatch.setattr(
        cuda_loops, "open_static_session", lambda *arguments: opened.append(arguments[1:]) or real(*arguments)
    )
    loops, _ = loops_of(image_onnx)
    first = loops.loop(3, guided=False)
    assert opened == []
    second = loops.loop(3, guided=False)
    assert opened == [(3, "cpu")]
    assert second is not first
    assert loops.loop(3, guided=False) is second
    loops.loop(3, guided=True)
    loops.loop(3, guided=True)
    assert opened == [(3, "cpu"), (6, "cpu")]
    for batch in range(10, 20):  # and no more than a few are kept
        loops.loop(batch, guided=False)
    assert len(loops._kept) == 4
    assert loops.loop(3, guided=False) is not second


def test_a_denoiser_that_cannot_be_captured_is_run_without(image_onnx, image_sampler, monkeypatch):
    monkeypatch.setattr(cuda_loops, "open_static_session", partial(open_broken, image_onnx))
    loops, spec = loops_of(image_onnx)
    assert loops.why_no_graphs is None
    for _ in range(3):
        found = drawn(loops.loop(4, guided=False), spec, image_sampler.table(), 4)
        np.testing.assert_allclose(found, image_sampler.sample(4, seed=3), rtol=0, atol=1e-4)
    assert "run" in loops.why_no_graphs


def open_broken(content, *_):
    """The batch is fixed to a size that the buffers do not have."""
    return open_static_session(content, 9, "cpu")


def test_buffers_that_do_not_fit_are_out_of_memory(image_onnx):
    loops, _ = loops_of(image_onnx)
    with pytest.raises(OutOfMemory):
        loops.loop(2**45, guided=False)
