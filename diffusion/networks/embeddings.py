"""Sinusoidal embeddings of timesteps and of coordinates."""

import math
from typing import Literal

import torch
from torch import Tensor

from diffusion.devices import widest_float

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
    if dim < 2:
        raise ValueError(f"embedding dim {dim}: need at least 2, one sine and one cosine")
    if layout not in ("interleaved", "concatenated"):
        raise ValueError(f"layout {layout!r}: choose interleaved or concatenated")
    numbers = timesteps.to(widest_float(timesteps.device)).unsqueeze(-1)
    if layout == "concatenated":
        half = dim // 2
        angles = numbers * _frequencies(half, max_period, max(half - 1, 1), numbers.device)
        columns = [torch.sin(angles), torch.cos(angles)]
        if dim % 2:
            columns.append(torch.zeros_like(numbers))
        return torch.cat(columns, dim=-1).to(dtype)
    angles = numbers * _frequencies((dim + 1) // 2, max_period, dim / 2, numbers.device)
    pairs = torch.stack([torch.sin(angles), torch.cos(angles)], dim=-1).flatten(-2)
    return pairs[..., :dim].to(dtype)


def _frequencies(count: int, max_period: float, divisor: float, device: torch.device) -> Tensor:
    """max_period^(-i / divisor) for i = 0, ..., count - 1."""
    exponents = torch.arange(count, dtype=widest_float(device), device=device) / divisor
    return torch.exp(-math.log(max_period) * exponents)
