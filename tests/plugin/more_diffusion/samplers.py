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


def midpoint(steps: SamplingSteps) -> list[Stage]:
    """The midpoint method: a step of Euler's to a timestep m in the middle, whose slope takes the whole step.

        first row:  u_m = u_t + (sigma_m - sigma_t) (u_t - x0) / sigma_t
        second row: u_s = u_t + (sigma_s - sigma_t) (u_m - x0') / sigma_m

    In the second row x is x_m, x0 is x0', and x0_previous is the first row's x0. So u_t in it is
    (sigma_t u_m - (sigma_t - sigma_m) x0_previous) / sigma_m. Without a timestep in between, m is t and the
    step is Euler's.

    Source: arXiv:2206.00364, Algorithm 3, with timestep m in place of the fraction alpha.
    """
    timesteps_m = (steps.timesteps_t + steps.timesteps_s + 1) // 2
    alphas_cumprod_m = steps.schedule.alphas_cumprod[timesteps_m]
    sigma_t, sigma_m, sigma_s = (
        np.sqrt((1.0 - each) / each)
        for each in (steps.alphas_cumprod_t, alphas_cumprod_m, steps.alphas_cumprod_s)
    )
    scale_t, scale_m, scale_s = (
        np.sqrt(each) for each in (steps.alphas_cumprod_t, alphas_cumprod_m, steps.alphas_cumprod_s)
    )
    return [
        Stage(c=scale_m * (1.0 - sigma_m / sigma_t), d=scale_m / scale_t * sigma_m / sigma_t),
        Stage(
            c=scale_s * (sigma_t - sigma_s) / sigma_m,
            d=scale_s / scale_m * sigma_s / sigma_m,
            e=-scale_s * (sigma_t - sigma_m) / sigma_m,
            timesteps=timesteps_m,
        ),
    ]


MIDPOINT = SamplingMethod(stages=midpoint, rows_per_step=2, parity_steps=20)
