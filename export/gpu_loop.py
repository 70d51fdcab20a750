"""The sampling loop on a GPU, where x stays in GPU memory from the initial noise to the finished sample.

Each row of the sampler's table runs two graphs on bound buffers: the denoiser, and one sampling step (see
`export.step_graph`). Per row, the host copies to the GPU only a timestep, ten coefficients and, if the row
needs it, noise.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.process.samplers import COEFFICIENTS, SamplerTable
from export.contract import LABEL, OUTPUT, TIMESTEP, SamplerSpec, X
from export.limits import OutOfMemory, RequestGuard, translate_error
from export.session import open_session, open_static_session

Device = Literal["cuda", "cpu"]

_MAX_LOOPS = 4
_CALLS_TO_CAPTURE = 3


def step_file(*, guided: bool) -> Path:
    """Path of the ONNX graph of one sampling step, without or with guidance."""
    return Path(__file__).with_name("guided_step.onnx" if guided else "step.onnx")


def fits_device_loop(spec: SamplerSpec) -> bool:
    """Whether a model's graph has the inputs and outputs of version 1, the only ones that a loop binds."""
    return set(spec.graph_inputs) <= {X, TIMESTEP, LABEL} and set(spec.graph_outputs) == {OUTPUT}


class State(NamedTuple):
    """A batch after a row of the table; each is a function that gives float64 [batch, *shape], normalised."""

    x: Callable[[], NDArray[np.float64]]
    x0: Callable[[], NDArray[np.float64]]  # the estimate of the finished samples


class DeviceLoop:
    """The sampling loop for one batch size, with its buffers on a device. Runs one request at a time.

    Args:
        denoiser: session of the network on the device. If it captures CUDA graphs, it must have been
            opened for this loop alone, since a captured graph contains the addresses of the buffers.
        step: session of `step_file` on the device.
        device: device of the buffers, in ONNX Runtime's terms.
        batch_size: number of samples.
        shape: shape of one sample.
        labelled: whether the denoiser has the input y.
        guided: whether each sample also goes through the network without its class.
    """

    def __init__(
        self,
        denoiser: onnxruntime.InferenceSession,
        step: onnxruntime.InferenceSession,
        device: Device,
        batch_size: int,
        shape: tuple[int, ...],
        *,
        labelled: bool,
        guided: bool,
    ) -> None:
        self._denoiser, self._step, self._device = denoiser, step, device
        self._guided = guided
        self._lock = threading.Lock()
        full_shape, network_batch = (batch_size, *shape), batch_size * (1 + guided)
        # Two of each: a step reads one while it writes the other.
        self._x = [self._buffer(full_shape, np.float64) for _ in range(2)]
        self._x0 = [self._buffer(full_shape, np.float64) for _ in range(2)]
        self._z = self._buffer(full_shape, np.float64)
        self._row = self._buffer((len(COEFFICIENTS) + 1,), np.float64)
        self._network_input = self._buffer((network_batch, *shape), np.float32)
        self._out = self._buffer((network_batch, *shape), np.float32)
        self._t = self._buffer((network_batch,), np.int64)
        self._y = self._buffer((network_batch,), np.int64) if labelled else None
        inputs = {X: self._network_input, TIMESTEP: self._t}
        self._denoiser_binding = _bind(
            denoiser, inputs | ({LABEL: self._y} if labelled else {}), {OUTPUT: self._out}
        )
        # One binding per direction: from buffer 0 to 1, and from 1 to 0.
        self._step_bindings = [
            _bind(
                step,
                {
                    "x": self._x[current],
                    "out": self._out,
                    "x0_previous": self._x0[current],
                    "z": self._z,
                    "row": self._row,
                },
                {
                    "x_next": self._x[1 - current],
                    "x0": self._x0[1 - current],
                    "network_input": self._network_input,
                },
            )
            for current in range(2)
        ]

    def warm_up(self) -> None:
        """Call the denoiser as many times as ONNX Runtime needs to capture a CUDA graph.

        Raises:
            InputError: the denoiser cannot be run or captured.
            OutOfMemory: the batch does not fit into memory.
        """
        with self._lock:
            for _ in range(_CALLS_TO_CAPTURE):
                RequestGuard().run(self._denoiser.run_with_iobinding, self._denoiser_binding)

    def states(
        self,
        start: NDArray[np.float64],
        table: SamplerTable,
        noise: Callable[[int], NDArray[np.float64]],
        labels: NDArray[np.int64] | None,
        guidance_scale: float,
        guard: RequestGuard,
    ) -> Iterator[State]:
        """Turn one batch of noise into samples, yielding after each row of the table.

        Args:
            start: initial noise, float64 [batch, *shape].
            table: the sampler, with the columns of `COEFFICIENTS`.
            noise: function from a row index to float64 noise [batch, *shape].
            labels: int64 labels for the network's batch, see `export.labels.network_labels`; None for an
                unconditional model.
            guidance_scale: strength of classifier-free guidance; used by a guided loop only.
            guard: guard of the request.

        Yields:
            The state after each row, valid until the next one is asked for.

        Raises:
            InputError, Cancelled, OutOfMemory: as for `RequestGuard.run`.
        """
        with self._lock:
            self._x[0].update_inplace(start)
            self._x0[0].update_inplace(np.zeros_like(start))
            network_input = np.concatenate([start] * (1 + self._guided))
            self._network_input.update_inplace(network_input.astype(np.float32))
            if self._y is not None:
                self._y.update_inplace(labels)
            current = 0
            rows = zip(table.timesteps, table.coefficients, table.column("s"), strict=True)
            for index, (timestep, row, s) in enumerate(rows):
                if s:
                    self._z.update_inplace(noise(index))
                self._t.update_inplace(np.full(self._t.shape(), timestep, dtype=np.int64))
                self._row.update_inplace(np.append(row, guidance_scale))
                guard.run(self._denoiser.run_with_iobinding, self._denoiser_binding)
                guard.run(self._step.run_with_iobinding, self._step_bindings[current])
                current = 1 - current
                yield State(self._x[current].numpy, self._x0[current].numpy)

    def _buffer(self, shape: tuple[int, ...], dtype: Any) -> Any:
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device, 0)
        value.update_inplace(np.zeros(shape, dtype=dtype))
        return value


@dataclass(frozen=True)
class _CachedLoop:
    loop: DeviceLoop
    captured: bool  # whether it has a session of its own, which captures CUDA graphs


class DeviceLoopCache:
    """The most recently used `DeviceLoop`s of one denoiser. May be used from several threads.

    Args:
        content: bytes of the ONNX file, from which sessions for a fixed batch size are opened.
        session: session of that file for any batch size.
        shape: shape of one sample.
        labelled: whether the denoiser has the input y.
        device: "cuda"; "cpu" runs the same loops on the CPU, without CUDA graphs.

    Attributes:
        graph_error: reason why CUDA graphs cannot be captured for this denoiser, or None.
    """

    def __init__(
        self,
        content: bytes,
        session: onnxruntime.InferenceSession,
        shape: tuple[int, ...],
        *,
        labelled: bool,
        device: Device = "cuda",
    ) -> None:
        self._content, self._session, self._shape = content, session, shape
        self._labelled, self._device = labelled, device
        self._step_sessions = {
            guided: open_session(step_file(guided=guided).read_bytes(), device)[0] for guided in (False, True)
        }
        self._lock = threading.Lock()
        self._loops: OrderedDict[tuple[int, bool], _CachedLoop] = OrderedDict()
        self.graph_error: str | None = None

    def __len__(self) -> int:
        """Number of loops in the cache."""
        return len(self._loops)

    def loop(self, batch_size: int, *, guided: bool) -> DeviceLoop:
        """Get the loop for a batch size; from the second request on, with a CUDA graph if possible.

        Raises:
            OutOfMemory: the loop's buffers do not fit into memory.
            InputError: the buffers cannot be allocated for another reason.
        """
        key = (batch_size, guided)
        with self._lock:
            if key not in self._loops:
                self._loops[key] = _CachedLoop(self._build(self._session, key), captured=False)
                if len(self._loops) > _MAX_LOOPS:
                    self._loops.popitem(last=False)
            elif not self._loops[key].captured and self.graph_error is None:
                self._capture(key)
            self._loops.move_to_end(key)
            return self._loops[key].loop

    def _capture(self, key: tuple[int, bool]) -> None:
        batch_size, guided = key
        try:
            session = open_static_session(self._content, batch_size * (1 + guided), self._device)
            loop = self._build(session, key)
            loop.warm_up()
        except (InputError, OutOfMemory) as error:
            self.graph_error = str(error)
        else:
            self._loops[key] = _CachedLoop(loop, captured=True)

    def _build(self, session: onnxruntime.InferenceSession, key: tuple[int, bool]) -> DeviceLoop:
        batch_size, guided = key
        try:
            return DeviceLoop(
                session,
                self._step_sessions[guided],
                self._device,
                batch_size,
                self._shape,
                labelled=self._labelled,
                guided=guided,
            )
        except Exception as error:  # ONNX Runtime has an exception class per status code
            raise translate_error(error) from error


def _bind(session: onnxruntime.InferenceSession, inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return binding
