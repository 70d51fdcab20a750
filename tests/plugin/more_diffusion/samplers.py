"""A sampler with one network evaluation a step, and one with two."""

import numpy as np

from diffusion.process.sampling_methods import SamplingMethod, SamplingSteps, Stage


def euler_ancestral(steps: SamplingSteps) -> list[Stage]:
    """Euler's method down to a lower noise level, then fresh noise up to the next one.

        u_s = u_t + (sigma_down - sigma_t) (u_t - x0) / sigma_t + sigma_up z

    with u = x / sqrt(A), sigma = sqrt((1 - A) / A), sigma_up = eta sigma_s sqrt(1 - (sigma_s / sigma_t)^2)
    and sigma_down^2 = sigma_s^2 - sigma_up^2.
    """
    sigma_t = np.sqrt((1.0 - steps.alphas_cumprod_t) / steps.alphas_cumprod_t)
    sigma_s = np.sqrt((1.0 - steps.alphas_cumprod_s) / steps.alphas_cumprod_s)
    sigma_up = steps.eta * sigma_s * np.sqrt(1.0 - (sigma_s / sigma_t) ** 2)
    ratio = np.sqrt(sigma_s**2 - sigma_up**2) / sigma_t
    scale_t, scale_s = np.sqrt(steps.alphas_cumprod_t), np.sqrt(steps.alphas_cumprod_s)
    return [Stage(c=scale_s * (1.0 - ratio), d=scale_s / scale_t * ratio, s=scale_s * sigma_up)]


EULER_ANCESTRAL = SamplingMethod(stages=euler_ancestral, uses_eta=True, parity_steps=20)


def heun(steps: SamplingSteps) -> list[Stage]:
    """Heun's method: a step of Euler's, then a second evaluation at its end, and the mean of both slopes.

        predictor: u_s = u_t + (sigma_s - sigma_t) (u_t - x0) / sigma_t
        corrector: u_s = u_t + (sigma_s - sigma_t) ((u_t - x0) / sigma_t + (u_s - x0') / sigma_s) / 2

    In the second row x is the predictor's result, x0 is x0', and x0_previous is the first row's x0. Since
    the first slope is (u_s - x0_previous) / sigma_s as well, the corrector adds a multiple of
    x0' - x0_previous to the predictor's result.

    Source: arXiv:2206.00364, Algorithm 1.
    """
    sigma_t = np.sqrt((1.0 - steps.alphas_cumprod_t) / steps.alphas_cumprod_t)
    sigma_s = np.sqrt((1.0 - steps.alphas_cumprod_s) / steps.alphas_cumprod_s)
    scale_t, scale_s = np.sqrt(steps.alphas_cumprod_t), np.sqrt(steps.alphas_cumprod_s)
    ratio = sigma_s / sigma_t
    weight = scale_s * (sigma_t - sigma_s) / (2.0 * sigma_s)
    return [
        Stage(c=scale_s * (1.0 - ratio), d=scale_s / scale_t * ratio),
        Stage(c=weight, d=1.0, e=-weight, timesteps=steps.timesteps_s),
    ]


HEUN = SamplingMethod(stages=heun, rows_per_step=2, parity_steps=20)
