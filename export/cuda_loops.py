"""Device loops of one denoiser, by batch size: a size that is asked for again is captured as a CUDA graph."""

import threading
from collections import OrderedDict
from typing import Literal

import onnxruntime

from diffusion.errors import InputError
from export.device_loop import DeviceLoop, step_file
from export.limits import OutOfMemory, translated
from export.session import open_session, open_static_session

_MOST_KEPT = 4
Device = Literal["cuda", "cpu"]


class CudaLoops:
    """The loops of one denoiser on a GPU. Several threads may ask for them.

    Args:
        model: the ONNX file's bytes, which sessions of a fixed batch are opened from.
        session: one of any batch.
        shape: of a sample.
        labelled: whether the denoiser takes y.
        device: "cuda"; "cpu" runs the same loops there, without graphs.

    Attributes:
        why_no_graphs: why this denoiser cannot be captured, or None.
    """

    def __init__(
        self,
        model: bytes,
        session: onnxruntime.InferenceSession,
        shape: tuple[int, ...],
        *,
        labelled: bool,
        device: Device = "cuda",
    ) -> None:
        self._model, self._session, self._shape = model, session, shape
        self._labelled, self._device = labelled, device
        self._steps = {
            guided: open_session(step_file(guided=guided).read_bytes(), device)[0] for guided in (False, True)
        }
        self._lock = threading.Lock()
        # Each with whether a session of its own, which captures, was opened for it.
        self._kept: OrderedDict[tuple[int, bool], tuple[DeviceLoop, bool]] = OrderedDict()
        self.why_no_graphs: str | None = None

    def loop(self, batch: int, *, guided: bool) -> DeviceLoop:
        """The loop for batches of one size; from the second time on by a captured graph where that works.

        Raises:
            OutOfMemory: its buffers do not fit.
            InputError: they cannot be made.
        """
        key = (batch, guided)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._made(self._session, key), False
                if len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
            elif not self._kept[key][1] and self.why_no_graphs is None:
                self._capture(key)
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def _capture(self, key: tuple[int, bool]) -> None:
        batch, guided = key
        try:
            session = open_static_session(self._model, batch * (1 + guided), self._device)
            loop = self._made(session, key)
            loop.warm_up()
        except (InputError, OutOfMemory) as error:
            self.why_no_graphs = str(error)
        else:
            self._kept[key] = loop, True

    def _made(self, session: onnxruntime.InferenceSession, key: tuple[int, bool]) -> DeviceLoop:
        batch, guided = key
        step = self._steps[guided]
        try:
            return DeviceLoop(
                session, step, self._device, batch, self._shape, labelled=self._labelled, guided=guided
            )
        except Exception as error:  # ONNX Runtime's own classes
            raise translated(error) from error
