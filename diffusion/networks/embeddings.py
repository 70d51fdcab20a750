"""Sinusoidal embeddings of timesteps and of coordinates."""

import math
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.devices import has_float64, widest_float
from diffusion.process.schedules import Float64Array

Layout = Literal["interleaved", "concatenated"]


def sinusoidal_embedding(
    timesteps: Tensor,
    dim: int,
    layout: Layout = "interleaved",
    max_period: float = 10000.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Embed numbers as sines and cosines of decreasing frequencies.

    "interleaved": column 2i is sin(t / max_period^(2i / dim)) and column 2i + 1 the cosine of the same
    angle; an odd `dim` ends with a sine. "concatenated", the layout of the DDPM code: all sines, then all
    cosines, with a last frequency of exactly 1 / max_period; an odd `dim` ends with a zero.

    Args:
        timesteps: integers or real numbers of any shape: timesteps, or coordinates times a frequency scale.
        dim: size of the embedding, at least 2.
        layout: order of the columns.
        max_period: longest period, divided by 2 pi.
        dtype: dtype of the result; it is computed in float64 (float32 on mps) and then converted.

    Returns:
        [..., dim].

    Raises:
        ValueError: dim < 2 or an unknown layout.

    Source: arXiv:1706.03762, Section 3.5, and source document 004 (interleaved); the code of
    arXiv:2006.11239 (concatenated); arXiv:2006.10739 and source document 000, Section 3.2 (coordinates).
    """
    frequencies, phases = (torch.from_numpy(each) for each in _angles(dim, layout, max_period))
    device = timesteps.device
    widest = widest_float(device)
    numbers = timesteps.to(widest)
    return _sines(numbers, frequencies.to(device, widest), phases.to(device, widest)).to(dtype)


class SinusoidalEmbedding(nn.Module):
    """`sinusoidal_embedding` in the interleaved layout, as a layer: it computes its frequencies once.

    It has neither weights nor buffers, so a model's files do not depend on it.

    Args:
        dim: size of the embedding, at least 2.
        scale: factor by which the numbers are multiplied first.
        dtype: dtype to compute in: float64 for timesteps, whose angles are large. Normalised coordinates
            are small enough for float32.

    Raises:
        ValueError: dim < 2.
    """

    def __init__(self, dim: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        frequencies, phases = _angles(dim, "interleaved", 10000.0)
        self._frequencies = torch.from_numpy(scale * frequencies).to(dtype)
        self._phases = torch.from_numpy(phases).to(dtype)

    def __deepcopy__(self, memo: dict[int, object]) -> "SinusoidalEmbedding":
        return self  # nothing in it changes

    def forward(self, numbers: Tensor) -> Tensor:
        """Embed integers or real numbers of any shape: float32 [..., dim]."""
        device, dtype = numbers.device, self._frequencies.dtype
        if self._frequencies.device != device:
            dtype = dtype if has_float64(device) else torch.float32
            self._frequencies, self._phases = (
                each.to(device, dtype) for each in (self._frequencies, self._phases)
            )
        return _sines(numbers.to(dtype), self._frequencies, self._phases).to(torch.float32)


def _sines(numbers: Tensor, frequencies: Tensor, phases: Tensor) -> Tensor:
    return torch.addcmul(phases, numbers.unsqueeze(-1), frequencies).sin()


@cache
def _angles(dim: int, layout: Layout, max_period: float) -> tuple[Float64Array, Float64Array]:
    """Frequency and phase of each column of an embedding, float64 [dim]; a cosine is a shifted sine."""
    if dim < 2:
        raise ValueError(f"embedding dim {dim}: need at least 2, one sine and one cosine")
    if layout == "interleaved":
        half, divisor = (dim + 1) // 2, dim / 2
    elif layout == "concatenated":
        half = dim // 2
        divisor = max(half - 1, 1)
    else:
        raise ValueError(f"layout {layout!r}: choose interleaved or concatenated")
    frequencies = np.exp(-math.log(max_period) * np.arange(half) / divisor)
    phases = np.zeros(half), np.full(half, math.pi / 2.0)
    if layout == "interleaved":
        return np.repeat(frequencies, 2)[:dim], np.stack(phases, axis=1).ravel()[:dim]
    end = np.zeros(dim % 2)  # the sine of 0
    return np.concatenate([frequencies, frequencies, end]), np.concatenate([*phases, end])
