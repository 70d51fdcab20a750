import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion.process.posterior import ancestral_coefficients, bound_terms
from diffusion.process.schedules import (
    NoiseSchedule,
    constant_betas,
    cosine_betas,
    linear_betas,
    zero_terminal_snr,
)

SCHEDULES = {
    "ddpm": linear_betas(1000, 1e-4, 0.02),
    "short": linear_betas(10, 0.05, 0.6),
    "cosine": cosine_betas(50),
    "constant": constant_betas(30),
    "two steps": [0.2, 0.6],
    "no signal at the end": zero_terminal_snr(linear_betas(40, 1e-3, 0.2)),
}


@pytest.fixture(params=SCHEDULES, name="schedule")
def _schedule(request):
    return NoiseSchedule(SCHEDULES[request.param])


def test_coefficients_of_single_timesteps_are_those_of_the_posterior(schedule):
    c, d, variance = ancestral_coefficients(schedule.alphas_cumprod, schedule.alphas_cumprod_prev)
    np.testing.assert_allclose(c, schedule.posterior_mean_coef1, rtol=1e-9)
    np.testing.assert_allclose(d, schedule.posterior_mean_coef2, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(variance, schedule.posterior_variance, rtol=1e-9, atol=1e-15)
    _, _, beta = ancestral_coefficients(schedule.alphas_cumprod, schedule.alphas_cumprod_prev, "beta")
    np.testing.assert_allclose(beta, schedule.betas, rtol=1e-9)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_terms_are_the_kl_of_the_two_gaussians(schedule, rng, variance):
    """Compared with torch.distributions, for a predicted x0 that differs from x_0."""
    terms = bound_terms(schedule, variance)
    x_0, x0, x_t = rng.standard_normal(3)
    for t in range(1, schedule.num_train_timesteps):
        means = [
            schedule.posterior_mean_coef1[t] * clean + schedule.posterior_mean_coef2[t] * x_t
            for clean in (x_0, x0)
        ]
        q = Normal(*torch.tensor([means[0], math.sqrt(schedule.posterior_variance[t])]))
        p = Normal(*torch.tensor([means[1], math.sqrt(terms.variances[t])]))
        term = terms.constants[t] + terms.weights[t] * (x_0 - x0) ** 2
        assert term == pytest.approx(float(kl_divergence(q, p)), rel=1e-6, abs=1e-9)


def test_weights_for_beta_tilde_are_half_the_steps_in_snr(schedule):
    """VDM, arXiv:2107.00630, Eq. 14; and DDPM, Eq. 12, for the error of epsilon."""
    terms = bound_terms(schedule)
    snr = np.exp(schedule.log_snr)
    np.testing.assert_allclose(terms.weights[1:], (snr[:-1] - snr[1:]) / 2.0, rtol=1e-8)
    assert not terms.constants.any()
    beta, alpha, a = schedule.betas, schedule.alphas, schedule.alphas_cumprod
    has_signal = a > 0.0
    with np.errstate(divide="ignore"):
        epsilon_weights = beta**2 / (2.0 * terms.variances * alpha * (1.0 - a))
    np.testing.assert_allclose(
        epsilon_weights[has_signal],
        (terms.weights * (1.0 - a) / np.maximum(a, 1e-300))[has_signal],
        rtol=1e-8,
    )


def test_the_decoder_has_variance_beta_0(schedule):
    for variance in ("beta_tilde", "beta"):
        terms = bound_terms(schedule, variance)
        assert terms.variances[0] == schedule.betas[0]
        assert terms.weights[0] == pytest.approx(0.5 / schedule.betas[0], rel=1e-9)
        assert terms.constants[0] == 0.0
