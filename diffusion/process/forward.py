"""The forward process, its posterior, and conversions between prediction types, in PyTorch."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffusion.process.prediction_types import PredictionType
from diffusion.process.schedules import Float64Array, NoiseSchedule


def q_sample(schedule: NoiseSchedule, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Add noise to clean data in closed form: x_t ~ N(sqrt(alphas_cumprod) x_0, (1 - alphas_cumprod) I).

    Args:
        schedule: schedule with T timesteps.
        x_0: [batch, ...], clean data in normalised units.
        timesteps: int64 [batch], each in 0..T-1.
        noise: standard normal noise of x_0's shape.

    Returns:
        x_t, of x_0's shape and dtype.

    Source: DDPM, arXiv:2006.11239, Eq. 4; source document 001 prints another formula by mistake
    (docs/source-documents.md).
    """
    signal, sigma = _signal_and_sigma(schedule, timesteps, x_0)
    return signal * x_0 + sigma * noise


def q_step(schedule: NoiseSchedule, x_previous: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """One step of the forward process: x_t ~ N(sqrt(1 - beta_t) x_{t-1}, beta_t I).

    Args:
        schedule: schedule with T timesteps.
        x_previous: [batch, ...], x_{t-1}; for timestep 0 that is x_0.
        timesteps: int64 [batch], each in 0..T-1.
        noise: standard normal noise of x_previous's shape.

    Returns:
        x_t, of x_previous's shape and dtype.

    Source: DDPM, arXiv:2006.11239, Eq. 2; source document 002 drops an index of beta
    (docs/source-documents.md).
    """
    beta = _at_timesteps(schedule.betas, timesteps, x_previous)
    return (1.0 - beta).sqrt() * x_previous + beta.sqrt() * noise


def q_posterior(
    schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), which follows from three Gaussians by Bayes' rule.

        q(x_{t-1} | x_t, x_0) = q(x_t | x_{t-1}) q(x_{t-1} | x_0) / q(x_t | x_0)

    Args:
        schedule: schedule with T timesteps.
        x_0: [batch, ...], clean data.
        x_t: [batch, ...], x_0 with the noise of `timesteps`.
        timesteps: int64 [batch], each in 0..T-1.

    Returns:
        The mean, of x_0's shape, and the variance beta-tilde, [batch, 1, ...]. The variance is 0 at
        timestep 0, where x_{t-1} is x_0 itself.

    Source: DDPM, arXiv:2006.11239, Eqs. 6 and 7; source document 004 leaves out x_0 in Bayes' rule and
    calls the variance sigma (docs/source-documents.md).
    """
    coef1, coef2, variance = (
        _at_timesteps(values, timesteps, x_0)
        for values in (
            schedule.posterior_mean_coef1,
            schedule.posterior_mean_coef2,
            schedule.posterior_variance,
        )
    )
    return coef1 * x_0 + coef2 * x_t, variance


def to_x_0(
    schedule: NoiseSchedule, prediction_type: PredictionType, output: Tensor, x_t: Tensor, timesteps: Tensor
) -> Tensor:
    """The clean sample that a network's output implies; shapes as in `q_sample`.

    Source: DDPM, arXiv:2006.11239, Eq. 15, which is Eq. 4 solved for x_0; v as in arXiv:2202.00512,
    Appendix D.
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
    """The noise that a network's output implies; shapes and source as in `to_x_0`.

    If the output is x_0, 1 / sqrt(1 - alphas_cumprod) amplifies its rounding errors where there is
    little noise, such as at timestep 0.
    """
    signal, sigma = _signal_and_sigma(schedule, timesteps, x_t)
    if prediction_type == "sample":
        return (x_t - signal * output) / sigma
    if prediction_type == "v_prediction":
        return sigma * x_t + signal * output
    return output


def to_v(
    schedule: NoiseSchedule, prediction_type: PredictionType, output: Tensor, x_t: Tensor, timesteps: Tensor
) -> Tensor:
    """The velocity v = sqrt(alphas_cumprod) epsilon - sqrt(1 - alphas_cumprod) x_0 that an output implies.

    Shapes and source as in `to_x_0`.
    """
    if prediction_type == "v_prediction":
        return output
    signal, sigma = _signal_and_sigma(schedule, timesteps, x_t)
    if prediction_type == "epsilon":
        return (output - sigma * x_t) / signal
    return (signal * x_t - output) / sigma


def to_score(
    schedule: NoiseSchedule, prediction_type: PredictionType, output: Tensor, x_t: Tensor, timesteps: Tensor
) -> Tensor:
    """The score that an output implies, the gradient of ln q(x_t): -epsilon / sqrt(1 - alphas_cumprod).

    Shapes as in `to_x_0`.

    Source: arXiv:2011.13456, Section 3.4 and Appendix G, which relate DDPM to score matching.
    """
    _, sigma = _signal_and_sigma(schedule, timesteps, x_t)
    return -to_epsilon(schedule, prediction_type, output, x_t, timesteps) / sigma


def _signal_and_sigma(schedule: NoiseSchedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at `timesteps`, each [batch, 1, ...]."""
    signal, sigma = _schedule_factors(schedule, like.device, like.dtype)
    timesteps = timesteps.to(like.device)
    return _broadcastable(signal[timesteps], like), _broadcastable(sigma[timesteps], like)


def _broadcastable(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape((-1,) + (1,) * (like.ndim - 1))


def _at_timesteps(values: Float64Array, timesteps: Tensor, like: Tensor) -> Tensor:
    """values[timesteps] as [batch, 1, ...], in the dtype and on the device of `like`."""
    return _broadcastable(torch.tensor(values).to(like.device, like.dtype)[timesteps], like)


@lru_cache(maxsize=16)
def _schedule_factors(
    schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    alphas_cumprod = schedule.alphas_cumprod
    return (
        torch.from_numpy(np.sqrt(alphas_cumprod)).to(device, dtype),
        torch.from_numpy(np.sqrt(1.0 - alphas_cumprod)).to(device, dtype),
    )
