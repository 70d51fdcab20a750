"""The forward process, its posterior, and conversions between predictions, in torch."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffusion.sampling import PredictionType
from diffusion.schedules import Float64Array, NoiseSchedule


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

    Seed 001 prints q(x_t | x_{t-1}), Eq. 2, a second time where it announces q(x_t | x_0). That cannot
    be: with x_0 in x_{t-1}'s place it would say that one step's noise is all there is at any t.
    """
    signal, sigma = _signal_and_sigma(schedule, timesteps, x_0)
    return signal * x_0 + sigma * noise


def q_step(schedule: NoiseSchedule, x_previous: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """One step of the forward process: x_t ~ N(sqrt(1 - beta_t) x_{t-1}, beta_t I).

    Args:
        schedule: T timesteps.
        x_previous: [batch, ...] x_{t-1}; before timestep 0 that is x_0.
        timesteps: int64 [batch], each in 0..T-1.
        noise: standard normal, of x_previous's shape.

    Returns:
        x_t, of x_previous's shape and dtype.

    Source: DDPM, arXiv:2006.11239, Eq. 2.

    Seed 002 prints sqrt(1 - beta) without the index. That cannot be: only with the step's own beta_t do
    the two variances add up, (1 - beta_t) + beta_t = 1, for data of unit variance.
    """
    beta = _at(schedule.betas, timesteps, x_previous)
    return (1.0 - beta).sqrt() * x_previous + beta.sqrt() * noise


def q_posterior(
    schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), which Bayes' rule makes of three Gaussians.

        q(x_{t-1} | x_t, x_0) = q(x_t | x_{t-1}) q(x_{t-1} | x_0) / q(x_t | x_0)

    Args:
        schedule: T timesteps.
        x_0: [batch, ...] clean data.
        x_t: [batch, ...] noised to `timesteps`.
        timesteps: int64 [batch], each in 0..T-1.

    Returns:
        The mean, of x_0's shape, and the variance, beta-tilde, [batch, 1, ...]: 0 at timestep 0, where
        x_{t-1} is x_0 itself.

    Source: DDPM, arXiv:2006.11239, Eqs. 6 and 7.

    Seed 004 has the right mean and variance, but leaves x_0 out on the left of the rule and calls the
    variance sigma. Without x_0 the left side is no Gaussian at all (for data at two points it has two
    peaks), and sigma is the variance's root.
    """
    coef1, coef2, variance = (
        _at(values, timesteps, x_0)
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
    """The noise that a network's output implies; shapes and source as in `to_x_0`.

    At timestep 0 of a gentle schedule 1 / sqrt(1 - alphas_cumprod) multiplies the rounding of x_0.
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
    """The velocity v = sqrt(alphas_cumprod) epsilon - sqrt(1 - alphas_cumprod) x_0 of an output."""
    if prediction_type == "v_prediction":
        return output
    signal, sigma = _signal_and_sigma(schedule, timesteps, x_t)
    if prediction_type == "epsilon":
        return (output - sigma * x_t) / signal
    return (signal * x_t - output) / sigma


def to_score(
    schedule: NoiseSchedule, prediction_type: PredictionType, output: Tensor, x_t: Tensor, timesteps: Tensor
) -> Tensor:
    """The score, the gradient of ln q(x_t) by x_t, that a network's output implies; shapes as in `to_x_0`.

    It is -epsilon / sqrt(1 - alphas_cumprod): the exact denoiser's is E[grad ln q(x_t | x_0) | x_t].

    Source: arXiv:2011.13456, Eq. 7; DDPM, arXiv:2006.11239, Section 3.2.
    """
    _, sigma = _signal_and_sigma(schedule, timesteps, x_t)
    return -to_epsilon(schedule, prediction_type, output, x_t, timesteps) / sigma


def _signal_and_sigma(schedule: NoiseSchedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    signal, sigma = _factors(schedule, like.device, like.dtype)
    return _shaped(signal[timesteps], like), _shaped(sigma[timesteps], like)


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape((-1,) + (1,) * (like.ndim - 1))


def _at(values: Float64Array, timesteps: Tensor, like: Tensor) -> Tensor:
    """values[timesteps] as [batch, 1, ...], in the dtype and on the device of `like`."""
    return _shaped(torch.tensor(values).to(like.device, like.dtype)[timesteps], like)


@lru_cache(maxsize=16)
def _factors(schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    alphas_cumprod = schedule.alphas_cumprod
    return (
        torch.from_numpy(np.sqrt(alphas_cumprod)).to(device, dtype),
        torch.from_numpy(np.sqrt(1.0 - alphas_cumprod)).to(device, dtype),
    )
