"""Sampling that starts at given samples with noise, instead of at pure noise. Does not import torch.

Source: SDEdit, arXiv:2108.01073, Algorithm 1.
"""

from collections.abc import Callable
from typing import Any

from diffusion.process.inpainting import noised
from diffusion.process.samplers import SamplerTable


def start_from(
    x_0: Any, strength: float, table: SamplerTable, noise: Callable[[int], Any]
) -> tuple[SamplerTable, Callable[[int], Any]]:
    """What `diffusion.process.samplers.trajectory` runs to start from given samples.

    Args:
        x_0: the samples, an array or tensor that broadcasts against [batch, *shape], normalised.
        strength: fraction of the steps that run, in (0, 1]: the last max(1, round(strength * num_steps)).
            x_0 is noised to the level of x before the first of them.
        table: table of the sampler.
        noise: function (row index) -> standard normal noise, with -1 for the initial noise.

    Returns:
        The table of the steps that run; and the function (row index of that table) -> noise, which for -1
        gives the noised samples. A row keeps the noise that it has in the whole table.

    Raises:
        ValueError: strength is not in (0, 1].
    """
    row = first_row(table, strength)

    def noise_from_row(index: int) -> Any:
        if index == -1:
            return noised(x_0, table.alphas_cumprod[row], noise(-1))
        return noise(index + row)

    return table.from_row(row), noise_from_row


def first_row(table: SamplerTable, strength: float) -> int:
    """The row at which sampling starts, see `start_from`.

    Raises:
        ValueError: strength is not in (0, 1].
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength {strength:g}: give a number above 0, up to 1")
    steps = max(1, round(strength * table.num_steps))
    return (table.num_steps - steps) * table.rows_per_step
