"""Tests of the GPU loop, run on the CPU with the same graphs, bindings, buffers and thread as on a GPU."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest

from diffusion.errors import InputError
from diffusion.process.samplers import step
from diffusion.registry import SAMPLERS
from export import engine, gpu_loop
from export.contract import OUTPUT, TIMESTEP, X
from export.device_thread import DeviceThread, device_thread
from export.gpu_loop import ROW, STEP, DeviceLoop, DeviceLoopCache, noise_file, step_file, with_step
from export.limits import Cancelled, OutOfMemory, RequestGuard
from export.noise import normal_noise, seed_words
from export.sampler import Sampler
from export.session import DeviceOptions, open_session, open_static_session
from export.step_graph import noise_model, step_part

CPU = ["CPUExecutionProvider"]


@pytest.mark.parametrize("labelled", [False, True])
def test_the_graphs_in_the_repository_are_up_to_date(labelled):
    stored = onnx.ModelProto.FromString(step_file(labelled=labelled).read_bytes())
    assert stored == step_part(labelled=labelled)
    assert onnx.load(noise_file()).graph == noise_model().graph


def identity_network(labelled):
    """A network whose output is its input, and which may have labels."""
    values = {X: ("float32", ["batch", None, None]), TIMESTEP: ("int64", ["batch"])}
    if labelled:
        values["y"] = ("int64", ["batch"])
    types = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    inputs = [onnx.helper.make_tensor_value_info(n, types[d], s) for n, (d, s) in values.items()]
    output = onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, ["batch", None, None])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", [X], [OUTPUT])], "n", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


@pytest.mark.parametrize("guided", [None, False, True])
@pytest.mark.parametrize("clip", [(-1.0, 1.0), (-np.inf, np.inf)])
def test_a_network_with_the_step_computes_a_step_of_the_sampler(guided, clip):
    """Two files one after the other are one model, whose output is the network's and the step's."""
    rng = np.random.default_rng(0)
    labelled = guided is not None
    x, x0, x0_previous, z = (rng.standard_normal((6, 4, 5)) for _ in range(4))
    out = rng.standard_normal((12 if guided else 6, 4, 5)).astype(np.float32)
    row = np.concatenate([rng.standard_normal(7), clip, [0.7, 3.0]])
    content = with_step(identity_network(labelled), labelled=labelled)
    onnx.checker.check_model(onnx.load_from_string(identity_network(labelled)))
    session = onnxruntime.InferenceSession(content, providers=CPU)
    feeds = {X: out, TIMESTEP: np.zeros(len(out), dtype=np.int64)} | (
        {"y": np.zeros(len(out), dtype=np.int64)} if labelled else {}
    )
    state = {"x": x, "x0": x0, "x0_previous": x0_previous, "z": z, "row": row}
    names = [STEP + name for name in ("x_next", "x0_next", "x0_previous_next", "network_input")]
    results = session.run(names, feeds | {STEP + name: value for name, value in state.items()})
    output = out.astype(np.float64)
    if guided:
        output = output[:6] + 3.0 * (output[6:] - output[:6])
    expected_x, expected_x0 = step(row[:-1], x, output, x0, z, columns=ROW[:-1], x0_previous_2=x0_previous)
    np.testing.assert_allclose(results[0], expected_x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(results[1], expected_x0, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(results[2], x0)
    np.testing.assert_array_equal(results[3], np.concatenate([results[0]] * (1 + bool(guided))).astype("f4"))


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (4, 3, 5)])
def test_a_device_makes_the_noise_of_numpy(shape):
    """By operators that ONNX Runtime has for CUDA: none that works on bits."""
    model = onnx.load(noise_file())
    used = {node.op_type for node in model.graph.node}
    assert used <= {
        "Add", "Sub", "Mul", "Div", "Gather", "Cast", "Unsqueeze", "Concat", "Log", "Sqrt", "Cos", "Sin",
        "Identity",
    }  # fmt: skip
    session = onnxruntime.InferenceSession(noise_file(), providers=CPU)
    pairs = int(np.prod(shape)) // 2
    for seeds, k in (([7] * 3, 0), ([0, 2**32 - 1, 5], 1), ([9] * 3, 2**31 + 7)):
        indices = np.array([0, 5, 2**32 - 1], dtype=np.uint32)
        feeds = {
            "seeds": seed_words(seeds),
            "indices": indices,
            "k": np.array([k], dtype=np.uint32),
            "pairs": np.arange(pairs, dtype=np.uint32),
        }
        (actual,) = session.run(["z"], feeds)
        expected = normal_noise(seed_words(seeds), indices, k, shape)
        np.testing.assert_allclose(actual.reshape(3, *shape), expected, rtol=0, atol=1e-13)


def on_device(content, monkeypatch, device_noise=1, threads=1):
    """A sampler whose loop is that of a GPU, on the CPU."""
    sampler = Sampler(content, provider="cpu", threads=threads)
    spec, labelled = sampler.spec, bool(sampler.spec.classes)
    file = with_step(content, labelled=labelled)
    session, _ = open_session(file, "cpu", 1)
    loops = DeviceLoopCache(
        file, session, spec.shape, labelled=labelled, device="cpu", device_noise=device_noise
    )
    sampler._engine._gpu_loops = loops
    return sampler, loops


@pytest.mark.parametrize("kind", ["image", "point"])
@pytest.mark.parametrize("device_noise", [1, 10**9])
def test_samples_equal_those_of_the_numpy_loop(kind, device_noise, request, monkeypatch):
    """In every sampler, with the noise of the host or the device, and with a batch that is not full."""
    content = request.getfixturevalue(f"{kind}_onnx")
    expected_of, (sampler, loops) = Sampler(content, "cpu"), on_device(content, monkeypatch, device_noise)
    made = []
    real = DeviceLoop.advance
    monkeypatch.setattr(
        DeviceLoop,
        "advance",
        lambda self, *rest: made.append((rest[2] is not None, rest[3])) or real(self, *rest),
    )
    for name in SAMPLERS if device_noise > 1 else ["ddpm"]:
        choices = {"sampler": name, "num_steps": 6, "spacing": "karras"}
        if SAMPLERS[name].uses_eta:
            choices["eta"] = 1.0
        expected = expected_of.sample(5, seed=3, batch_size=3, **choices)
        for _ in range(2):  # from the second time on, for a fixed batch size and with used buffers
            actual = sampler.sample(5, seed=3, batch_size=3, **choices)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * expected.std())
    assert loops.graph_error is None and loops.noise_error is None
    assert any(k is not None for _, k in made) == (device_noise == 1)
    assert any(host for host, _ in made) == (device_noise != 1)


def test_seeds_starts_and_previews_are_those_of_the_numpy_loop(image_onnx, image_sampler, monkeypatch):
    sampler, _ = on_device(image_onnx, monkeypatch)
    for choices in (
        {"seeds": [3, 9]},
        {"first_index": 7},
        {"start_from": np.full((1, 8, 8), 4.0), "strength": 0.5},
    ):
        previews = [[], []]
        drawn = [
            each.sample(2, on_preview=found.append, **choices)
            for each, found in zip((image_sampler, sampler), previews, strict=True)
        ]
        np.testing.assert_allclose(drawn[1], drawn[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(previews[1], previews[0], rtol=0, atol=1e-4)


def test_a_known_part_and_single_calls_run_on_the_host_with_the_same_session(
    image_onnx, image_sampler, monkeypatch
):
    sampler, loops = on_device(image_onnx, monkeypatch)
    more = gpu_loop.step_inputs(sampler.spec.shape)
    sampler._engine._network = engine.NetworkSession(loops._session, loops.thread, more)
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8))
    np.testing.assert_allclose(sampler.denoise(x, 4), image_sampler.denoise(x, 4), rtol=1e-5, atol=1e-5)
    known = np.full((1, 8, 8), 5.0)
    mask = np.ones((8, 8), dtype=bool)
    mask[:4] = False
    choices = {"known": known, "mask": mask}
    np.testing.assert_allclose(sampler.sample(2, **choices), image_sampler.sample(2, **choices), atol=1e-4)


def counted_sessions(monkeypatch):
    opened, real = [], open_static_session
    monkeypatch.setattr(
        gpu_loop, "open_static_session", lambda *inputs: opened.append(inputs[1]) or real(*inputs)
    )
    return opened


def test_only_one_batch_size_is_captured_at_a_time(image_onnx, monkeypatch):
    """So that there are two copies of the weights: for any size, and for the size that is used most."""
    opened = counted_sessions(monkeypatch)
    sampler, loops = on_device(image_onnx, monkeypatch)
    sampler.sample(3, num_steps=2)
    assert opened == []
    sampler.sample(3, num_steps=2)
    assert opened == [{"batch": 3, "ray_ddpm.samples": 3}]
    for _ in range(4):
        sampler.sample(4, num_steps=2)
    assert len(opened) == 1, "not yet used more than twice as often"
    sampler.sample(4, num_steps=2)
    assert opened[1:] == [{"batch": 4, "ray_ddpm.samples": 4}]
    for size in range(10, 20):
        sampler.sample(size, num_steps=2)
    assert loops.num_loops() <= 5, "the cache is limited"


def test_a_session_that_cannot_be_captured_is_not_used(image_onnx, image_sampler, monkeypatch):
    monkeypatch.setattr(gpu_loop, "open_static_session", open_wrong_size)
    sampler, loops = on_device(image_onnx, monkeypatch)
    for _ in range(3):
        np.testing.assert_allclose(sampler.sample(4), image_sampler.sample(4), rtol=0, atol=1e-4)
    assert "run" in loops.graph_error
    assert "without CUDA graphs, since" in sampler.runs_on


def open_wrong_size(content, sizes, *rest):
    return open_static_session(content, {"batch": 9, "ray_ddpm.samples": 9}, *rest)


def test_everything_on_a_device_is_done_by_its_thread(image_onnx, image_sampler, monkeypatch):
    """Also what requests of several threads want, of several samplers, and streams that are closed."""
    threads = set()
    for name in ("__init__", "start", "advance", "fetch"):
        real = getattr(DeviceLoop, name)
        monkeypatch.setattr(
            DeviceLoop,
            name,
            lambda self, *rest, real=real, **options: (
                threads.add(threading.get_ident()) or real(self, *rest, **options)
            ),
        )
    samplers = [on_device(image_onnx, monkeypatch)[0] for _ in range(2)]
    expected = [image_sampler.sample(3, seed=seed, batch_size=2) for seed in range(6)]

    def draw(seed):
        sampler = samplers[seed % 2]
        stream = sampler.stream(3, seed=seed)
        next(stream)
        inside = sampler.sample(3, seed=seed, batch_size=2)
        stream.close()
        return inside

    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(draw, range(6)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert device_thread("cpu", 0) is device_thread("cpu", 0) is not device_thread("cpu", 1)


@pytest.mark.parametrize("end", ["time_limit", "stop"])
def test_a_request_ends_on_time_while_another_holds_the_device(image_onnx, monkeypatch, end):
    """And the sampler can be used afterwards."""
    sampler, loops = on_device(image_onnx, monkeypatch)
    expected = sampler.sample(2)
    free = threading.Event()
    held = loops.thread.submit(free.wait, 60.0)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    try:
        with pytest.raises(InputError if end == "time_limit" else Cancelled):
            sampler.sample(2, **({"time_limit": 0.2} if end == "time_limit" else {"stop": stop}))
        assert time.monotonic() - started < 5.0, "long before the device is free"
    finally:
        free.set()
    assert held.result()
    np.testing.assert_allclose(sampler.sample(2), expected, rtol=0, atol=1e-4)


def test_a_request_shares_the_device_row_by_row(image_onnx, monkeypatch):
    """A short request does not wait for the end of a long one."""
    sampler, _ = on_device(image_onnx, monkeypatch)
    stream = sampler.stream(2, num_steps=20)
    assert next(stream).rows_done == 1
    sampler.sample(1, num_steps=2, time_limit=60.0)
    assert next(stream).rows_done == 2
    stream.close()


@pytest.mark.parametrize("failing", ["start", "advance", "fetch"])
@pytest.mark.parametrize(
    ("message", "halved"),
    [
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", True),
        ("CUDNN failure 4: CUDNN_STATUS_INTERNAL_ERROR ; GPU=0", True),
        ("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUDA failure 2: out of memory ; GPU=0", True),
        ("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 5", True),
        ("CUDA failure 719: unspecified launch failure\nat line 3 of the room", False),
    ],
)
def test_every_failure_of_the_runtime_is_an_error_of_ours(image_onnx, monkeypatch, failing, message, halved):
    """Copies as well. A lack of memory halves the batch."""
    sampler, _ = on_device(image_onnx, monkeypatch)
    real, sizes = getattr(DeviceLoop, failing), []

    def fails(self, *rest):
        size = self._z.shape()[0]
        sizes.append(size)
        if size > 2:
            raise RuntimeError(message)
        return real(self, *rest)

    monkeypatch.setattr(DeviceLoop, failing, fails)
    if halved:
        assert sampler.sample(4, num_steps=2).shape == (4, 1, 8, 8)
        assert set(sizes) == {4, 2}
    else:
        with pytest.raises(InputError) as caught:
            sampler.sample(4, num_steps=2)
        assert "unspecified launch failure" in str(caught.value) and "room" not in str(caught.value)


def test_buffers_that_do_not_fit_raise_out_of_memory(image_onnx, monkeypatch):
    _, loops = on_device(image_onnx, monkeypatch)
    with pytest.raises(OutOfMemory), loops._lease((2**45, False), RequestGuard()):
        pass


def test_waiting_for_the_thread_gives_its_errors():
    thread, guard = DeviceThread("test"), RequestGuard()
    with pytest.raises(OutOfMemory):
        guard.do(np.empty, 2**50, on=thread)
    with pytest.raises(InputError, match="cannot run the model: division"):
        guard.do(lambda: 1 / 0, on=thread)
    assert guard.do(max, 1, 2, on=thread) == 2


def test_the_options_of_a_gpu_reach_its_provider():
    own = DeviceOptions().of_cuda()
    assert (own["use_tf32"], own["cudnn_conv_algo_search"], own["device_id"]) == ("0", "HEURISTIC", "0")
    assert "gpu_mem_limit" not in own and own["enable_cuda_graph"] == "0"
    other = DeviceOptions(2, 10**9, "kNextPowerOfTwo", True).of_cuda(captures=True)
    expected = {
        "device_id": "2", "gpu_mem_limit": "1000000000", "arena_extend_strategy": "kNextPowerOfTwo",
        "use_tf32": "1", "enable_cuda_graph": "1",
    }  # fmt: skip
    assert other | expected == other
    for bad in ({"device_id": -1}, {"device_id": 1.5}, {"memory_limit": 0}, {"arena": "none"}):
        with pytest.raises(InputError):
            DeviceOptions(**bad)
