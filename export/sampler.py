"""Draws samples from a sampler.onnx with numpy and ONNX Runtime, without PyTorch.

From Python:

    sampler = Sampler("sampler.onnx")
    digits = sampler.sample(64, seed=0)  # float32 [64, 1, 8, 8] in data units

From the command line: `python -m export.sampler sampler.onnx --num-samples 64 --output grid.png`.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion.errors import InputError, printable
from diffusion.files import read_file, user_path
from diffusion.memory_limit import check_memory
from diffusion.process.given import GivenOptions, path_between, resolve_given
from diffusion.process.samplers import SamplerTable
from diffusion.process.schedules import Spacing
from export.batches import draw_batches
from export.cascade import Cascade
from export.cli import check_cascade_flags, device_options, sampler_parser, sampling_options
from export.conditions import read_conditions, resolve_conditions
from export.contract import OUTPUT
from export.doctor import doctor_report
from export.engine import Engine
from export.known_files import check_given_flags, read_given
from export.labels import Labels, resolve_labels
from export.limits import Cancelled, RequestGuard
from export.noise import seed_words
from export.notebook import notebook_html
from export.output import check_suffix, save_samples
from export.request import MAX_SAMPLES, NUM_INDICES, InterpolationOptions, Request, StreamOptions, seed_list
from export.session import DeviceOptions, Provider, usable_cores
from export.table_choice import choose_table
from export.values import real_number, whole_number

__all__ = ["Cancelled", "Preview", "Sampler"]

MAX_FILE_BYTES = 2 * 1024**3  # the limit of the protobuf format
_MAX_BATCH_SIZE, _MAX_BATCH_VALUES = 1024, 2**22
# Convolutions on a CPU make many times as many activations, which leave a core's cache if it has more than
# these values of x to work on: a batch of 1,024 images takes a quarter more time and 11 times the memory.
_CACHED_VALUES_PER_CORE = 2**14


class Preview(NamedTuple):
    """How far a request is, as `Sampler.stream` yields it.

    Attributes:
        rows_done: network calls that have been made.
        num_rows: network calls of the whole request. It grows if a batch did not fit into memory.
        samples: float32 [begun, *shape] in data units: the finished samples of earlier batches, then the
            model's estimates of the finished samples of the batch in progress. When `rows_done` is
            `num_rows`, all samples, finished.
    """

    rows_done: int
    num_rows: int
    samples: NDArray[np.float32]


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
        provider: where the network runs. "cpu"; "cuda", which fails if CUDA is not available; "auto", which
            uses CUDA if it is available and the CPU otherwise; "openvino", from OpenVINO's own package, on
            the CPU; "tensorrt" or "coreml", if this build of ONNX Runtime has them.
        threads: number of CPU threads, from 1 to 1024. None is one thread for a tiny model without
            convolutions and one per core for others.
        device_options: which GPU is used, and how its memory and its arithmetic are.

    Attributes:
        spec: the file's metadata, such as `spec.shape` and `spec.classes`.

    Raises:
        InputError: the file cannot be read or was not written by export.to_onnx, an argument is out of
            range, or provider "cuda" is not available.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        provider: Provider = "auto",
        threads: int | None = None,
        *,
        device_options: DeviceOptions | None = None,
    ) -> None:
        if threads is not None:
            threads = whole_number("threads", threads, 1, 1024)
        if provider not in get_args(Provider):
            raise InputError(f"provider {provider!r}: choose one of {', '.join(get_args(Provider))}")
        content = (
            model
            if isinstance(model, bytes)
            else read_file(user_path(model), "the path of a sampler.onnx", MAX_FILE_BYTES)
        )
        try:
            self._engine = Engine(content, provider, threads, device_options)
        except InputError as error:
            if isinstance(model, bytes):
                raise
            raise InputError(f"{model}: {error}") from error
        self.spec = self._engine.spec
        self._content, self._provider, self._threads = content, provider, threads
        self._device_options = device_options
        self._html: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's bytes; the process that reads the pickle opens them on its own device."""
        arguments = (self._content, self._provider, self._threads)
        return partial(type(self), device_options=self._device_options), arguments

    def __repr__(self) -> str:
        """What the file draws, by which sampler, and where."""
        spec = self.spec
        parts = [
            f"{spec.data['kind']} {list(spec.shape)}",
            f"{spec.sampler['name']}, {spec.sampler['num_steps']} steps",
            *([f"{len(spec.classes)} classes"] if spec.classes else []),
            *([f"conditions {', '.join(each.name for each in spec.conditions)}"] if spec.conditions else []),
            f"runs on {self.runs_on}",
        ]
        return f"<Sampler: {'; '.join(parts)}>"

    def _repr_html_(self) -> str:
        """What notebooks show: the text of `repr`, and a picture of some samples if it is quickly drawn."""
        if self._html is None:
            self._html = notebook_html(self)
        return self._html

    @property
    def runs_on(self) -> str:
        """The provider, such as "CPU" or "CUDA", and what of CUDA could not be used, with the reason."""
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
        num_samples: int | None = None,
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        sampler: str | None = None,
        num_steps: int | None = None,
        eta: float | None = None,
        spacing: Spacing | None = None,
        labels: Labels | None = None,
        conditions: Mapping[str, ArrayLike] | None = None,
        guidance_scale: float | None = None,
        known: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        resampling: int = 1,
        jump_length: int = 1,
        start_from: ArrayLike | None = None,
        strength: float | None = None,
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
            num_samples: number of samples, at least 1; may be left out if `seeds` are given.
            seed: seed of the noise; only seed mod 2^32 is used.
            seeds: a seed for each sample, instead of `seed`. Sample r is then sample `first_index` of
                seeds[r], which is the first one unless `first_index` is given: what
                `sample(1, seed=seeds[r])` draws, except for rounding. Without `labels` all have the label
                of that index, the first class, as they would have one by one.
            sampler: name of a sampler, see `diffusion.process.samplers.sampler_table`; "fast" is the file's
                choice among those with few network evaluations, and sets `num_steps` too.
            num_steps: number of sampling steps, from 1 to the number of training timesteps; each is one
                network evaluation, or two with a two-stage sampler.
            eta: fraction of fresh noise in ddim and heun_churn, from 0 (deterministic) to 1. For another
                sampler than the file's it defaults to the sampler's own: 0 in ddim, 0.25 in heun_churn.
            spacing: how the timesteps are chosen, see `diffusion.process.schedules.respaced_timesteps`.
            labels: for a conditional model, the name or number of one class for all samples, or one per
                sample. None cycles through the classes.
            conditions: for a model with condition inputs, the values of each by its name, in the units of
                the condition: [num_samples, *shape], or [*shape] for all samples.
            guidance_scale: for a conditional model, the strength of classifier-free guidance, from 0 to
                100: 0 ignores the class, 1 draws the class as learned, and more exaggerates it.
            known: values that the samples shall have, in data units: [num_samples, *shape], or [*shape] for
                all samples. Without a mask, NaN stands for a value that is to be drawn.
            mask: which values are drawn: True, or 1; False or 0 where they are known. Of the same shapes as
                `known`, or [H, W] for images.
            resampling: with `known`, the number of times that each step runs, from 1 to 1024: more bring the
                drawn values into harmony with the known ones, see `diffusion.process.inpainting`.
            jump_length: number of consecutive steps that resampling repeats together.
            start_from: samples in data units that are noised and denoised instead of pure noise:
                [num_samples, *shape], or [*shape] for all samples.
            strength: with `start_from`, the fraction of the steps that run, above 0 and up to 1: the smaller,
                the closer to `start_from`. None is 0.6.
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
        request = self._request(
            num_samples,
            seed=seed,
            seeds=seeds,
            sampler=sampler,
            num_steps=num_steps,
            eta=eta,
            spacing=spacing,
            labels=labels,
            conditions=conditions,
            guidance_scale=guidance_scale,
            known=known,
            mask=mask,
            resampling=resampling,
            jump_length=jump_length,
            start_from=start_from,
            strength=strength,
            first_index=first_index,
            batch_size=batch_size,
        )
        with RequestGuard(time_limit, stop) as guard:
            for state in draw_batches(self._engine, request, guard, self._num_threads):
                if on_row is not None:
                    on_row(state.rows_done, state.num_rows)
                if on_preview is not None:
                    on_preview(state.estimate())
        return request.samples

    def stream(
        self,
        num_samples: int | None = None,
        *,
        every: int = 1,
        time_limit: float | None = None,
        stop: threading.Event | None = None,
        **options: Unpack[StreamOptions],
    ) -> Generator[Preview, None, NDArray[np.float32]]:
        """Draw samples as `sample` does, and show them as they come out of the noise.

            for preview in sampler.stream(16, seed=0, every=5):
                show(preview.samples, f"{preview.rows_done} of {preview.num_rows}")
            samples = preview.samples

        The work is done while the next preview is asked for, in the thread that asks; nothing goes on in
        between. Closing the generator, or leaving the loop, ends the request. Arguments are checked when
        `stream` is called.

        Args:
            num_samples, stop, options: as for `sample`.
            every: number of network calls from one preview to the next.
            time_limit: time in seconds that the request may take, from the first preview that is asked for
                and with the time that the caller takes.

        Yields:
            Previews: one every so many network calls, and the last one, which has the finished samples.

        Returns:
            The samples, which the last preview has too.

        Raises:
            InputError, Cancelled: as for `sample`.
        """
        step = whole_number("every", every, 1, MAX_SAMPLES)
        guard = RequestGuard(time_limit, stop)
        return self._previews(self._request(num_samples, **options), guard, step)

    def _previews(
        self, request: Request, guard: RequestGuard, every: int
    ) -> Generator[Preview, None, NDArray[np.float32]]:
        with guard:
            for state in draw_batches(self._engine, request, guard, self._num_threads):
                if state.rows_done == state.num_rows:
                    yield Preview(state.rows_done, state.num_rows, request.samples)
                elif state.rows_done % every == 0:
                    begun = np.concatenate([request.samples[: state.first], state.estimate()])
                    yield Preview(state.rows_done, state.num_rows, begun)
        return request.samples

    def _request(
        self,
        num_samples: int | None,
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        sampler: str | None = None,
        num_steps: int | None = None,
        eta: float | None = None,
        spacing: Spacing | None = None,
        labels: Labels | None = None,
        conditions: Mapping[str, ArrayLike] | None = None,
        guidance_scale: float | None = None,
        first_index: int = 0,
        batch_size: int | None = None,
        **given: Unpack[GivenOptions],
    ) -> Request:
        """Check the arguments of a request, and find the defaults of those that are missing."""
        numbers = None if seeds is None else seed_list(seeds, seed, num_samples)
        if num_samples is None and numbers is None:
            raise InputError("num_samples: give the number of samples, or seeds, one for each")
        count = whole_number(
            "num_samples", len(numbers) if numbers is not None else num_samples, 1, MAX_SAMPLES
        )
        size = self._default_batch_size() if batch_size is None else batch_size
        size = whole_number("batch_size", size, 1, MAX_SAMPLES)
        last_index = NUM_INDICES - (1 if numbers is not None else count)
        first = whole_number("first_index", first_index, 0, last_index)
        words = seed_words(whole_number("seed", seed) if numbers is None else numbers)
        check_memory(
            4.0 * count * self.spec.size,
            f"num_samples {count}",
            "give fewer, in several calls with first_index",
        )
        classes = self.spec.classes
        if numbers is not None and labels is None and classes:
            labels = first % len(classes)
        table = self.table(sampler=sampler, num_steps=num_steps, eta=eta, spacing=spacing)
        checked = resolve_given(count, self.spec.units, **given)
        return Request(
            samples=np.empty((count, *self.spec.shape), dtype=np.float32),
            seeds=words,
            first_index=first,
            table=table,
            num_calls=checked.num_calls(table),
            labels=resolve_labels(labels, count, classes, first),
            conditions=resolve_conditions(conditions, count, self.spec.conditions),
            guidance_scale=self._guidance_scale(guidance_scale),
            batch_size=size,
            given=checked,
        )

    def interpolate(
        self,
        a: ArrayLike,
        b: ArrayLike,
        num_frames: int = 8,
        *,
        seed: int = 0,
        strength: float | None = None,
        **options: Unpack[InterpolationOptions],
    ) -> NDArray[np.float32]:
        """Draw a path of samples from one like `a` to one like `b`.

        `a` and `b` are noised with the same noise, blended linearly, and denoised with the same noise in
        every frame, by deterministic samplers as by others. The ends are not `a` and `b`, but what
        `sample(start_from=a)` and `sample(start_from=b)` draw: the smaller the strength, the closer they
        are, and the more the frames look like two samples that are shown through each other.

        Args:
            a, b: samples in data units, [*shape].
            num_frames: number of frames, at least 2, of which the first is that of `a` and the last that of
                `b`.
            seed: seed of the noise.
            strength: as for `sample`.
            options: as for `sample`. A conditional model needs `labels`, or the guidance scale 0.

        Returns:
            float32 [num_frames, *shape] in data units.

        Raises:
            InputError, Cancelled: as for `sample`.

        Source: DDPM, arXiv:2006.11239, Section 4.3.
        """
        frames = whole_number("num_frames", num_frames, 2, MAX_SAMPLES)
        check_memory(12.0 * frames * self.spec.size, f"num_frames {frames}", "give fewer")
        labels, scale = options.get("labels"), options.get("guidance_scale")
        if self.spec.classes and labels is None and self._guidance_scale(scale) != 0.0:
            raise InputError(
                "labels: every frame needs the same class; give one (--label), or guidance_scale 0 "
                "(--guidance-scale 0) for no class"
            )
        return self.sample(
            seeds=[seed] * frames,
            start_from=path_between(a, b, frames, self.spec.units),
            strength=strength,
            **options,
        )

    def table(
        self,
        *,
        sampler: str | None = None,
        num_steps: int | None = None,
        eta: float | None = None,
        spacing: Spacing | None = None,
    ) -> SamplerTable:
        """Compute the table of a sampler; arguments as for `sample`, with the file's values as defaults.

        Raises:
            InputError: as for `sample`.
        """
        return choose_table(self.spec, sampler=sampler, num_steps=num_steps, eta=eta, spacing=spacing)

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

    def _guidance_scale(self, requested: float | None) -> float:
        if requested is None:
            return float(self.spec.sampler["guidance_scale"])
        requested = real_number("guidance_scale", requested)
        if not self.spec.classes:
            raise InputError(f"guidance_scale {requested:g}: this model has no classes; leave it out")
        if not 0.0 <= requested <= 100.0:
            raise InputError(f"guidance_scale {requested:g}: give 0 to 100, such as 3")
        return requested

    @property
    def _num_threads(self) -> int:
        return self._threads or usable_cores()

    def _default_batch_size(self) -> int:
        sizes = [self.spec.size, *(math.prod(condition.shape) for condition in self.spec.conditions)]
        values = _MAX_BATCH_VALUES
        if self._engine.convolves_on_cpu:
            values = min(values, _CACHED_VALUES_PER_CORE * self._num_threads)
        return max(1, min(_MAX_BATCH_SIZE, values // max(sizes)))


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
        check_cascade_flags(options)
        check_given_flags(options)
        choices = device_options(options)
        opened = [
            Sampler(path, options.provider, options.threads, device_options=choices)
            for path in (options.model, *options.then)
        ]
        sampler = opened[-1]
        draw: Any = sampler.sample
        if options.then:
            draw = partial(Cascade(opened).sample, low_resolution_noise=options.low_resolution_noise)
        check_suffix(options.output, sampler.spec)
        given = read_given(options, sampler.spec)
        for path, each in zip((options.model, *options.then), opened, strict=True):
            print(
                f"{printable(str(path))}: {each.spec.data['kind']} of shape {list(each.spec.shape)}, runs on "
                f"{each.runs_on}"
            )
        for note in given.notes:
            print(printable(note))
        started = time.perf_counter()
        if given.ends is not None:
            draw = partial(sampler.interpolate, *given.ends)
        samples = draw(
            given.num_samples,
            first_index=options.first_index,
            conditions=read_conditions(options.condition),
            time_limit=options.time_limit,
            on_row=_print_progress if sys.stderr.isatty() else None,
            **given.arguments,
            **sampling_options(options),
        )
        seconds = time.perf_counter() - started
        is_path = given.ends is not None
        labels_cycle = options.label is None and not is_path
        save_samples(samples, sampler.spec, options.output, labels_cycle=labels_cycle, is_path=is_path)
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
