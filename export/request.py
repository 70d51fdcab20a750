"""What a call of the exported sampler is asked for: its options, and the checked request. Loads no torch."""

import threading
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion.errors import InputError
from diffusion.process.given import Given, GivenOptions
from diffusion.process.samplers import SamplerTable
from diffusion.process.schedules import Spacing
from export.conditions import ConditionInputs
from export.gpu_loop import NoiseKeys
from export.labels import Labels
from export.noise import UInt32Array, normal_noise
from export.values import whole_number

MAX_SAMPLES = 10_000_000  # per call
NUM_INDICES = 2**32  # samples of one seed


class DrawOptions(TypedDict, total=False):
    """Arguments of `export.sampler.Sampler.sample` that say how samples are drawn."""

    sampler: str | None
    num_steps: int | None
    eta: float | None
    spacing: Spacing | None
    labels: Labels | None
    conditions: Mapping[str, ArrayLike] | None
    guidance_scale: float | None
    first_index: int
    batch_size: int | None


class StreamOptions(DrawOptions, GivenOptions, total=False):
    """Arguments of `Sampler.sample` that `Sampler.stream` passes on."""

    seed: int
    seeds: Sequence[int] | None


class InterpolationOptions(DrawOptions, total=False):
    """Arguments of `Sampler.sample` that `Sampler.interpolate` passes on."""

    time_limit: float | None
    stop: threading.Event | None
    on_row: Callable[[int, int], None] | None


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request; `samples`, in data units, is filled while it is drawn."""

    samples: NDArray[np.float32]
    seeds: UInt32Array  # one for all, [], or one per sample, [num_samples]
    first_index: int
    table: SamplerTable
    num_calls: int  # of the network, for each batch
    labels: NDArray[np.int64] | None
    conditions: ConditionInputs
    guidance_scale: float
    batch_size: int
    given: Given

    def noise(
        self, batch: slice, shape: tuple[int, ...], threads: int
    ) -> Callable[[int], NDArray[np.float64]]:
        """Function from a row of the table, or -1 for the start, to the noise of some of the samples."""
        seeds, indices = self._words(batch)
        return lambda row: normal_noise(seeds, indices, row + 1, shape, threads)

    def noise_keys(self, batch: slice, table: SamplerTable) -> NoiseKeys:
        """What a device makes the same noise of; `table` is the request's, or its last rows."""
        return NoiseKeys(*self._words(batch), first_k=self.table.num_rows - table.num_rows + 1)

    def _words(self, batch: slice) -> tuple[UInt32Array, UInt32Array]:
        """Seed and index of each sample."""
        count = batch.stop - batch.start
        if self.seeds.ndim == 0:
            first = self.first_index + batch.start
            return np.full(count, self.seeds), np.arange(first, first + count).astype(np.uint32)
        return self.seeds[batch], np.full(count, self.first_index, dtype=np.uint32)


def seed_list(seeds: Any, seed: Any, num_samples: Any) -> list[int]:
    """Check the seeds of a request, one for each sample."""
    if isinstance(seed, int) and seed != 0:
        raise InputError(f"seed {seed}: seeds are given too; give one of them")
    if isinstance(seeds, Set | Mapping):
        raise InputError(
            f"seeds of type {type(seeds).__name__}: give a list, whose order is that of the samples"
        )
    try:
        numbers = [whole_number(f"seeds[{index}]", each) for index, each in enumerate(seeds)]
    except TypeError as error:
        raise InputError(f"seeds {seeds!r}: give a list of whole numbers, one for each sample") from error
    if num_samples is not None and whole_number("num_samples", num_samples) != len(numbers):
        raise InputError(
            f"{len(numbers)} seeds for {num_samples} samples: give one per sample, or leave num_samples out"
        )
    return numbers
