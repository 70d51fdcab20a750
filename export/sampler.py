"""Draws samples from a sampler.onnx with numpy and ONNX Runtime, without PyTorch.

From Python:

    sampler = Sampler("sampler.onnx")
    digits = sampler.sample(64, seed=0)  # float32 [64, 1, 8, 8] in data units

From the command line: `python -m export.sampler sampler.onnx --num-samples 64 --output grid.png`.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion.errors import InputError, printable
from diffusion.files import read_file, user_path
from diffusion.memory_limit import check_memory
from diffusion.process.samplers import (
    SamplerTable,
    sampler_table,
    samplers_with_eta,
    with_learned_variance,
)
from diffusion.process.schedules import Spacing
from diffusion.registry import SAMPLERS
from export.cli import sampler_parser, sampling_options
from export.conditions import read_conditions, resolve_conditions
from export.contract import FAST, OUTPUT
from export.doctor import doctor_report
from export.engine import Engine
from export.labels import Labels, resolve_labels
from export.limits import Cancelled, OutOfMemory, RequestGuard
from export.noise import normal_noise
from export.output import check_suffix, save_samples
from export.session import Provider

__all__ = ["Cancelled", "Sampler"]

_MAX_SAMPLES = 10_000_000  # per call
_NUM_INDICES = 2**32  # samples of one seed
MAX_FILE_BYTES = 2 * 1024**3  # the limit of the protobuf format
_MAX_BATCH_SIZE, _MAX_BATCH_VALUES = 1024, 2**22
# Convolutions on a CPU make many times as many activations, which leave a core's cache if it has more than
# these values of x to work on: a batch of 1,024 images takes a quarter more time and 11 times the memory.
_CACHED_VALUES_PER_CORE = 2**14


class Sampler:
    """Draws samples from a diffusion model stored in a `sampler.onnx` file.

    The file contains the denoising network and, in its metadata, everything else that sampling needs: the
    noise schedule, a default sampler with its number of steps, the normalisation and the class names.

        sampler = Sampler("sampler.onnx")
        sampler.runs_on                                           # "CUDA", or "CPU" and the reason
        sampler.sample(64, seed=0)                                # with the file's default sampler
        sampler.sample(64, seed=0, sampler="ddim", num_steps=20)  # with another one
        sampler.sample(64, seed=0, sampler="fast")                # as the file says, with few steps
        sampler.sample(64, labels="cat", guidance_scale=3.0)      # a conditional model

    A seed fixes its samples: sample i is the same for any number of samples and any batch size, up to
    rounding. One object may be used from several threads at the same time.

    Args:
        model: path of a sampler.onnx, or the content of one as bytes.
        provider: where the network runs. "cpu"; "cuda", which fails if CUDA is not available; or "auto",
            which uses CUDA if it is available and the CPU otherwise.
        threads: number of CPU threads, from 1 to 1024. None is one thread for a tiny model without
            convolutions and one per core for others.

    Attributes:
        spec: the file's metadata, such as `spec.shape` and `spec.classes`.

    Raises:
        InputError: the file cannot be read or was not written by export.to_onnx, an argument is out of
            range, or provider "cuda" is not available.
    """

    def __init__(
        self, model: str | Path | bytes, provider: Provider = "auto", threads: int | None = None
    ) -> None:
        if threads is not None and not 1 <= threads <= 1024:
            raise InputError(f"threads {threads}: give 1 to 1024")
        if provider not in get_args(Provider):
            raise InputError(f"provider {provider!r}: choose one of {', '.join(get_args(Provider))}")
        content = (
            model
            if isinstance(model, bytes)
            else read_file(user_path(model), "the path of a sampler.onnx", MAX_FILE_BYTES)
        )
        try:
            self._engine = Engine(content, provider, threads)
        except InputError as error:
            if isinstance(model, bytes):
                raise
            raise InputError(f"{model}: {error}") from error
        self.spec = self._engine.spec
        self._threads = threads

    @property
    def runs_on(self) -> str:
        """ "CPU" or "CUDA", followed by the reason if CUDA or CUDA graphs could not be used."""
        return self._engine.runs_on

    @classmethod
    def from_registry(cls, uri: str, provider: Provider = "auto") -> "Sampler":
        """Open the sampler of a model in MLflow's registry.

        Args:
            uri: URI of the model, such as models:/ray-ddpm-digits@champion.
            provider: where the network runs, as for the class.

        Raises:
            InputError: MLflow is not installed, the model does not exist, or it contains no sampler.onnx.
        """
        from export.registered import download_sampler

        return cls(download_sampler(uri), provider)

    def sample(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        sampler: str | None = None,
        num_steps: int | None = None,
        eta: float | None = None,
        spacing: Spacing | None = None,
        labels: Labels | None = None,
        conditions: Mapping[str, ArrayLike] | None = None,
        guidance_scale: float | None = None,
        first_index: int = 0,
        batch_size: int | None = None,
        time_limit: float | None = None,
        stop: threading.Event | None = None,
        on_row: Callable[[int, int], None] | None = None,
        on_preview: Callable[[NDArray[np.float32]], None] | None = None,
    ) -> NDArray[np.float32]:
        """Draw samples.

        Sample i of a seed does not depend on `num_samples`, `first_index` or `batch_size`, except for
        rounding. `sampler`, `num_steps`, `eta`, `spacing` and `guidance_scale` default to the values
        stored in the file.

        Args:
            num_samples: number of samples, at least 1.
            seed: seed of the noise; only seed mod 2^32 is used.
            sampler: "ddpm", "ddim", "dpmpp_2m", or one that an installed package adds; "fast" is the file's
                choice among those with few network evaluations, and sets `num_steps` too.
            num_steps: number of sampling steps, from 1 to the number of training timesteps; each is one
                network evaluation, or two with a two-stage sampler.
            eta: fraction of fresh noise in DDIM, from 0 (deterministic) to 1.
            spacing: how the timesteps are chosen, see `diffusion.process.schedules.respaced_timesteps`.
            labels: for a conditional model, the name or number of one class for all samples, or one per
                sample. None cycles through the classes.
            conditions: for a model with condition inputs, the values of each by its name, in the units of
                the condition: [num_samples, *shape], or [*shape] for all samples.
            guidance_scale: for a conditional model, the strength of classifier-free guidance, from 0 to
                100: 0 ignores the class, 1 draws the class as learned, and more exaggerates it.
            first_index: index of the first sample: draws samples first_index, first_index + 1, ... of the
                seed.
            batch_size: number of samples that go through the network at a time; None chooses it by the
                size of a sample and, for convolutions on a CPU, the number of cores. A batch that does not
                fit into memory is halved.
            time_limit: time that the call may take, in seconds.
            stop: event that ends the call when set, even during a network call.
            on_row: called after each network call with (calls done, calls in total).
            on_preview: called after each network call with the model's current estimate of the finished
                samples of the batch, float32 [batch, *shape] in data units.

        Returns:
            float32 [num_samples, *shape] in data units.

        Raises:
            InputError: a value is out of range, a name is unknown, the network cannot be run, the samples
                are not finite, or the time limit was exceeded.
            Cancelled: `stop` was set.
        """
        current_batch_size = self._default_batch_size() if batch_size is None else batch_size
        for name, value in (("num_samples", num_samples), ("batch_size", current_batch_size)):
            if not 1 <= value <= _MAX_SAMPLES:
                raise InputError(f"{name} {value}: give 1 to {_MAX_SAMPLES}")
        if not 0 <= first_index <= _NUM_INDICES - num_samples:
            raise InputError(f"first_index {first_index}: give 0 to {_NUM_INDICES - num_samples}")
        check_memory(
            4.0 * num_samples * self.spec.size,
            f"num_samples {num_samples}",
            "give fewer, in several calls with first_index",
        )
        label_numbers = resolve_labels(labels, num_samples, self.spec.classes, first_index)
        condition_inputs = resolve_conditions(conditions, num_samples, self.spec.conditions)
        scale = self._guidance_scale(guidance_scale)
        table = self.table(sampler=sampler, num_steps=num_steps, eta=eta, spacing=spacing)
        samples = np.empty((num_samples, *self.spec.shape), dtype=np.float32)
        samples_done = batches_done = calls_done = 0

        def after_row(x0: Callable[[], NDArray[np.float64]]) -> None:
            nonlocal calls_done
            calls_done += 1
            if on_row is not None:
                num_batches = batches_done + math.ceil((num_samples - samples_done) / current_batch_size)
                on_row(calls_done, num_batches * table.num_rows)
            if on_preview is not None:
                on_preview(self.spec.denormalise(x0()).astype(np.float32))

        # No warnings from numpy: samples that are not finite raise an error below.
        with RequestGuard(time_limit, stop) as guard, np.errstate(over="ignore", invalid="ignore"):
            while samples_done < num_samples:
                batch = slice(samples_done, min(samples_done + current_batch_size, num_samples))
                indices = first_index + np.arange(batch.start, batch.stop)
                noise = partial(self._noise, seed, indices)
                batch_labels = None if label_numbers is None else label_numbers[batch]
                batch_conditions = {name: values[batch] for name, values in condition_inputs.items()}
                try:
                    x = self._engine.run(
                        table, noise, batch_labels, batch_conditions, scale, guard, after_row
                    )
                except OutOfMemory as error:
                    if len(indices) == 1:
                        raise InputError(f"one sample does not fit into memory: {error}") from error
                    calls_done = batches_done * table.num_rows
                    current_batch_size = len(indices) // 2
                    continue
                samples[batch] = self.spec.denormalise(x)
                if not np.isfinite(samples[batch]).all():
                    raise InputError(
                        "the samples are not finite: the model is broken or diverges with this sampler; "
                        "choose another sampler or more steps"
                    )
                samples_done, batches_done = batch.stop, batches_done + 1
        return samples

    def table(
        self,
        *,
        sampler: str | None = None,
        num_steps: int | None = None,
        eta: float | None = None,
        spacing: Spacing | None = None,
    ) -> SamplerTable:
        """Compute the table of a sampler; arguments as for `sample`, with the file's values as defaults."""
        if sampler is None and num_steps is None and eta is None and spacing is None:
            return self.spec.table
        spec, own = self.spec, self.spec.sampler
        if sampler == FAST:
            own, sampler = {**own, **self._fast_sampler()}, None
        name = sampler or own["name"]
        if eta and name in SAMPLERS and not SAMPLERS[name].uses_eta:
            users = " and ".join(samplers_with_eta())
            raise InputError(
                f"eta {eta:g}: only the sampler {users} uses it, not {name}; choose {users} or leave eta out"
            )
        learned = spec.learned_variance
        build = partial(
            sampler_table,
            spec.noise_schedule,
            name,
            own["num_steps"] if num_steps is None else num_steps,
            prediction_type=spec.prediction_type,
            eta=own["eta"] if eta is None else eta,
            spacing=spacing or own["spacing"],
            clip=own["clip"],
        )
        try:
            table = build(variance="beta_tilde" if learned else own["variance"])
            if learned and name == "ddpm":
                table = with_learned_variance(table, build(variance="beta"))
        except ValueError as error:
            raise InputError(str(error)) from error
        if spec.noise_level is None:
            return table
        noise_levels = spec.noise_levels(table.timesteps)
        if not np.isfinite(noise_levels).all():
            raise InputError(
                f"sampler {name}: at its first timestep {spec.noise_level} is infinite; "
                "leave sampler, num_steps, eta and spacing out"
            )
        return replace(table, timesteps=np.zeros(0, dtype=np.int64), noise_levels=noise_levels)

    def denoise(
        self,
        x: NDArray[np.float64],
        level: float | NDArray[np.int64],
        labels: NDArray[np.int64] | None = None,
        guidance_scale: float = 1.0,
        conditions: Mapping[str, ArrayLike] | None = None,
    ) -> NDArray[np.float64]:
        """Compute the network's output for one batch, with guidance.

        Args:
            x: noisy samples, [batch, *shape], normalised.
            level: 0-based timestep of all samples or of each, or the noise level for a model that receives
                one.
            labels: int64 [batch] for a conditional model; the number of classes stands for no class.
            guidance_scale: factor in out_uncond + guidance_scale * (out_cond - out_uncond).
            conditions: as for `sample`, with `num_samples` the batch's size.

        Returns:
            float64 [batch, *shape].

        Source: classifier-free guidance, arXiv:2207.12598, Eq. 6 with guidance_scale = 1 + w.
        """
        inputs = resolve_conditions(conditions, len(x), self.spec.conditions)
        return self._engine.outputs([OUTPUT], x, level, labels, inputs, guidance_scale, RequestGuard())[0]

    def _fast_sampler(self) -> dict[str, Any]:
        fast: dict[str, Any] | None = self.spec.sampler.get(FAST)
        if fast is None:
            raise InputError(
                f"sampler {FAST}: no fast sampler was measured for this file; choose one of "
                f"{', '.join(SAMPLERS)}, and a number of steps"
            )
        return fast

    def _guidance_scale(self, requested: float | None) -> float:
        if requested is None:
            return float(self.spec.sampler["guidance_scale"])
        if not self.spec.classes:
            raise InputError(f"guidance_scale {requested:g}: this model has no classes; leave it out")
        if not 0.0 <= requested <= 100.0:
            raise InputError(f"guidance_scale {requested:g}: give 0 to 100, such as 3")
        return requested

    def _default_batch_size(self) -> int:
        sizes = [self.spec.size, *(math.prod(condition.shape) for condition in self.spec.conditions)]
        values = _MAX_BATCH_VALUES
        if self._engine.convolves_on_cpu:
            values = min(values, _CACHED_VALUES_PER_CORE * (self._threads or os.cpu_count() or 1))
        return max(1, min(_MAX_BATCH_SIZE, values // max(sizes)))

    def _noise(self, seed: int, indices: NDArray[np.int64], row: int) -> NDArray[np.float64]:
        return normal_noise(seed, indices, row + 1, self.spec.shape)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m export.sampler") -> int:
    """Run the command line, which draws samples or checks this machine, and return the exit status.

    Args:
        arguments: command-line arguments; None: those of the process.
        prog: name of the command in its help.
    """
    parser = sampler_parser(prog)
    options = parser.parse_args(arguments)
    if options.doctor:
        lines, works = doctor_report(options.provider)
        print("\n".join(lines))
        return 0 if works else 1
    if options.model is None:
        parser.error("give the path of a sampler.onnx")
    try:
        sampler = Sampler(options.model, options.provider, options.threads)
        check_suffix(options.output, sampler.spec)
        print(
            f"{printable(str(options.model))}: {sampler.spec.data['kind']} of shape "
            f"{list(sampler.spec.shape)}, runs on {sampler.runs_on}"
        )
        started = time.perf_counter()
        samples = sampler.sample(
            options.num_samples,
            first_index=options.first_index,
            conditions=read_conditions(options.condition),
            time_limit=options.time_limit,
            on_row=_print_progress if sys.stderr.isatty() else None,
            **sampling_options(options),
        )
        seconds = time.perf_counter() - started
        save_samples(samples, sampler.spec, options.output, labels_cycle=options.label is None)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 3  # stopped
    print(f"{printable(str(options.output))}: {len(samples)} samples in {seconds:.1f} s")
    return 0


def _print_progress(done: int, total: int) -> None:
    print(f"\r{done}/{total} network calls", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
