"""The schedules other than linear and cosine, compared with diffusers and with their definitions."""

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.config import ScheduleConfig
from diffusion.errors import InputError
from diffusion.process.schedules import (
    NoiseSchedule,
    constant_betas,
    cosine_betas,
    linear_betas,
    quadratic_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_terminal_snr,
)

BETA_RANGE_KINDS = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "quadratic": quadratic_betas,
    "sigmoid": sigmoid_betas,
}


@pytest.mark.parametrize("num_train_timesteps", [1, 2, 7, 1000])
@pytest.mark.parametrize("kind", ["scaled_linear", "sigmoid"])
def test_betas_agree_with_diffusers(kind, num_train_timesteps):
    """The betas are compared, not 1 - beta, which would hide an error of a small beta in float32."""
    oracle = scheduling_ddpm.DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=kind,
        trained_betas=None,
        rescale_betas_zero_snr=False,
    )
    betas = BETA_RANGE_KINDS[kind](num_train_timesteps, 0.00085, 0.012)
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, oracle.betas.numpy(), rtol=2e-6)


@pytest.mark.parametrize("build", [linear_betas, scaled_linear_betas, cosine_betas])
def test_zero_terminal_snr_agrees_with_diffusers(build):
    betas = build(100) if build is cosine_betas else build(100, 0.00085, 0.012)
    oracle = scheduling_ddpm.rescale_zero_terminal_snr(torch.tensor(betas))
    np.testing.assert_allclose(zero_terminal_snr(betas), oracle.numpy(), rtol=1e-9)


@given(
    st.sampled_from(sorted(BETA_RANGE_KINDS)), st.integers(1, 300), st.floats(1e-6, 0.9), st.floats(0.0, 1.0)
)
@settings(max_examples=200)
def test_betas_increase_within_the_requested_range(kind, num_train_timesteps, beta_start, fraction):
    beta_end = beta_start + fraction * (0.99 - beta_start)
    betas = BETA_RANGE_KINDS[kind](num_train_timesteps, beta_start, beta_end)
    assert betas.shape == (num_train_timesteps,)
    assert betas.dtype == np.float64
    tolerance = 1e-12 * beta_end
    assert np.all(np.diff(betas) >= -tolerance)
    assert betas[0] >= beta_start - tolerance
    assert betas[-1] <= beta_end + tolerance
    NoiseSchedule(betas)


def test_square_roots_of_scaled_linear_betas_grow_in_equal_steps_from_start_to_end():
    roots = np.sqrt(scaled_linear_betas(500, 1e-4, 0.04))
    np.testing.assert_allclose(roots[[0, -1]], [0.01, 0.2], rtol=1e-12)
    np.testing.assert_allclose(np.diff(roots), (0.2 - 0.01) / 499, rtol=1e-9)


def test_quadratic_is_another_name_of_scaled_linear():
    """DDIM's code has np.linspace(beta_start ** 0.5, beta_end ** 0.5, T, dtype=np.float64) ** 2."""
    betas = quadratic_betas(321, 3e-4, 0.07)
    np.testing.assert_array_equal(betas, scaled_linear_betas(321, 3e-4, 0.07))
    np.testing.assert_allclose(betas, np.linspace(3e-4**0.5, 0.07**0.5, 321) ** 2, rtol=1e-14)


def test_sigmoid_betas_are_symmetric_about_their_middle():
    betas = sigmoid_betas(101, 0.01, 0.05)
    np.testing.assert_allclose(betas + betas[::-1], 0.06, rtol=1e-12)
    assert betas[50] == pytest.approx(0.03, rel=1e-12)
    # The logit of the fraction of the range grows in equal steps from -6 to 6.
    fraction = (betas - 0.01) / 0.04
    np.testing.assert_allclose(np.log(fraction / (1.0 - fraction)), np.linspace(-6.0, 6.0, 101), atol=1e-9)


@pytest.mark.parametrize("terminal_noise", [1e-6, 0.02, 0.5, 0.9999, 1.0 - 1e-12])
@pytest.mark.parametrize("num_train_timesteps", [1, 10, 1000])
def test_constant_betas_end_with_the_requested_noise(num_train_timesteps, terminal_noise):
    betas = constant_betas(num_train_timesteps, terminal_noise)
    assert betas.shape == (num_train_timesteps,)
    assert len(set(betas)) == 1
    schedule = NoiseSchedule(betas)
    # alphas_cumprod is a product of T rounded factors close to 1.
    np.testing.assert_allclose(schedule.alphas_cumprod[-1], 1.0 - terminal_noise, rtol=1e-12)
    expected = np.log((1.0 - terminal_noise) / terminal_noise)
    np.testing.assert_allclose(schedule.log_snr[-1], expected, rtol=1e-9, atol=1e-9)


def test_constant_betas_end_near_pure_noise_by_default():
    assert NoiseSchedule(constant_betas(50)).alphas_cumprod[-1] == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize(
    "betas", [linear_betas(1000, 1e-4, 0.02), linear_betas(5, 0.05, 0.5), cosine_betas(30), constant_betas(2)]
)
def test_zero_terminal_snr_keeps_the_first_step_ends_at_zero_and_is_linear_in_between(betas):
    before, after = NoiseSchedule(betas), NoiseSchedule(zero_terminal_snr(betas))
    assert after.betas[-1] == 1.0
    assert after.alphas_cumprod[-1] == 0.0
    assert after.log_snr[-1] == -np.inf
    assert after.betas[0] == before.betas[0]
    # sqrt(alphas_cumprod) is mapped by the line through (first, first) and (last, 0).
    root = np.sqrt(before.alphas_cumprod)
    expected = root[0] * (root - root[-1]) / (root[0] - root[-1])
    np.testing.assert_allclose(np.sqrt(after.alphas_cumprod), expected, rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_is_idempotent_and_does_not_modify_the_callers_array():
    betas = linear_betas(50, 1e-3, 0.2)
    original = betas.copy()
    rescaled = zero_terminal_snr(betas)
    np.testing.assert_array_equal(betas, original)
    np.testing.assert_allclose(zero_terminal_snr(rescaled), rescaled, rtol=1e-9)


@pytest.mark.parametrize("build", [scaled_linear_betas, quadratic_betas, sigmoid_betas])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 1e-4, 0.02), "num_train_timesteps 0"),
        ((-3, 1e-4, 0.02), "-3"),
        ((10, 0.5, 0.25), "beta_end 0.25"),
        ((10, 0.0, 0.25), "beta_start 0.0"),
        ((10, 0.1, 1.0), "beta_end 1.0"),
        ((10, float("nan"), 0.1), "nan"),
    ],
)
def test_invalid_ranges_are_rejected_with_their_value(build, arguments, named):
    with pytest.raises(ValueError, match=named):
        build(*arguments)


@pytest.mark.parametrize("terminal_noise", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_constant_betas_reject_invalid_noise_with_its_value(terminal_noise):
    with pytest.raises(ValueError, match=f"terminal_noise {terminal_noise}"):
        constant_betas(10, terminal_noise)
    with pytest.raises(ValueError, match="num_train_timesteps 0"):
        constant_betas(0)


@pytest.mark.parametrize(
    ("betas", "named"),
    [
        ([0.3], "in 1 timesteps"),
        ([0.5, 1.0, 0.5], "alphas_cumprod goes from 0.5"),
        ([1e-20, 1e-20], "alphas_cumprod goes from 1.0"),
        ([0.1, 1.5], "1.5"),
        ([], r"\(0,\)"),
    ],
)
def test_zero_terminal_snr_rejects_betas_that_it_cannot_rescale(betas, named):
    with pytest.raises(ValueError, match=named):
        zero_terminal_snr(betas)


@pytest.mark.parametrize("kind", BETA_RANGE_KINDS)
def test_a_config_builds_each_kind_that_uses_beta_start_and_beta_end(kind):
    config = ScheduleConfig(kind=kind, num_train_timesteps=40, beta_start=1e-3, beta_end=0.1)
    assert config.uses_betas
    np.testing.assert_array_equal(config.build().betas, BETA_RANGE_KINDS[kind](40, 1e-3, 0.1))
    with pytest.raises(InputError, match="--schedule.beta-start 0.3"):
        ScheduleConfig(kind=kind, beta_start=0.3, beta_end=0.02)


@pytest.mark.parametrize(
    ("kind", "expected"), [("cosine", cosine_betas(40)), ("constant", constant_betas(40, 0.75))]
)
def test_other_kinds_ignore_beta_start_and_beta_end(kind, expected):
    for betas in ({}, {"beta_start": 0.9, "beta_end": 0.8}):
        config = ScheduleConfig(kind=kind, num_train_timesteps=40, terminal_noise=0.75, **betas)
        assert not config.uses_betas
        np.testing.assert_array_equal(config.build().betas, expected)
        assert config.infeasible_reason() is None


@pytest.mark.parametrize("terminal_noise", [0.0, 1.0, -0.5, float("nan")])
def test_a_config_rejects_invalid_noise_with_its_flag(terminal_noise):
    with pytest.raises(InputError, match=f"--schedule.terminal-noise {terminal_noise}"):
        ScheduleConfig(kind="constant", terminal_noise=terminal_noise)


def test_a_constant_beta_too_small_for_float64_is_infeasible():
    reason = ScheduleConfig(kind="constant", num_train_timesteps=10, terminal_noise=1e-18).infeasible_reason()
    assert "1e-19" in reason
