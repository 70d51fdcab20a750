"""Device loops of one denoiser, by batch size: a size that is asked for again is captured as a CUDA graph."""

from collections import OrderedDict
from typing import Any

import numpy as np
import onnxruntime

from diffusion.errors import InputError
from export.device_loop import DeviceLoop, step_file
from export.limits import OutOfMemory
from export.session import open_static_session

_MOST_KEPT = 4


class CudaLoops:
    """The loops of one denoiser on a GPU.

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
        device: str = "cuda",
    ) -> None:
        self._model, self._session, self._shape = model, session, shape
        self._labelled, self._device = labelled, device
        providers = session.get_providers()
        self._steps = {
            guided: onnxruntime.InferenceSession(step_file(guided=guided).read_bytes(), providers=providers)
            for guided in (False, True)
        }
        self._kept: OrderedDict[tuple[int, bool], DeviceLoop] = OrderedDict()
        self._captured: set[tuple[int, bool]] = set()
        self.why_no_graphs: str | None = None

    def loop(self, batch: int, *, guided: bool) -> DeviceLoop:
        """The loop for batches of one size; from the second time on by a captured graph where that works.

        Raises:
            OutOfMemory: its buffers do not fit.
        """
        key = (batch, guided)
        if key not in self._kept:
            self._kept[key] = self._made(self._session, key)
            if len(self._kept) > _MOST_KEPT:
                self._captured.discard(self._kept.popitem(last=False)[0])
        elif key not in self._captured and self.why_no_graphs is None:
            self._capture(key)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _capture(self, key: tuple[int, bool]) -> None:
        batch, guided = key
        try:
            session = open_static_session(self._model, batch * (1 + guided), self._device)
            loop = self._made(session, key)
            loop.warm_up()
        except (InputError, OutOfMemory) as error:
            self.why_no_graphs = str(error)
            return
        self._kept[key] = loop
        self._captured.add(key)

    def _made(self, session: Any, key: tuple[int, bool]) -> DeviceLoop:
        batch, guided = key
        step = self._steps[guided]
        try:
            return DeviceLoop(
                session, step, self._device, batch, self._shape, labelled=self._labelled, guided=guided
            )
        except Exception as error:  # ONNX Runtime's own classes
            raise OutOfMemory(str(error).splitlines()[0][:160]) from error


def network_labels(
    labels: "np.ndarray[Any, np.dtype[np.int64]] | None", null_label: int, *, guided: bool
) -> "np.ndarray[Any, np.dtype[np.int64]] | None":
    """What y is for a loop's batch: guided, the null labels first."""
    if labels is None or not guided:
        return labels
    return np.concatenate([np.full_like(labels, null_label), labels])
