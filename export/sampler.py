"""Runs sampler.onnx with numpy and ONNX Runtime; no PyTorch.

    sampler = Sampler("sampler.onnx")
    digits = sampler.sample(64, seed=0)          # [64, 1, 8, 8] in data units

or `python -m export.sampler sampler.onnx --num-samples 64 --output grid.png`.
"""

import math
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.sampling import SamplerName, SamplerTable, sampler_table
from diffusion.schedules import Spacing
from export.command import choices_of, sampler_parser
from export.doctor import doctors_report
from export.engine import Engine
from export.labels import Labels, chosen_labels
from export.limits import Cancelled, OutOfMemory, Watch
from export.noise import normal_noise
from export.output import check_suffix, save_samples
from export.session import Provider

__all__ = ["Cancelled", "Sampler"]

_MOST_SAMPLES = 10_000_000  # of one call
_MOST_INDICES = 2**32  # of one seed
_LARGEST_FILE = 2 * 1024**3  # the limit of one protobuf file
_MOST_OF_A_BATCH, _MOST_VALUES_OF_A_BATCH = 1024, 2**22


class Sampler:
    """A denoiser and its sampling loop.

    Args:
        model: path of a sampler.onnx, or its bytes.
        provider: "cpu", "cuda" (insists), or "auto" (CUDA where it works); `runs_on` says which
            it became.
        threads: of the processor; None is one for a tiny model and one a core for others.

    It may be used from several threads at once.

    Attributes:
        spec: what the file's metadata say.

    Raises:
        InputError: no such file, not a file that export.to_onnx wrote, or CUDA cannot be had.
    """

    def __init__(
        self, model: str | Path | bytes, provider: Provider = "auto", threads: int | None = None
    ) -> None:
        if threads is not None and not 1 <= threads <= 1024:
            raise InputError(f"threads {threads}: give 1 to 1024")
        if provider not in get_args(Provider):
            raise InputError(f"provider {provider!r}: choose one of {', '.join(get_args(Provider))}")
        content = model if isinstance(model, bytes) else _read(Path(model))
        try:
            self._engine = Engine(content, provider, threads)
        except InputError as error:
            if isinstance(model, bytes):
                raise
            raise InputError(f"{model}: {error}") from error
        self.spec = self._engine.spec

    @property
    def runs_on(self) -> str:
        """ "CPU" or "CUDA", with the reason where "auto" fell back or CUDA graphs could not be had."""
        return self._engine.runs_on

    @classmethod
    def from_registry(cls, uri: str, provider: Provider = "auto") -> "Sampler":
        """The sampler of a model registered in MLflow, such as models:/ray-ddpm-digits@champion.

        Raises:
            InputError: MLflow is not installed, has no such model, or it holds no sampler.onnx.
        """
        from export.registered import registered_file

        return cls(registered_file(uri), provider)

    def sample(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        sampler: SamplerName | None = None,
        num_steps: int | None = None,
        eta: float | None = None,
        spacing: Spacing | None = None,
        labels: Labels | None = None,
        guidance_scale: float | None = None,
        first_index: int = 0,
        batch_size: int | None = None,
        time_limit: float | None = None,
        stop: threading.Event | None = None,
        on_row: Callable[[int, int], None] | None = None,
        on_preview: Callable[[NDArray[np.float32]], None] | None = None,
    ) -> NDArray[np.float32]:
        """Draw samples.

        Sample i of a seed is the same whatever `num_samples`, `first_index` and `batch_size` are.

        Args:
            num_samples: at least 1.
            seed: of the noise, modulo 2^32.
            sampler: "ddpm", "ddim" or "dpmpp_2m"; None is the file's own, as are the next three.
            num_steps: network evaluations, from 1 to the number of training timesteps.
            eta: DDIM's share of fresh noise, in [0, 1].
            spacing: which timesteps are visited.
            labels: of a conditional model: a class's name or number, or one for each sample; None is
                every class in turn.
            guidance_scale: of a conditional model: 1 is the class as learned, 0 no class, more
                exaggerates it; None is the file's own.
            first_index: draw samples first_index, first_index + 1, ... of the seed.
            batch_size: samples that go through the network at a time; None is by their size. Halved
                where they do not fit into memory.
            time_limit: seconds that it may take.
            stop: ends it when set, also while the network is being called.
            on_row: called with (network calls done, network calls in all) after each.
            on_preview: called after each network call with what the batch at hand is thought to become:
                float32 [batch, *shape] in data units.

        Returns:
            float32 [num_samples, *shape] in data units.

        Raises:
            InputError: a number out of range, an unknown name, a graph that cannot be run, samples that
                are not finite, or the time is up.
            Cancelled: `stop` was set.
        """
        at_once = _batch_size(self.spec.size) if batch_size is None else batch_size
        for name, value in (("num_samples", num_samples), ("batch_size", at_once)):
            if not 1 <= value <= _MOST_SAMPLES:
                raise InputError(f"{name} {value}: give 1 to {_MOST_SAMPLES}")
        if not 0 <= first_index <= _MOST_INDICES - num_samples:
            raise InputError(f"first_index {first_index}: give 0 to {_MOST_INDICES - num_samples}")
        numbers = chosen_labels(labels, num_samples, self.spec.classes, first_index)
        scale = self._guidance_scale(guidance_scale)
        table = self.table(sampler=sampler, num_steps=num_steps, eta=eta, spacing=spacing)
        samples = np.empty((num_samples, *self.spec.shape), dtype=np.float32)
        done = batches = calls = 0

        def after_row(x0: Callable[[], NDArray[np.float64]]) -> None:
            nonlocal calls
            calls += 1
            if on_row is not None:
                planned = batches + math.ceil((num_samples - done) / at_once)
                on_row(calls, planned * len(table.timesteps))
            if on_preview is not None:
                on_preview(self.spec.denormalise(x0()).astype(np.float32))

        # What is not finite is refused below, so numpy need not warn of it.
        with Watch(time_limit, stop) as watch, np.errstate(over="ignore", invalid="ignore"):
            while done < num_samples:
                places = slice(done, min(done + at_once, num_samples))
                indices = first_index + np.arange(places.start, places.stop)
                noise = partial(self._noise, seed, indices)
                known = None if numbers is None else numbers[places]
                try:
                    x = self._engine.run(table, noise, known, scale, watch, after_row)
                except OutOfMemory as error:
                    if len(indices) == 1:
                        raise InputError(f"one sample does not fit into memory: {error}") from error
                    calls, at_once = batches * len(table.timesteps), len(indices) // 2
                    continue
                if not np.isfinite(x).all():
                    raise InputError(
                        "the samples are not finite: the model is broken, or diverges with this sampler; "
                        "choose another one, or more steps"
                    )
                samples[places] = self.spec.denormalise(x)
                done, batches = places.stop, batches + 1
        return samples

    def table(
        self,
        *,
        sampler: SamplerName | None = None,
        num_steps: int | None = None,
        eta: float | None = None,
        spacing: Spacing | None = None,
    ) -> SamplerTable:
        """The file's own table, or one with some of its choices replaced; arguments as in `sample`."""
        if sampler is None and num_steps is None and eta is None and spacing is None:
            return self.spec.table
        own = self.spec.sampler
        name = sampler or own["name"]
        if eta and name != "ddim":
            raise InputError(
                f"eta {eta:g}: only the sampler ddim has it, not {name}; choose ddim or leave eta out"
            )
        try:
            return sampler_table(
                self.spec.noise_schedule,
                name,
                own["num_steps"] if num_steps is None else num_steps,
                prediction_type=self.spec.prediction_type,
                eta=own["eta"] if eta is None else eta,
                variance=own["variance"],
                spacing=spacing or own["spacing"],
                clip=own["clip"],
            )
        except ValueError as error:
            raise InputError(str(error)) from error

    def denoise(
        self,
        x: NDArray[np.float64],
        timestep: int,
        labels: NDArray[np.int64] | None = None,
        guidance_scale: float = 1.0,
    ) -> NDArray[np.float64]:
        """One guided output of the network.

        Args:
            x: [batch, *shape] normalised.
            timestep: 0-based.
            labels: int64 [batch] of a conditional model; the null label is the number of classes.
            guidance_scale: out_uncond + guidance_scale * (out_cond - out_uncond).

        Source: classifier-free guidance, arXiv:2207.12598, Eq. 6 with guidance_scale = 1 + w.
        """
        return self._engine.denoise(x, timestep, labels, guidance_scale, Watch())

    def _guidance_scale(self, given: float | None) -> float:
        if given is None:
            return float(self.spec.sampler["guidance_scale"])
        if not self.spec.classes:
            raise InputError(f"guidance_scale {given:g}: this model knows no classes; leave it out")
        if not 0.0 <= given <= 100.0:
            raise InputError(f"guidance_scale {given:g}: give 0 to 100, such as 3")
        return given

    def _noise(self, seed: int, indices: NDArray[np.int64], row: int) -> NDArray[np.float64]:
        return normal_noise(seed, indices, row + 1, self.spec.shape)


def _batch_size(size: int) -> int:
    return max(1, min(_MOST_OF_A_BATCH, _MOST_VALUES_OF_A_BATCH // size))


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a file: give the path of a sampler.onnx")
        if path.stat().st_size > _LARGEST_FILE:
            raise InputError(f"{path} has {path.stat().st_size} bytes: a sampler has at most {_LARGEST_FILE}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give the path of a sampler.onnx"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """The command line: draw samples and write them to a file, or say what this machine can run."""
    parser = sampler_parser()
    options = parser.parse_args(arguments)
    if options.doctor:
        lines, healthy = doctors_report(options.provider)
        print("\n".join(lines))
        return 0 if healthy else 1
    if options.model is None:
        parser.error("give the path of a sampler.onnx")
    try:
        sampler = Sampler(options.model, options.provider, options.threads)
        check_suffix(options.output, sampler.spec)
        print(
            f"{options.model}: {sampler.spec.data['kind']} of shape {list(sampler.spec.shape)}, "
            f"on {sampler.runs_on}"
        )
        started = time.perf_counter()
        samples = sampler.sample(
            options.num_samples,
            first_index=options.first_index,
            time_limit=options.time_limit,
            on_row=_progress if sys.stderr.isatty() else None,
            **choices_of(options),
        )
        seconds = time.perf_counter() - started
        save_samples(samples, sampler.spec, options.output, in_turn=options.label is None)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.output}: {len(samples)} samples in {seconds:.1f} s")
    return 0


def _progress(done: int, total: int) -> None:
    print(f"\r{done}/{total} network calls", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
