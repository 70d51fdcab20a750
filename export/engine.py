"""The network of a sampler.onnx and the sampling loop around it, on the CPU or a GPU."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.process.inpainting import Inpainting
from diffusion.process.samplers import SamplerTable, trajectory
from export.conditions import ConditionInputs
from export.contract import BATCH, LABEL, OUTPUT, VARIANCE_OUTPUT, SamplerSpec, X
from export.device_thread import DeviceThread, device_thread
from export.divided_network import DividedNetwork, Network
from export.gpu_loop import (
    DeviceLoopCache,
    NoiseKeys,
    State,
    fits_device_loop,
    fits_device_table,
    step_inputs,
    with_step,
)
from export.labels import network_labels
from export.limits import RequestGuard
from export.openvino_network import open_openvino
from export.session import DeviceOptions, Provider, has_convolutions, open_session, usable_cores

# A contract's types in ONNX Runtime's and in numpy's terms.
_ONNX_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}
_MAX_BYTES_TWICE = 2**28  # of a file whose weights may be in memory twice


class NetworkSession:
    """A network in a session of ONNX Runtime.

    Args:
        session: the session.
        thread: thread that runs it; None for any.
        more_inputs: further inputs that the session's graph needs.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        thread: DeviceThread | None = None,
        more_inputs: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self._session, self._thread = session, thread
        self._more_inputs = dict(more_inputs or {})

    def run(
        self, outputs: list[str], inputs: dict[str, NDArray[Any]], guard: RequestGuard
    ) -> list[NDArray[np.float32]]:
        """Compute these outputs; raises as `RequestGuard.run`."""
        return guard.run(self._session.run, outputs, inputs | self._more_inputs, on=self._thread)


class Engine:
    """Runs the network of a sampler.onnx.

    Args:
        content: the file's bytes.
        provider: as for `export.sampler.Sampler`.
        threads: as for `export.sampler.Sampler`.
        options: how a GPU is used.

    Attributes:
        spec: the file's metadata.

    Raises:
        InputError: the file was not written by export.to_onnx, or CUDA is required and not available.
    """

    def __init__(
        self,
        content: bytes,
        provider: Provider,
        threads: int | None,
        options: DeviceOptions | None = None,
    ) -> None:
        options = options or DeviceOptions()
        on_cpu, _ = open_session(content, "cpu", threads)
        try:
            metadata = on_cpu.get_modelmeta().custom_metadata_map
        except UnicodeDecodeError as error:
            raise InputError("the file's metadata is not valid text: export the model again") from error
        self.spec = SamplerSpec.from_metadata(metadata)
        self._check_signature(on_cpu)
        self._has_convolutions = has_convolutions(content)
        self._network: Network = NetworkSession(on_cpu)
        self._runs_on = "CPU"
        self._gpu_loops: DeviceLoopCache | None = None
        if provider == "openvino":
            self._network, self._runs_on = open_openvino(content, self.spec, threads), "OpenVINO"
        elif provider != "cpu":
            # Other models run in the loop on the host, with the network on the GPU.
            loops = provider in ("auto", "cuda") and fits_device_loop(self.spec)
            labelled = bool(self.spec.classes)
            file = with_step(content, labelled=labelled) if loops else content
            session, self._runs_on = open_session(file, provider, threads, options, on_cpu)
            if session is not on_cpu:
                self._use_device(session, file, loops, provider, options)
        if self._has_convolutions and self._runs_on.startswith("CPU") and len(content) <= _MAX_BYTES_TWICE:
            self._network = DividedNetwork(
                self._network, lambda: open_session(content, "cpu", 1)[0], threads or usable_cores()
            )

    def _use_device(
        self,
        session: onnxruntime.InferenceSession,
        file: bytes,
        loops: bool,
        provider: Provider,
        options: DeviceOptions,
    ) -> None:
        """Let a session on a device take the place of the CPU's, whose weights are freed."""
        thread = None if provider == "coreml" else device_thread("cuda", options.device_id)
        more = step_inputs(self.spec.shape) if loops else {}
        self._network = NetworkSession(session, thread, more)
        if loops:
            self._gpu_loops = DeviceLoopCache(
                file, session, self.spec.shape, labelled=bool(self.spec.classes), options=options
            )

    @property
    def convolves_on_cpu(self) -> bool:
        """Whether the network is convolutional and runs on the CPU."""
        return self._has_convolutions and self._runs_on.startswith(("CPU", "OpenVINO"))

    @property
    def runs_on(self) -> str:
        """The provider, such as "CPU" or "CUDA", and what of CUDA could not be used, with the reason."""
        text, loops = self._runs_on, self._gpu_loops
        if loops is not None and loops.graph_error is not None:
            text += f", without CUDA graphs, since {loops.graph_error}"
        if loops is not None and loops.noise_error is not None:
            text += f", with noise of the CPU, since {loops.noise_error}"
        return text

    def states(
        self,
        table: SamplerTable,
        noise: Callable[[int], NDArray[np.float64]],
        labels: NDArray[np.int64] | None,
        conditions: ConditionInputs,
        guidance_scale: float,
        guard: RequestGuard,
        inpainting: Inpainting | None = None,
        keys: NoiseKeys | None = None,
    ) -> Iterator[State]:
        """Turn one batch of noise into samples, yielding after each row of the table.

        Args:
            table: the sampler.
            noise: function from a row index to float64 noise [batch, *shape]; -1 gives what sampling starts
                from.
            labels: int64 [batch] for a conditional model, otherwise None.
            conditions: further inputs of the network.
            guidance_scale: strength of classifier-free guidance.
            guard: guard of the request.
            inpainting: the known part of the samples. The loop then runs on the host.
            keys: by what a device can make the noise of rows itself.

        Yields:
            The state after each row, valid until the next one is asked for.

        Raises:
            InputError, Cancelled, OutOfMemory: as for `RequestGuard.run`.
        """
        if self._gpu_loops is not None and fits_device_table(table) and inpainting is None:
            guided = labels is not None and guidance_scale != 1.0
            y = network_labels(labels, len(self.spec.classes), guided=guided)
            yield from self._gpu_loops.states(noise(-1), table, noise, y, guidance_scale, guard, keys)
            return
        learns_variance = "g" in table.columns
        names = [OUTPUT, VARIANCE_OUTPUT] if learns_variance else [OUTPUT]

        def denoise(x: NDArray[np.float64], level: float) -> Any:
            outputs = self.outputs(names, x, level, labels, conditions, guidance_scale, guard)
            return outputs if learns_variance else outputs[0]

        for x, x0 in trajectory(denoise, noise(-1), table, noise, inpainting):
            yield State(x.view, x0.view)

    def outputs(
        self,
        names: list[str],
        x: NDArray[np.float64],
        level: float | NDArray[np.int64],
        labels: NDArray[np.int64] | None,
        conditions: ConditionInputs,
        guidance_scale: float,
        guard: RequestGuard,
    ) -> list[NDArray[np.float64]]:
        """Compute these outputs of the network, the first with guidance, which leaves the others as they are.

        The other arguments are those of `export.sampler.Sampler.denoise`.
        """
        if labels is None or guidance_scale == 1.0:
            return self._call_network(names, x, level, labels, conditions, guard)
        y = network_labels(labels, len(self.spec.classes), guided=True)
        twice = {name: np.concatenate([value, value]) for name, value in conditions.items()}
        out, *others = self._call_network(names, np.concatenate([x, x]), level, y, twice, guard)
        unconditional, conditional = out[: len(x)], out[len(x) :]
        guided = unconditional + guidance_scale * (conditional - unconditional)
        return [guided, *(other[len(x) :] for other in others)]

    def _call_network(
        self,
        outputs: list[str],
        x: NDArray[np.float64],
        level: float | NDArray[np.int64],
        y: NDArray[np.int64] | None,
        conditions: ConditionInputs,
        guard: RequestGuard,
    ) -> list[NDArray[np.float64]]:
        level_type, _ = self.spec.graph_inputs[self.spec.level_input]
        inputs = {X: x.astype(np.float32), self.spec.level_input: np.full(len(x), level, dtype=level_type)}
        if y is not None:
            inputs[LABEL] = y
        values = self._network.run(outputs, inputs | conditions, guard)
        for value in values:
            if value.shape != x.shape:
                raise InputError(
                    f"the model's output has shape {list(value.shape)} instead of {list(x.shape)}: "
                    "export the model again"
                )
        return [value.astype(np.float64) for value in values]

    def _check_signature(self, session: onnxruntime.InferenceSession) -> None:
        expected = {
            name: (_ONNX_TYPES[dtype], shape)
            for name, (dtype, shape) in {**self.spec.graph_inputs, **self.spec.graph_outputs}.items()
        }
        values = [*session.get_inputs(), *session.get_outputs()]
        actual = {value.name: (value.type, tuple(value.shape[1:])) for value in values}
        batched = all(value.shape and not isinstance(value.shape[0], int) for value in values)
        if actual != expected or len(values) != len(expected) or not batched:
            shown = ", ".join(f"{value.name} {value.type} {value.shape}" for value in values)[:200]
            needed = ", ".join(
                f"{name} {dtype} {[BATCH, *shape]}" for name, (dtype, shape) in expected.items()
            )[:400]
            raise InputError(
                f"the model's inputs and outputs are {shown}, but need to be {needed}: export the model again"
            )
