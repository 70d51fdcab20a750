"""The forward process, conversions between predictions, and the training loss, in torch."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.sampling import PredictionType
from diffusion.schedules import NoiseSchedule


def q_sample(schedule: NoiseSchedule, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Noise clean data in closed form: x_t ~ N(sqrt(alphas_cumprod) x_0, (1 - alphas_cumprod) I).

    Args:
        schedule: T timesteps.
        x_0: [batch, ...] clean data in normalised units.
        timesteps: int64 [batch], each in 0..T-1.
        noise: standard normal, of x_0's shape.

    Returns:
        x_t, of x_0's shape and dtype.

    Source: DDPM, arXiv:2006.11239, Eq. 4.
    """
    signal, sigma = _signal_and_sigma(schedule, timesteps, x_0)
    return signal * x_0 + sigma * noise


def to_x_0(
    schedule: NoiseSchedule, prediction_type: PredictionType, output: Tensor, x_t: Tensor, timesteps: Tensor
) -> Tensor:
    """The clean sample that a network's output implies; shapes as in `q_sample`.

    Source: DDPM, arXiv:2006.11239, Eq. 4 solved for x_0; v as in arXiv:2202.00512, Appendix D.
    """
    signal, sigma = _signal_and_sigma(schedule, timesteps, x_t)
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / signal
    if prediction_type == "v_prediction":
        return signal * x_t - sigma * output
    return output


def to_epsilon(
    schedule: NoiseSchedule, prediction_type: PredictionType, output: Tensor, x_t: Tensor, timesteps: Tensor
) -> Tensor:
    """The noise that a network's output implies; shapes and source as in `to_x_0`."""
    signal, sigma = _signal_and_sigma(schedule, timesteps, x_t)
    if prediction_type == "sample":
        return (x_t - signal * output) / sigma
    if prediction_type == "v_prediction":
        return sigma * x_t + signal * output
    return output


def to_v(
    schedule: NoiseSchedule, prediction_type: PredictionType, output: Tensor, x_t: Tensor, timesteps: Tensor
) -> Tensor:
    """The velocity v = sqrt(alphas_cumprod) epsilon - sqrt(1 - alphas_cumprod) x_0 of an output."""
    if prediction_type == "v_prediction":
        return output
    signal, sigma = _signal_and_sigma(schedule, timesteps, x_t)
    if prediction_type == "epsilon":
        return (output - sigma * x_t) / signal
    return (signal * x_t - output) / sigma


def epsilon_loss(
    network: nn.Module, schedule: NoiseSchedule, x_0: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Squared error of the predicted noise, averaged over batch and dimensions; a scalar.

    The paper's L_simple (Eq. 14) is the sum over dimensions: this is that divided by their number.
    Shapes as in `q_sample`; `network(x_t, timesteps)` returns epsilon.
    """
    output = network(q_sample(schedule, x_0, timesteps, noise), timesteps)
    return nn.functional.mse_loss(output, noise)


def _signal_and_sigma(schedule: NoiseSchedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    signal, sigma = _factors(schedule, like.device, like.dtype)
    shape = (-1,) + (1,) * (like.ndim - 1)
    return signal[timesteps].reshape(shape), sigma[timesteps].reshape(shape)


@lru_cache(maxsize=16)
def _factors(schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    alphas_cumprod = schedule.alphas_cumprod
    return (
        torch.from_numpy(np.sqrt(alphas_cumprod)).to(device, dtype),
        torch.from_numpy(np.sqrt(1.0 - alphas_cumprod)).to(device, dtype),
    )
