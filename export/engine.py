"""The network of a sampler.onnx and the loop around it, on the processor or a GPU."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.sampling import SamplerTable, trajectory
from export.cuda_loops import CudaLoops
from export.labels import network_labels
from export.limits import Watch
from export.session import Provider, open_session
from export.spec import SamplerSpec


class Engine:
    """Runs a file's network.

    Args:
        content: of the file.
        provider: see `Sampler`.
        threads: see `Sampler`.

    Attributes:
        spec: what the file's metadata say.

    Raises:
        InputError: not a file that export.to_onnx wrote, or CUDA cannot be had.
    """

    def __init__(self, content: bytes, provider: Provider, threads: int | None) -> None:
        self._session, self._runs_on = open_session(content, provider, threads)
        try:
            metadata = self._session.get_modelmeta().custom_metadata_map
        except UnicodeDecodeError as error:
            raise InputError("the file's metadata are no text: export the model again") from error
        self.spec = SamplerSpec.from_metadata(metadata)
        self._check_signature()
        self._cuda: CudaLoops | None = None
        if self._runs_on == "CUDA":
            self._cuda = CudaLoops(content, self._session, self.spec.shape, labelled=bool(self.spec.classes))

    @property
    def runs_on(self) -> str:
        """ "CPU" or "CUDA", with the reason where "auto" fell back or CUDA graphs could not be had."""
        if self._cuda is not None and self._cuda.why_no_graphs is not None:
            return f"CUDA, without graphs, since {self._cuda.why_no_graphs}"
        return self._runs_on

    def run(
        self,
        table: SamplerTable,
        noise: Callable[[int], NDArray[np.float64]],
        labels: NDArray[np.int64] | None,
        scale: float,
        watch: Watch,
        after_row: Callable[[Callable[[], NDArray[np.float64]]], None],
    ) -> NDArray[np.float64]:
        """One batch from noise to samples.

        Args:
            table: the sampler.
            noise: row index -> float64 [batch, *shape]; -1 is the start.
            labels: int64 [batch] of a conditional model.
            scale: of guidance.
            watch: over the request.
            after_row: called after each row with a function that fetches its x0.

        Returns:
            float64 [batch, *shape], normalised.

        Raises:
            InputError, Cancelled, OutOfMemory: see `Watch.run`.
        """
        start = noise(-1)
        if self._cuda is not None:
            guided = labels is not None and scale != 1.0
            both = network_labels(labels, len(self.spec.classes), guided=guided)
            loop = self._cuda.loop(len(start), guided=guided)
            return loop.run(start, table, noise, both, scale, watch, after_row)
        denoise = partial(self.denoise, labels=labels, scale=scale, watch=watch)
        for x, x0 in trajectory(denoise, start, table, noise):
            after_row(x0.view)
            last = x
        return last

    def denoise(
        self,
        x: NDArray[np.float64],
        timestep: int,
        labels: NDArray[np.int64] | None,
        scale: float,
        watch: Watch,
    ) -> NDArray[np.float64]:
        """One guided output of the network; arguments as for `Sampler.denoise`."""
        if labels is None or scale == 1.0:
            return self._call(x, timestep, labels, watch)
        both = network_labels(labels, len(self.spec.classes), guided=True)
        out = self._call(np.concatenate([x, x]), timestep, both, watch)
        unconditional, conditional = out[: len(x)], out[len(x) :]
        return unconditional + scale * (conditional - unconditional)

    def _call(
        self, x: NDArray[np.float64], timestep: int, labels: NDArray[np.int64] | None, watch: Watch
    ) -> NDArray[np.float64]:
        inputs = {"x": x.astype(np.float32), "t": np.full(len(x), timestep, dtype=np.int64)}
        if labels is not None:
            inputs["y"] = labels
        (out,) = watch.run(self._session.run, ["model_output"], inputs)
        if out.shape != x.shape:
            raise InputError(
                f"the model's output has shape {list(out.shape)}, not {list(x.shape)} as it says: "
                "export the model again"
            )
        return out.astype(np.float64)

    def _check_signature(self) -> None:
        expected = {
            "x": ("tensor(float)", self.spec.shape),
            "t": ("tensor(int64)", ()),
            "model_output": ("tensor(float)", self.spec.shape),
        } | ({"y": ("tensor(int64)", ())} if self.spec.classes else {})
        values = [*self._session.get_inputs(), *self._session.get_outputs()]
        found = {value.name: (value.type, tuple(value.shape[1:])) for value in values}
        batched = all(value.shape and not isinstance(value.shape[0], int) for value in values)
        if found != expected or len(values) != len(expected) or not batched:
            seen = ", ".join(f"{value.name} {value.type} {value.shape}" for value in values)[:200]
            numbers = "t and y" if self.spec.classes else "t"
            raise InputError(
                f"its inputs and outputs are {seen}, not x float32 and model_output float32 "
                f"{['batch', *self.spec.shape]} with {numbers} int64 ['batch']: export the model again"
            )
