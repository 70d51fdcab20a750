"""Inpainting: sampling while a part of each sample is given. Does not import torch.

x is replaced by the noised known part before the first row of a sampler's table and after each row:

    x <- unknown x + known (sqrt(A) known_values + sqrt(1 - A) z)

where A is alphas_cumprod of x at that point, and z fresh noise. After the last row A is 1, so the known part
of the sample is exact.

The network sees the known part only with noise, and each row forgets what the rows before it have brought
into harmony, so the samples depend less on the known part than they should. Resampling runs the same rows
again, from x that is noised back to where they began:

    x <- sqrt(A_begin / A_end) x + sqrt(1 - A_begin / A_end) z

benchmarks/results/inpainting.md has the error that remains, by the number of repetitions.

Source: RePaint, arXiv:2201.09865, Algorithm 1 and Eqs. 8a to 8c; line 5 of the algorithm scales the noise by
the variance instead of its square root, which Eq. 8a has right. Unlike there, x is replaced before the first
row too, where alphas_cumprod may be far from 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diffusion.process.schedules import Float64Array

if TYPE_CHECKING:
    from torch import Tensor

# What is added to a row's index, by which it asks for noise: docs/onnx-format.md.
REPETITION = 2**20  # once for each time that the row has run before
KNOWN_NOISE = 2**31  # for the noise of the known part
JUMP_NOISE = 3 * 2**30  # for the noise by which x goes back to the row
MAX_RESAMPLING = 2**10


class Rows(Protocol):
    """What the order of the runs depends on: a `diffusion.process.samplers.SamplerTable` has it."""

    @property
    def num_rows(self) -> int: ...
    @property
    def rows_per_step(self) -> int: ...
    @property
    def alphas_cumprod(self) -> Float64Array: ...


@dataclass(frozen=True)
class RowRun:
    """One run of a row of the table.

    Attributes:
        row: index of the row.
        repetition: number of times that the row has run before.
        signal: A_begin / A_end of the jump back before this run; None without a jump.
    """

    row: int
    repetition: int = 0
    signal: float | None = None

    @property
    def noise_index(self) -> int:
        """Index of the run's noise, see `diffusion.process.samplers.trajectory`."""
        return self.row + self.repetition * REPETITION


@dataclass(frozen=True, eq=False)
class Inpainting:
    """The known part of a batch of samples, and how often rows are repeated.

    Attributes:
        known: known values, an array or tensor that broadcasts against [batch, *shape], normalised; any
            finite number where the value is not known.
        unknown: the same for whether a value is to be drawn: 1.0, or 0.0 where it is known.
        resampling: number of times that each step runs, from 1 (no resampling) to 1024. The last step, whose
            x has no noise, runs once.
        jump_length: number of consecutive steps that are repeated together, at least 1.

    Raises:
        ValueError: a number is out of range.
    """

    known: "NDArray[np.floating] | Tensor"
    unknown: "NDArray[np.floating] | Tensor"
    resampling: int = 1
    jump_length: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.resampling <= MAX_RESAMPLING:
            raise ValueError(f"resampling {self.resampling}: give 1 (none) to {MAX_RESAMPLING}")
        if self.jump_length < 1:
            raise ValueError(f"jump_length {self.jump_length}: give 1 or more")

    def map(self, convert: Callable[["NDArray[np.floating] | Tensor"], "Tensor"]) -> "Inpainting":
        """The same with both arrays converted, say to tensors."""
        return replace(self, known=convert(self.known), unknown=convert(self.unknown))

    def runs(self, table: Rows) -> Iterator[RowRun]:
        """The runs of a table's rows, in order; each makes one call of the network."""
        last = table.num_rows - 1
        rows_per_block = self.jump_length * table.rows_per_step
        for first in range(0, last, rows_per_block):
            stop = min(first + rows_per_block, last)
            with np.errstate(divide="ignore", invalid="ignore"):  # a broken file shows in its samples
                signal = float(table.alphas_cumprod[first] / table.alphas_cumprod[stop])
            for repetition in range(self.resampling):
                for row in range(first, stop):
                    jumps = repetition > 0 and row == first
                    yield RowRun(row, repetition, signal if jumps else None)
        yield RowRun(last)

    def num_runs(self, table: Rows) -> int:
        """Number of network calls."""
        return (table.num_rows - 1) * self.resampling + 1


def inject(x: Any, inpainting: Inpainting, alphas_cumprod: float, noise: Callable[[], Any]) -> Any:
    """Replace the known part of x.

    Args:
        x: [batch, *shape].
        inpainting: the known part.
        alphas_cumprod: fraction of x's variance that is signal.
        noise: function that gives standard normal noise of x's shape; not called if x has no noise.
    """
    known: Any = inpainting.known
    if alphas_cumprod != 1.0:
        known = noised(known, alphas_cumprod, noise())
    return inpainting.unknown * x + (1.0 - inpainting.unknown) * known


def noised(x_0: Any, signal: float, noise: Any) -> Any:
    """Noise x_0: sqrt(signal) x_0 + sqrt(1 - signal) noise, for arrays and tensors.

    Source: DDPM, arXiv:2006.11239, Eq. 4, with signal = alphas_cumprod.
    """
    with np.errstate(invalid="ignore"):  # NaN of a broken file's numbers shows in its samples
        return float(np.sqrt(signal)) * x_0 + float(np.sqrt(1.0 - signal)) * noise
