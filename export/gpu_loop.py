"""The sampling loop on a GPU, where x stays in GPU memory from the initial noise to the finished sample.

A row of the sampler's table is one launch: the network and the step (`export.step_graph`) are one graph,
which is captured as a CUDA graph for a batch size that is used again. Per row, the host copies to the GPU
only a timestep and eleven coefficients; noise is made there, or for small batches by the host.

Every operation on the device is done by its thread, see `export.device_thread`. Between two rows that thread
serves other requests.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.process.samplers import COEFFICIENTS, SamplerTable
from export.contract import BATCH, LABEL, OUTPUT, TIMESTEP, SamplerSpec, X
from export.device_thread import DeviceThread, device_thread
from export.limits import OutOfMemory, RequestGuard, translate_error
from export.noise import UInt32Array
from export.session import DeviceOptions, open_device_session, open_static_session

Device = Literal["cuda", "cpu"]

# Names of the step's values, which no network has.
STEP = "ray_ddpm.step/"
SAMPLES = (
    "ray_ddpm.samples"  # the symbolic number of samples, of which the network gets twice as many if guided
)
ROW = (*COEFFICIENTS, "e2", "guidance_scale")

_MAX_IDLE_LOOPS = 4
_CALLS_TO_CAPTURE = 3
# Values of a batch from which on a GPU makes its noise itself: fewer are made faster by the host than the
# thousand small kernels are launched.
_VALUES_FOR_DEVICE_NOISE = 2**17
# State that a row reads from one set of buffers and writes to the other.
_STATE = ("x", "x0", "x0_previous")


def step_file(*, labelled: bool) -> Path:
    """Path of the part of an ONNX file that adds the step to a network, for one with or without labels."""
    return Path(__file__).with_name("labelled_step.onnx" if labelled else "step.onnx")


def noise_file() -> Path:
    """Path of the ONNX graph of noise, by operators that ONNX Runtime has on a GPU."""
    return Path(__file__).with_name("noise.onnx")


def with_step(content: bytes, *, labelled: bool) -> bytes:
    """A sampler.onnx with the step behind the network.

    Bytes of protobuf messages that stand one after the other are one message, with the nodes, inputs and
    outputs of both, so this needs no onnx package.
    """
    return content + step_file(labelled=labelled).read_bytes()


def step_inputs(shape: tuple[int, ...]) -> dict[str, NDArray[np.float64]]:
    """Inputs for the step of `with_step`, for a call that wants the network's output alone."""
    state = dict.fromkeys((*(STEP + name for name in _STATE), STEP + "z"), np.zeros((1, *shape)))
    return {**state, STEP + "row": np.zeros(len(ROW))}


def fits_device_loop(spec: SamplerSpec) -> bool:
    """Whether a model's graph has the inputs and outputs of version 1, the only ones that a loop binds."""
    return set(spec.graph_inputs) <= {X, TIMESTEP, LABEL} and set(spec.graph_outputs) == {OUTPUT}


def fits_device_table(table: SamplerTable) -> bool:
    """Whether a loop has every column of a table."""
    return set(table.columns) <= set(ROW) and table.noise_levels is None


class State(NamedTuple):
    """A batch after a row of the table; each is a function that gives float64 [batch, *shape], normalised."""

    x: Callable[[], NDArray[np.float64]]
    x0: Callable[[], NDArray[np.float64]]  # the estimate of the finished samples


@dataclass(frozen=True, eq=False)
class NoiseKeys:
    """By what the noise of a batch is known, see `export.noise.normal_noise`.

    Attributes:
        seeds: uint32 [batch].
        indices: uint32 [batch].
        first_k: k of the noise of row 0.
    """

    seeds: UInt32Array
    indices: UInt32Array
    first_k: int


class DeviceLoop:
    """The sampling loop for one batch size, with its buffers on a device. Used by the device's thread alone.

    Args:
        session: session of `with_step` on the device. If it captures CUDA graphs, it must have been opened
            for this loop alone, since a captured graph contains the addresses of the buffers.
        noise_session: session of `noise_file` on the device, or None.
        device, device_id: device of the buffers, in ONNX Runtime's terms.
        batch_size: number of samples.
        shape: shape of one sample.
        labelled: whether the network has the input y.
        guided: whether each sample also goes through the network without its class.
        captures: whether the session captures CUDA graphs.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        noise_session: onnxruntime.InferenceSession | None,
        device: Device,
        device_id: int,
        batch_size: int,
        shape: tuple[int, ...],
        *,
        labelled: bool,
        guided: bool,
        captures: bool = False,
    ) -> None:
        self._session, self._noise_session = session, noise_session
        self._device, self._device_id, self._captures = device, device_id, captures
        self._guided = guided
        full_shape, network_batch = (batch_size, *shape), batch_size * (1 + guided)
        # Two of each: a row reads one while it writes the other.
        self._state = [{name: self._buffer(full_shape, np.float64) for name in _STATE} for _ in range(2)]
        self._network_input = [self._buffer((network_batch, *shape), np.float32) for _ in range(2)]
        self._out = self._buffer((network_batch, *shape), np.float32)
        self._z = self._buffer(full_shape, np.float64)
        self._row = self._buffer((len(ROW),), np.float64)
        self._t = self._buffer((network_batch,), np.int64)
        self._y = self._buffer((network_batch,), np.int64) if labelled else None
        # One binding per direction: from buffers 0 to 1, and from 1 to 0.
        self._bindings = [self._binding(current) for current in range(2)]
        self._keys: dict[str, Any] = {}
        self._noise_binding = None if noise_session is None else self._bind_noise(batch_size, shape)
        self._current = 0

    @property
    def makes_noise(self) -> bool:
        """Whether the noise of rows is made on the device."""
        return self._noise_binding is not None

    def warm_up(self) -> None:
        """Run a row as many times as ONNX Runtime needs to capture its CUDA graphs."""
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        for _ in range(_CALLS_TO_CAPTURE * len(self._bindings)):
            self._run(options)

    def start(self, x: NDArray[np.float64], labels: NDArray[np.int64] | None, keys: NoiseKeys | None) -> None:
        """Copy a batch to the device.

        Args:
            x: what sampling starts from, float64 [batch, *shape].
            labels: int64 labels for the network's batch, see `export.labels.network_labels`; None for an
                unconditional model.
            keys: of the noise; None if rows are given their noise.
        """
        self._current = 0
        state = self._state[0]
        state["x"].update_inplace(np.ascontiguousarray(x))
        for name in ("x0", "x0_previous"):
            state[name].update_inplace(np.zeros_like(x))
        network_input = np.concatenate([x] * (1 + self._guided)).astype(np.float32)
        self._network_input[0].update_inplace(network_input)
        if self._y is not None:
            self._y.update_inplace(labels)
        if keys is not None:
            self._keys["seeds"].update_inplace(keys.seeds)
            self._keys["indices"].update_inplace(keys.indices)

    def advance(
        self,
        level: int,
        row: NDArray[np.float64],
        z: NDArray[np.float64] | None,
        k: int | None,
        options: onnxruntime.RunOptions,
    ) -> None:
        """Run one row of the table.

        Args:
            level: timestep that the network receives.
            row: the coefficients of `ROW`.
            z: noise, float64 [batch, *shape], or None.
            k: of the noise that the device makes, or None.
            options: options of the request's runs.
        """
        if z is not None:
            self._z.update_inplace(np.ascontiguousarray(z))
        elif k is not None:
            assert self._noise_session is not None
            self._keys["k"].update_inplace(np.array([k], dtype=np.uint32))
            self._noise_session.run_with_iobinding(self._noise_binding, options)
        self._t.update_inplace(np.full(self._t.shape(), level, dtype=np.int64))
        self._row.update_inplace(row)
        self._run(options)

    def fetch(self, name: str) -> NDArray[np.float64]:
        """Copy "x" or "x0" from the device."""
        return self._state[self._current][name].numpy().copy()

    def _run(self, options: onnxruntime.RunOptions) -> None:
        if self._captures:  # a graph for each direction, since it contains the buffers' addresses
            options.add_run_config_entry("gpu_graph_id", str(self._current + 1))
        self._session.run_with_iobinding(self._bindings[self._current], options)
        self._current = 1 - self._current

    def _binding(self, current: int) -> Any:
        other = 1 - current
        inputs = {
            X: self._network_input[current],
            TIMESTEP: self._t,
            **({} if self._y is None else {LABEL: self._y}),
            STEP + "z": self._z,
            STEP + "row": self._row,
            **{STEP + name: value for name, value in self._state[current].items()},
        }
        outputs = {
            OUTPUT: self._out,
            STEP + "network_input": self._network_input[other],
            **{f"{STEP}{name}_next": value for name, value in self._state[other].items()},
        }
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        return binding

    def _bind_noise(self, batch_size: int, shape: tuple[int, ...]) -> Any:
        assert self._noise_session is not None
        num_pairs = int(np.prod(shape)) // 2
        self._keys = {
            "seeds": self._buffer((batch_size,), np.uint32),
            "indices": self._buffer((batch_size,), np.uint32),
            "k": self._buffer((1,), np.uint32),
            "pairs": self._buffer((num_pairs,), np.uint32),
        }
        self._keys["pairs"].update_inplace(np.arange(num_pairs, dtype=np.uint32))
        binding = self._noise_session.io_binding()
        for name, value in self._keys.items():
            binding.bind_ortvalue_input(name, value)
        # The same memory in another shape.
        binding.bind_output(
            "z",
            self._device,
            self._device_id,
            np.float64,
            (batch_size, num_pairs, 2),
            self._z.data_ptr(),
        )
        return binding

    def _buffer(self, shape: tuple[int, ...], dtype: Any) -> Any:
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device, self._device_id)
        value.update_inplace(np.zeros(shape, dtype=dtype))
        return value


_Key = tuple[int, bool]  # batch size, whether it is guided


class DeviceLoopCache:
    """The `DeviceLoop`s of one model, for requests from any thread.

    There are at most two copies of the weights: a session for any batch size, and one for the batch size that
    is captured as CUDA graphs.

    Args:
        content: bytes of `with_step`.
        session: session of it on the device, for any batch size.
        shape: shape of one sample.
        labelled: whether the network has the input y.
        device: "cuda"; "cpu" runs the same loops on the CPU, without CUDA graphs.
        options: which device it is, and how its memory is used.
        device_noise: number of values of a batch from which on the device makes its noise.

    Attributes:
        thread: the device's thread.
        graph_error: reason why CUDA graphs cannot be captured for this model, or None.
        noise_error: reason why the device cannot make noise, or None.
    """

    def __init__(
        self,
        content: bytes,
        session: onnxruntime.InferenceSession,
        shape: tuple[int, ...],
        *,
        labelled: bool,
        device: Device = "cuda",
        options: DeviceOptions | None = None,
        device_noise: int = _VALUES_FOR_DEVICE_NOISE,
    ) -> None:
        self._content, self._session = content, session
        self._shape, self._labelled, self._device = shape, labelled, device
        self._options = options or DeviceOptions()
        self._device_noise = device_noise
        self.graph_error: str | None = None
        self.noise_error: str | None = None
        self.thread: DeviceThread = device_thread(device, self._options.device_id)
        # What follows is read and written by the device's thread alone.
        self._uses: Counter[_Key] = Counter()
        self._idle: OrderedDict[_Key, list[DeviceLoop]] = OrderedDict()
        self._captured: tuple[_Key, DeviceLoop] | None = None
        self._captured_is_free = True
        self._noise_session: onnxruntime.InferenceSession | None = None

    def states(
        self,
        start: NDArray[np.float64],
        table: SamplerTable,
        noise: Callable[[int], NDArray[np.float64]],
        labels: NDArray[np.int64] | None,
        guidance_scale: float,
        guard: RequestGuard,
        keys: NoiseKeys | None = None,
    ) -> Iterator[State]:
        """Turn one batch of noise into samples, yielding after each row of the table.

        Args:
            start: what sampling starts from, float64 [batch, *shape].
            table: the sampler, which `fits_device_table`.
            noise: function from a row index to float64 noise [batch, *shape].
            labels: int64 labels for the network's batch, see `export.labels.network_labels`; None for an
                unconditional model.
            guidance_scale: strength of classifier-free guidance; not used if it does not change anything.
            guard: guard of the request.
            keys: by what the device can make the same noise as `noise`; None if it cannot.

        Yields:
            The state after each row, valid until the next one is asked for.

        Raises:
            InputError, Cancelled, OutOfMemory: as for `RequestGuard.run`.
        """
        guided = labels is not None and len(labels) == 2 * len(start)
        rows = np.column_stack(
            [table.column(name) for name in ROW[:-1]] + [np.full(table.num_rows, guidance_scale)]
        )
        with self._lease((len(start), guided), guard) as loop:
            own_keys = keys if keys is not None and loop.makes_noise else None
            guard.do(loop.start, start, labels, own_keys, on=self.thread)
            levels = zip(table.timesteps.tolist(), rows, table.column("s"), strict=True)
            for index, (level, row, s) in enumerate(levels):
                k = own_keys.first_k + index if s and own_keys is not None else None
                z = noise(index) if s and own_keys is None else None
                guard.do(loop.advance, level, row, z, k, guard.options, on=self.thread)
                yield State(*(self._fetcher(loop, name, guard) for name in ("x", "x0")))

    def num_loops(self) -> int:
        """Number of loops that no request uses."""
        return int(RequestGuard().do(self._num_idle, on=self.thread))

    def _num_idle(self) -> int:
        return sum(map(len, self._idle.values())) + (self._captured is not None and self._captured_is_free)

    def _fetcher(self, loop: DeviceLoop, name: str, guard: RequestGuard) -> Callable[[], NDArray[np.float64]]:
        return lambda: guard.do(loop.fetch, name, on=self.thread)

    @contextmanager
    def _lease(self, key: _Key, guard: RequestGuard) -> Iterator[DeviceLoop]:
        """A loop that no other request uses until the end of the context."""
        future = self.thread.submit(self._take, key)
        try:
            loop: DeviceLoop = guard.wait(future)
        except BaseException:
            # The request is over; the thread may still be building its loop.
            future.add_done_callback(partial(self._give_back_unused, key))
            raise
        try:
            yield loop
        finally:
            self.thread.submit(self._give_back, key, loop)  # after what the request has left undone

    def _take(self, key: _Key) -> DeviceLoop:
        self._uses[key] += 1
        if self._should_capture(key):
            self._capture(key)
        if self._captured is not None and self._captured[0] == key and self._captured_is_free:
            self._captured_is_free = False
            return self._captured[1]
        if self._idle.get(key):
            loop = self._idle[key].pop()
            if not self._idle[key]:
                del self._idle[key]
            return loop
        return self._build(self._session, key)

    def _give_back(self, key: _Key, loop: DeviceLoop) -> None:
        if self._captured is not None and loop is self._captured[1]:
            self._captured_is_free = True
            return
        self._idle.setdefault(key, []).append(loop)
        self._idle.move_to_end(key)
        while sum(map(len, self._idle.values())) > _MAX_IDLE_LOOPS:
            oldest = next(iter(self._idle))
            self._idle[oldest].pop()
            if not self._idle[oldest]:
                del self._idle[oldest]

    def _give_back_unused(self, key: _Key, future: "Future[DeviceLoop]") -> None:
        if not future.cancelled() and future.exception() is None:
            self._give_back(key, future.result())

    def _should_capture(self, key: _Key) -> bool:
        """Whether a size is used again, and more than the one that is captured now."""
        if self.graph_error is not None or self._uses[key] < 2:
            return False
        if self._captured is None:
            return True
        captured = self._captured[0]
        return captured != key and self._captured_is_free and self._uses[key] > 2 * self._uses[captured]

    def _capture(self, key: _Key) -> None:
        batch_size, guided = key
        self._captured = None  # first, so that there never are three copies of the weights
        self._captured_is_free = True
        sizes = {BATCH: batch_size * (1 + guided), SAMPLES: batch_size}
        try:
            session = open_static_session(self._content, sizes, self._device, self._options)
            loop = self._build(session, key, captures=self._device == "cuda")
            loop.warm_up()
        except Exception as error:  # ONNX Runtime has an exception class per status code
            known = isinstance(error, InputError | OutOfMemory)
            self.graph_error = str(error if known else translate_error(error))
        else:
            self._captured = (key, loop)

    def _build(self, session: onnxruntime.InferenceSession, key: _Key, captures: bool = False) -> DeviceLoop:
        batch_size, guided = key
        return DeviceLoop(
            session,
            self._noise_on_device(batch_size),
            self._device,
            self._options.device_id,
            batch_size,
            self._shape,
            labelled=self._labelled,
            guided=guided,
            captures=captures,
        )

    def _noise_on_device(self, batch_size: int) -> onnxruntime.InferenceSession | None:
        """A session of noise, if a batch is worth it; an odd number of values has half a pair at its end."""
        size = int(np.prod(self._shape))
        if size % 2 or batch_size * size < self._device_noise or self.noise_error is not None:
            return None
        if self._noise_session is None:
            try:
                self._noise_session = open_device_session(
                    noise_file().read_bytes(), self._device, self._options, whole=True
                )
            except InputError as error:
                self.noise_error = str(error)
        return self._noise_session
