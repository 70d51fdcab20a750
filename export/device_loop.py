"""The sampling loop on a GPU: x stays there from the noise to the sample.

Each row of the table is two graphs on bound buffers: the denoiser, and one step (`export.step_graph`).
What crosses the bus is a timestep, ten coefficients and, where a row asks for it, noise.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from diffusion.sampling import SamplerTable
from export.limits import Watch

_CALLS_TO_CAPTURE = 3


def step_file(*, guided: bool) -> Path:
    """Where the graph of a step stands."""
    return Path(__file__).with_name("guided_step.onnx" if guided else "step.onnx")


class DeviceLoop:
    """Buffers of one batch size on a device, and the loop over them. One request at a time.

    Args:
        denoiser: a session on the device. One that captures CUDA graphs must have been opened for this
            loop alone: a captured graph knows its buffers' addresses.
        step: a session of `step_file` on the device.
        device: ONNX Runtime's word for it: "cuda" or "cpu".
        batch: samples.
        shape: of one.
        labelled: whether the denoiser takes y.
        guided: whether each sample goes through the network without its class as well.
    """

    def __init__(
        self,
        denoiser: onnxruntime.InferenceSession,
        step: onnxruntime.InferenceSession,
        device: str,
        batch: int,
        shape: tuple[int, ...],
        *,
        labelled: bool,
        guided: bool,
    ) -> None:
        self._denoiser, self._step, self._device = denoiser, step, device
        self._guided = guided
        self._lock = threading.Lock()
        full, calls = (batch, *shape), batch * (1 + guided)
        # Two of each, since a step reads one while it writes the other.
        self._x = [self._buffer(full, np.float64) for _ in range(2)]
        self._x0 = [self._buffer(full, np.float64) for _ in range(2)]
        self._z = self._buffer(full, np.float64)
        self._row = self._buffer((10,), np.float64)
        self._network_input = self._buffer((calls, *shape), np.float32)
        self._out = self._buffer((calls, *shape), np.float32)
        self._t = self._buffer((calls,), np.int64)
        self._y = self._buffer((calls,), np.int64) if labelled else None
        inputs = {"x": self._network_input, "t": self._t}
        self._call = _bound(
            denoiser, inputs | ({"y": self._y} if labelled else {}), {"model_output": self._out}
        )
        self._steps = [
            _bound(
                step,
                {
                    "x": self._x[here],
                    "out": self._out,
                    "x0_previous": self._x0[here],
                    "z": self._z,
                    "row": self._row,
                },
                {
                    "x_next": self._x[1 - here],
                    "x0": self._x0[1 - here],
                    "network_input": self._network_input,
                },
            )
            for here in range(2)
        ]

    def warm_up(self) -> None:
        """Call the denoiser as often as a CUDA graph needs to be captured.

        Raises:
            InputError: it cannot be run, or captured.
            OutOfMemory: as it says.
        """
        with self._lock:
            for _ in range(_CALLS_TO_CAPTURE):
                Watch().run(self._denoiser.run_with_iobinding, self._call)

    def run(
        self,
        start: NDArray[np.float64],
        table: SamplerTable,
        noise: Callable[[int], NDArray[np.float64]],
        labels: NDArray[np.int64] | None,
        guidance_scale: float,
        watch: Watch,
        after_row: Callable[[Callable[[], NDArray[np.float64]]], None],
    ) -> NDArray[np.float64]:
        """From noise to samples.

        Args:
            start: float64 [batch, *shape], noise.
            table: the sampler.
            noise: row index -> float64 [batch, *shape].
            labels: int64 of the network's batch: guided, the null labels first.
            guidance_scale: of a guided loop.
            watch: over the request.
            after_row: called after each row with a function that fetches its x0.

        Returns:
            float64 [batch, *shape], normalised.
        """
        with self._lock:
            self._x[0].update_inplace(start)
            self._x0[0].update_inplace(np.zeros_like(start))
            twice = np.concatenate([start] * (1 + self._guided))
            self._network_input.update_inplace(twice.astype(np.float32))
            if self._y is not None:
                self._y.update_inplace(labels)
            here = 0
            for index, (timestep, row) in enumerate(zip(table.timesteps, table.coefficients, strict=True)):
                if row[6]:
                    self._z.update_inplace(noise(index))
                self._t.update_inplace(np.full(self._t.shape(), timestep, dtype=np.int64))
                self._row.update_inplace(np.append(row, guidance_scale))
                watch.run(self._denoiser.run_with_iobinding, self._call)
                watch.run(self._step.run_with_iobinding, self._steps[here])
                here = 1 - here
                after_row(self._x0[here].numpy)
            return self._x[here].numpy().copy()

    def _buffer(self, shape: tuple[int, ...], dtype: Any) -> Any:
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device, 0)
        value.update_inplace(np.zeros(shape, dtype=dtype))
        return value


def _bound(session: onnxruntime.InferenceSession, inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return binding
