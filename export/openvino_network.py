"""The network of a sampler.onnx in OpenVINO, from its own package: `pip install "ray-ddpm[openvino]"`."""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from export.contract import SamplerSpec
from export.limits import RequestGuard

_MAX_COMPILED = 4


class OpenVinoNetwork:
    """A network that OpenVINO runs on the CPU, compiled for each batch size that is used, at most four.

    In float32: with bfloat16, OpenVINO's own choice on processors that have it, samples differ by more than
    1e-4 standard deviations.
    """

    def __init__(self, core: Any, model: Any, spec: SamplerSpec, threads: int | None) -> None:
        self._core, self._model, self._spec = core, model, spec
        self._hints: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            self._hints["INFERENCE_NUM_THREADS"] = threads
        self._compiled: dict[int, Any] = {}
        self._lock = threading.Lock()

    def run(
        self, outputs: list[str], inputs: dict[str, NDArray[Any]], guard: RequestGuard
    ) -> list[NDArray[np.float32]]:
        """Compute these outputs; raises as `RequestGuard.run`. A call of the network is not interrupted."""
        return guard.do(self._infer, outputs, inputs)

    def _infer(self, outputs: list[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        # A request of its own for each call, since several threads may call.
        result = self._for_batch(len(next(iter(inputs.values())))).create_infer_request().infer(inputs)
        return [np.array(result[name]) for name in outputs]

    def _for_batch(self, batch_size: int) -> Any:
        with self._lock:
            if batch_size not in self._compiled:
                model = self._model.clone()
                shapes = {name: [batch_size, *shape] for name, (_, shape) in self._spec.graph_inputs.items()}
                model.reshape(shapes)
                while len(self._compiled) >= _MAX_COMPILED:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[batch_size] = self._core.compile_model(model, "CPU", self._hints)
            return self._compiled[batch_size]


def open_openvino(content: bytes, spec: SamplerSpec, threads: int | None) -> OpenVinoNetwork:
    """Open a sampler.onnx in OpenVINO.

    Args:
        content: the file's bytes, which ONNX Runtime has accepted.
        spec: the file's metadata.
        threads: number of CPU threads; None for OpenVINO's choice.

    Raises:
        InputError: OpenVINO is not installed, or cannot read the network.
    """
    try:
        import openvino
    except ImportError as error:
        raise InputError(
            'provider openvino: it is not installed; pip install "ray-ddpm[openvino]", or use provider cpu'
        ) from error
    core = openvino.Core()
    try:
        model = core.read_model(content, b"")
    except Exception as error:  # OpenVINO raises RuntimeError and others
        first_line = (str(error).splitlines() or [""])[0][:160]
        raise InputError(f"provider openvino: it cannot read the network ({first_line}); use cpu") from error
    return OpenVinoNetwork(core, model, spec, threads)
