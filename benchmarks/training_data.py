"""Data that we and a peer train on, the loss that judges both, and updates that are timed in blocks."""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.contender import CPU_SECONDS, SECONDS, Figures, Measure, timed
from benchmarks.judgement_data import coloured
from diffusion.config import DataConfig
from diffusion.data.dataset import Dataset, load_dataset
from diffusion.data.memory import dataset_from_memory

UPDATES, CPU_MS, LOSS = "updates/s", "CPU ms per update", "held-out loss"
_DIGITS = re.compile(r"digits at ([13])x(\d+)x\d+")
_NUM_HELD_OUT = 256


def digits_at(channels: int, side: int) -> str:
    """Name of scikit-learn's digits, enlarged to a side in pixels and coloured if there are 3 channels."""
    return f"digits at {channels}x{side}x{side}"


GREY_28, COLOUR_32 = digits_at(1, 28), digits_at(3, 32)


def load(name: str) -> Dataset:
    """Data that `digits_at` names, or whatever --data of train.py takes.

    Raises:
        InputError: there are no such data, or they cannot be downloaded.
    """
    match = _DIGITS.fullmatch(name)
    if match is None:
        return load_dataset(DataConfig(name=name))
    from sklearn.datasets import load_digits

    grey = torch.from_numpy(load_digits().images[:, None] * (255.0 / 16.0))
    channels, side = int(match[1]), int(match[2])
    large = torch.nn.functional.interpolate(grey, size=(side, side), mode="bilinear").round().byte().numpy()
    return dataset_from_memory(large if channels == 1 else coloured(large, np.random.default_rng(0)))


def updates_in_blocks(run: Callable[[int], object], num_updates: int, loss: Callable[[], float]) -> Measure:
    """A measure of one more block of updates; a first block is over when this returns.

    Args:
        run: updates this often.
        num_updates: updates of a block.
        loss: off the clock, the loss after each block.
    """
    run(num_updates)

    def measure() -> Figures:
        figures = timed(lambda: run(num_updates))
        return {
            UPDATES: num_updates / figures[SECONDS],
            CPU_MS: 1e3 * figures[CPU_SECONDS] / num_updates,
            LOSS: loss(),
        }

    return measure


@torch.no_grad()
def held_out_loss(
    network: Callable[[Tensor, Tensor], Tensor], dataset: Dataset, alphas_cumprod: Tensor
) -> float:
    """Mean squared error of epsilon on validation examples, with the same timesteps and noise in every call.

    Args:
        network: (x_t [batch, *shape], t [batch]) -> epsilon, in float32.
        dataset: the data.
        alphas_cumprod: float32 [T] of the schedule that the network was trained with.
    """
    x_0 = dataset.val[:][:_NUM_HELD_OUT]
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0.device)
    timesteps = torch.linspace(0, len(alphas_cumprod) - 1, len(x_0)).long().to(x_0.device)
    level = alphas_cumprod.to(x_0.device)[timesteps].view(-1, *[1] * (x_0.ndim - 1))
    out = network(level.sqrt() * x_0 + (1.0 - level).sqrt() * noise, timesteps)
    return float((out - noise).square().mean())
