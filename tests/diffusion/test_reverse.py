import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from diffusion.likelihood import elbo_window
from diffusion.reverse import ErrorCurve, ancestral_coefficients, bound_terms
from diffusion.sampling import COEFFICIENTS, sampler_table
from diffusion.schedules import (
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


def exact_curve(schedule, variance):
    """The error curve of N(0, variance)'s denoiser: Var(x_0 | x_t) times the SNR."""
    log_snr = np.linspace(schedule.log_snr[np.isfinite(schedule.log_snr)].min(), schedule.log_snr[0], 20_001)
    a = 1.0 / (1.0 + np.exp(-log_snr))
    return ErrorCurve(log_snr, a * variance / (a * variance + 1.0 - a))


def column(table, name):
    return table.coefficients[:, COEFFICIENTS.index(name)]


def test_step_by_step_the_coefficients_are_the_schedules_posterior(schedule):
    c, d, variance = ancestral_coefficients(schedule.alphas_cumprod, schedule.alphas_cumprod_prev)
    np.testing.assert_allclose(c, schedule.posterior_mean_coef1, rtol=1e-9)
    np.testing.assert_allclose(d, schedule.posterior_mean_coef2, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(variance, schedule.posterior_variance, rtol=1e-9, atol=1e-15)
    _, _, beta = ancestral_coefficients(schedule.alphas_cumprod, schedule.alphas_cumprod_prev, "beta")
    np.testing.assert_allclose(beta, schedule.betas, rtol=1e-9)


@given(st.floats(1e-6, 0.99), st.floats(1e-6, 0.99), st.floats(0.0, 10.0))
@settings(deadline=None, derandomize=True, database=None, max_examples=200)
def test_the_optimal_variance_lies_between_those_of_a_point_and_of_unit_variance(at, share, error):
    """From beta-tilde for a known x_0 it grows with the error of x_0, to beta at 1 - alphas_cumprod."""
    as_ = at + share * (1.0 - at)
    arrays = np.array([at]), np.array([as_])
    tilde, beta = (ancestral_coefficients(*arrays, variance)[2] for variance in ("beta_tilde", "beta"))
    at_error, at_unit = (
        ancestral_coefficients(*arrays, "optimal", np.array([value]))[2] for value in (error, 1.0 - at)
    )
    np.testing.assert_allclose(at_unit, beta, rtol=1e-6, atol=1e-12)
    assert (at_error >= tilde).all()
    assert (at_error <= beta * (1.0 + 1e-6)).all() or error > 1.0 - at


@pytest.mark.parametrize("variance", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
def test_for_gaussian_data_every_row_with_the_optimal_variance_is_exact(variance, spacing):
    """p(x_s | x_t) is then q(x_s | x_t) itself, so each row's result has the variance a_s v + 1 - a_s.

    Beta and beta-tilde, which do not know v, are off.
    """
    schedule = NoiseSchedule(SCHEDULES["ddpm"])
    found = {}
    for name in ("optimal", "beta", "beta_tilde"):
        curve = exact_curve(schedule, variance) if name == "optimal" else None
        table = sampler_table(schedule, "ddpm", 12, spacing=spacing, variance=name, error_curve=curve)
        current = table.alphas_cumprod[0] * variance + 1.0 - table.alphas_cumprod[0]
        errors = []
        for row, at, as_ in zip(
            table.coefficients[:-1], table.alphas_cumprod[:-2], table.alphas_cumprod[1:-1], strict=True
        ):
            a, b, c, d, _, _, s, _, _ = row
            k = math.sqrt(1.0 - at) / (at * variance + 1.0 - at)
            current = (c * (a + b * k) + d) ** 2 * current + s**2
            errors.append(abs(current - (as_ * variance + 1.0 - as_)))
        found[name] = max(errors)
    assert found["optimal"] < 1e-5
    assert found["beta_tilde"] > 0.01
    assert found["beta"] > 0.01 or variance == 1.0


def test_optimal_changes_nothing_but_s():
    schedule = NoiseSchedule(SCHEDULES["ddpm"])
    tilde = sampler_table(schedule, "ddpm", 20)
    table = sampler_table(schedule, "ddpm", 20, variance="optimal", error_curve=exact_curve(schedule, 0.5))
    others = [name for name in COEFFICIENTS if name != "s"]
    for name in others:
        np.testing.assert_array_equal(column(table, name), column(tilde, name))
    assert (column(table, "s")[:-1] > column(tilde, "s")[:-1]).all()
    assert column(table, "s")[-1] == 0.0


def test_the_logged_curve_of_a_denoiser_gives_its_optimal_variance(gaussian_denoiser):
    """Measured on 4,096 examples the curve is that of Var(x_0 | x_t) = v (1 - a) / (a v + 1 - a)."""
    schedule = NoiseSchedule(SCHEDULES["ddpm"])
    x_0 = 2.0 * torch.randn(4096, 8, generator=torch.Generator().manual_seed(5))
    found = elbo_window(gaussian_denoiser(schedule, 4.0), schedule, x_0, (-8.0, 5.0))
    log_snr = np.linspace(-7.5, 4.5, 50)
    a = 1.0 / (1.0 + np.exp(-log_snr))
    errors = ErrorCurve(found.log_snr, found.errors).x_0_errors(log_snr)
    np.testing.assert_allclose(errors, 4.0 * (1.0 - a) / (a * 4.0 + 1.0 - a), rtol=0.05)


def test_beyond_its_ends_a_curve_goes_on_as_data_do():
    """Below, x_0's error is the data's variance; above, epsilon's error stays what it was."""
    curve = ErrorCurve([-8.0, 0.0, 6.0], [4.0 * math.exp(-8.0), 0.5, 0.9])
    np.testing.assert_allclose(curve.x_0_errors(np.array([-np.inf, -20.0, -8.0])), 4.0, rtol=1e-12)
    np.testing.assert_allclose(curve.x_0_errors(np.array([6.0, 9.0])) * np.exp([6.0, 9.0]), 0.9, rtol=1e-12)
    np.testing.assert_allclose(curve.x_0_errors(np.array([3.0])), 0.7 * math.exp(-3.0), rtol=1e-12)


@pytest.mark.parametrize(
    ("log_snr", "errors", "named"),
    [
        ([], [], r"\(0,\)"),
        ([0.0, 1.0], [0.5], r"\(2,\) and \(1,\)"),
        ([[0.0]], [[0.5]], r"\(1, 1\)"),
        ([0.0, math.inf], [0.5, 0.5], "finite"),
        ([0.0, 1.0], [0.5, math.nan], "finite"),
        ([1.0, 0.0], [0.5, 0.5], "from 1.0 to 0.0"),
        ([0.0, 1.0], [0.5, -0.5], "-0.5"),
    ],
)
def test_an_impossible_curve_is_refused_by_a_message_with_the_value(log_snr, errors, named):
    with pytest.raises(ValueError, match=named):
        ErrorCurve(log_snr, errors)


@pytest.mark.parametrize("with_curve", [True, False])
def test_optimal_and_a_curve_belong_together(with_curve):
    schedule = NoiseSchedule(SCHEDULES["short"])
    variance = "beta" if with_curve else "optimal"
    curve = exact_curve(schedule, 1.0) if with_curve else None
    for call in (
        lambda: sampler_table(schedule, "ddpm", 5, variance=variance, error_curve=curve),
        lambda: bound_terms(schedule, variance, curve),
    ):
        with pytest.raises(ValueError, match=f"variance '{variance}'.*error curve"):
            call()


@pytest.mark.parametrize("variance", ["beta_tilde", "beta", "optimal"])
def test_terms_are_the_kl_of_the_two_gaussians(schedule, rng, variance):
    """Against torch.distributions, for an x_0 and an x0 that differ."""
    curve = exact_curve(schedule, 0.5) if variance == "optimal" else None
    terms = bound_terms(schedule, variance, curve)
    x_0, x0, x_t = rng.standard_normal(3)
    for t in range(1, schedule.num_train_timesteps):
        means = [
            schedule.posterior_mean_coef1[t] * clean + schedule.posterior_mean_coef2[t] * x_t
            for clean in (x_0, x0)
        ]
        q = Normal(*torch.tensor([means[0], math.sqrt(schedule.posterior_variance[t])]))
        p = Normal(*torch.tensor([means[1], math.sqrt(terms.variances[t])]))
        found = terms.constants[t] + terms.weights[t] * (x_0 - x0) ** 2
        assert found == pytest.approx(float(kl_divergence(q, p)), rel=1e-6, abs=1e-9)


def test_weights_of_beta_tilde_are_half_the_steps_in_snr(schedule):
    """VDM, arXiv:2107.00630, Eq. 14; and DDPM's Eq. 12 for the error in epsilon."""
    terms = bound_terms(schedule)
    snr = np.exp(schedule.log_snr)
    np.testing.assert_allclose(terms.weights[1:], (snr[:-1] - snr[1:]) / 2.0, rtol=1e-8)
    assert not terms.constants.any()
    beta, alpha, a = schedule.betas, schedule.alphas, schedule.alphas_cumprod
    kept = a > 0.0
    with np.errstate(divide="ignore"):
        of_epsilon = beta**2 / (2.0 * terms.variances * alpha * (1.0 - a))
    np.testing.assert_allclose(
        of_epsilon[kept], (terms.weights * (1.0 - a) / np.maximum(a, 1e-300))[kept], rtol=1e-8
    )


def test_the_decoder_has_variance_beta_0(schedule):
    for variance in ("beta_tilde", "beta"):
        terms = bound_terms(schedule, variance)
        assert terms.variances[0] == schedule.betas[0]
        assert terms.weights[0] == pytest.approx(0.5 / schedule.betas[0], rel=1e-9)
        assert terms.constants[0] == 0.0
