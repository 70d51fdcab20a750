"""The reverse step p(x_s | x_t) of ancestral sampling: its mean, its variance and its terms in the bound.

Everything is numpy float64. x_s is less noisy than x_t, so alphas_cumprod_s > alphas_cumprod_t.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffusion.process.schedules import Float64Array, NoiseSchedule

Variance = Literal["beta_tilde", "beta"]


def ancestral_coefficients(
    alphas_cumprod_t: Float64Array,
    alphas_cumprod_s: Float64Array,
    variance: Variance = "beta_tilde",
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Coefficients of p(x_s | x_t) = N(c x0 + d x_t, s^2 I), where x0 is the network's prediction of x_0.

    With the true x_0 and beta-tilde it is q(x_s | x_t, x_0) (DDPM, Eqs. 6 and 7). The variances:
        beta_tilde: exact if the data are a single point (DDPM, Section 3.2).
        beta: exact if the data are N(0, I).

    Args:
        alphas_cumprod_t: [steps], before each step, at least 0.
        alphas_cumprod_s: [steps], after each step, larger than `alphas_cumprod_t` and at most 1.
        variance: choice of s^2.

    Returns:
        c, d and s^2, float64 [steps] each.
    """
    beta = 1.0 - alphas_cumprod_t / alphas_cumprod_s
    beta_tilde = beta * (1.0 - alphas_cumprod_s) / (1.0 - alphas_cumprod_t)
    c = np.sqrt(alphas_cumprod_s) * beta / (1.0 - alphas_cumprod_t)
    d = np.sqrt(alphas_cumprod_t / alphas_cumprod_s) * (1.0 - alphas_cumprod_s) / (1.0 - alphas_cumprod_t)
    return c, d, beta_tilde if variance == "beta_tilde" else beta


@dataclass(frozen=True, eq=False)
class BoundTerms:
    """L_t = constants[t] + weights[t] |x_0 - x0|^2 / d, the bound's terms in nats per dimension.

    Attributes:
        variances: float64 [T], variance of p(x_{t-1} | x_t); beta_0 at t = 0, where beta-tilde is 0.
        constants: float64 [T], what remains of each term if x0 is exact; 0 for beta-tilde.
        weights: float64 [T], factor of the squared error of x_0.
    """

    variances: Float64Array
    constants: Float64Array
    weights: Float64Array


def bound_terms(schedule: NoiseSchedule, variance: Variance = "beta_tilde") -> BoundTerms:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for every t, as a function of the error of x_0.

    The KL divergence of two Gaussians with variances beta-tilde and v, whose means differ by
    c (x_0 - x0), is

        (ln(v / beta-tilde) + beta-tilde / v - 1) / 2 + c^2 / (2 v) |x_0 - x0|^2 / d.

    With v = beta-tilde the constant is 0 and the weight is half the step in SNR, (SNR_{t-1} - SNR_t) / 2.
    At t = 0, where q is a point, the term is that of the decoder N(x0, beta_0): the weight is
    1 / (2 beta_0). Its constant depends on how the decoder reads the data and is left at 0.

    Args:
        schedule: schedule with T timesteps.
        variance: variance of p, see `ancestral_coefficients`.

    Source: DDPM, arXiv:2006.11239, Eqs. 5 and 8, and Section 3.3 for t = 0; VDM, arXiv:2107.00630,
    Eq. 14, for the step in SNR.
    """
    alphas_cumprod_t, alphas_cumprod_s = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    c, _, variances = ancestral_coefficients(alphas_cumprod_t, alphas_cumprod_s, variance)
    variances[0] = schedule.betas[0]
    weights = c**2 / (2.0 * variances)
    _, _, beta_tilde = ancestral_coefficients(alphas_cumprod_t, alphas_cumprod_s)
    ratio = beta_tilde[1:] / variances[1:]
    constants = np.concatenate([[0.0], (ratio - 1.0 - np.log(ratio)) / 2.0])
    return BoundTerms(variances, constants, weights)
