"""Runs sampler.onnx with numpy and ONNX Runtime; no PyTorch.

    sampler = Sampler("sampler.onnx")
    digits = sampler.sample(64, seed=0)          # [64, 1, 8, 8] in data units

or `python -m export.sampler sampler.onnx --num-samples 64 --output grid.png`.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.sampling import SamplerName, SamplerTable, last_sample, sampler_table, trajectory
from diffusion.schedules import Spacing
from export.arguments import OneLineParser
from export.labels import Labels, chosen_labels
from export.noise import normal_noise
from export.output import check_suffix, save_samples
from export.session import Provider, open_session
from export.spec import SamplerSpec

_MOST_SAMPLES = 10_000_000  # of one call
_LARGEST_FILE = 2 * 1024**3  # the limit of one protobuf file


class Sampler:
    """A denoiser and its sampling loop.

    Args:
        model: path of a sampler.onnx, or its bytes.
        provider: "cpu", "cuda" (insists), or "auto" (CUDA where it works); `runs_on` says which
            it became.

    Attributes:
        spec: what the file's metadata say.
        runs_on: "CPU" or "CUDA", with the reason where "auto" fell back.

    Raises:
        InputError: no such file, not a file that export.to_onnx wrote, or CUDA cannot be had.
    """

    def __init__(self, model: str | Path | bytes, provider: Provider = "auto") -> None:
        if provider not in get_args(Provider):
            raise InputError(f"provider {provider!r}: choose one of {', '.join(get_args(Provider))}")
        content = model if isinstance(model, bytes) else _read(Path(model))
        try:
            self._session, self.runs_on = open_session(content, provider)
            self.spec = SamplerSpec.from_metadata(self._session.get_modelmeta().custom_metadata_map)
            self._check_signature()
        except InputError as error:
            if isinstance(model, bytes):
                raise
            raise InputError(f"{model}: {error}") from error

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
        batch_size: int = 1024,
        on_row: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Draw samples.

        Sample i of a seed is the same whatever `num_samples` and `batch_size` are.

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
            batch_size: samples that go through the network at a time.
            on_row: called with (network calls done, network calls in all) after each.

        Returns:
            float32 [num_samples, *shape] in data units.

        Raises:
            InputError: a number out of range, or an unknown name.
        """
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if not 1 <= value <= _MOST_SAMPLES:
                raise InputError(f"{name} {value}: give 1 to {_MOST_SAMPLES}")
        numbers = chosen_labels(labels, num_samples, self.spec.classes)
        scale = self._guidance_scale(guidance_scale)
        table = self.table(sampler=sampler, num_steps=num_steps, eta=eta, spacing=spacing)
        starts = range(0, num_samples, batch_size)
        calls = 0

        def denoise(
            x: NDArray[np.float64], timestep: int, y: NDArray[np.int64] | None
        ) -> NDArray[np.float64]:
            nonlocal calls
            out = self.denoise(x, timestep, y, scale)
            calls += 1
            if on_row is not None:
                on_row(calls, len(starts) * len(table.timesteps))
            return out

        batches = []
        for start in starts:
            indices = np.arange(start, min(start + batch_size, num_samples))
            noise = partial(self._noise, seed, indices)
            known = partial(denoise, y=None if numbers is None else numbers[indices])
            x = last_sample(trajectory(known, noise(-1), table, noise))
            batches.append(self.spec.denormalise(x).astype(np.float32))
        return np.concatenate(batches)

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
        if labels is None or guidance_scale == 1.0:
            return self._call(x, timestep, labels)
        null = np.full_like(labels, len(self.spec.classes))
        both = self._call(np.concatenate([x, x]), timestep, np.concatenate([null, labels]))
        unconditional, conditional = both[: len(x)], both[len(x) :]
        return unconditional + guidance_scale * (conditional - unconditional)

    def _call(
        self, x: NDArray[np.float64], timestep: int, labels: NDArray[np.int64] | None
    ) -> NDArray[np.float64]:
        inputs = {"x": x.astype(np.float32), "t": np.full(len(x), timestep, dtype=np.int64)}
        if labels is not None:
            inputs["y"] = labels
        return self._session.run(["model_output"], inputs)[0].astype(np.float64)

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


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise InputError(f"{path} has {path.stat().st_size} bytes: a sampler has at most {_LARGEST_FILE}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give the path of a sampler.onnx"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """The command line: draw samples and write them to a file."""
    parser = OneLineParser(prog="python -m export.sampler", description="Draw samples from a sampler.onnx.")
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument(
        "--output", type=Path, default=Path("samples.png"), help=".png, .npy or .csv (points)"
    )
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", choices=get_args(SamplerName), help="default: the file's own")
    parser.add_argument("--steps", type=int, help="network evaluations; default: the file's own")
    parser.add_argument("--eta", type=float, help="DDIM's share of fresh noise, 0 to 1")
    parser.add_argument("--spacing", choices=get_args(Spacing), help="which timesteps are visited")
    parser.add_argument("--label", help="a class's name; default: every class in turn")
    parser.add_argument("--guidance-scale", type=float, help="1: the class as learned, 0: no class")
    parser.add_argument("--provider", choices=get_args(Provider), default="auto")
    options = parser.parse_args(arguments)
    try:
        sampler = Sampler(options.model, options.provider)
        check_suffix(options.output, sampler.spec)
        print(
            f"{options.model}: {sampler.spec.data['kind']} of shape {list(sampler.spec.shape)}, "
            f"on {sampler.runs_on}"
        )
        started = time.perf_counter()
        samples = sampler.sample(
            options.num_samples,
            seed=options.seed,
            sampler=options.sampler,
            num_steps=options.steps,
            eta=options.eta,
            spacing=options.spacing,
            labels=options.label,
            guidance_scale=options.guidance_scale,
            on_row=_progress if sys.stderr.isatty() else None,
        )
        seconds = time.perf_counter() - started
        save_samples(samples, sampler.spec, options.output, in_turn=options.label is None)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {len(samples)} samples in {seconds:.1f} s")
    return 0


def _progress(done: int, total: int) -> None:
    print(f"\r{done}/{total} network calls", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
