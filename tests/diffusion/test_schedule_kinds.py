"""The schedules beside linear and cosine, against diffusers and against what they promise."""

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.config import ScheduleConfig
from diffusion.errors import InputError
from diffusion.schedules import (
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


@pytest.mark.parametrize("total", [1, 2, 7, 1000])
@pytest.mark.parametrize("kind", ["scaled_linear", "sigmoid"])
def test_betas_are_those_of_diffusers(kind, total):
    """diffusers computes them in float32, in which 1 - beta would hide an error in a small beta."""
    oracle = scheduling_ddpm.DDPMScheduler(
        num_train_timesteps=total,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=kind,
        trained_betas=None,
        rescale_betas_zero_snr=False,
    )
    betas = BETA_RANGE_KINDS[kind](total, 0.00085, 0.012)
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, oracle.betas.numpy(), rtol=2e-6)


@pytest.mark.parametrize("build", [linear_betas, scaled_linear_betas, cosine_betas])
def test_zero_terminal_snr_is_that_of_diffusers(build):
    betas = build(100) if build is cosine_betas else build(100, 0.00085, 0.012)
    oracle = scheduling_ddpm.rescale_zero_terminal_snr(torch.tensor(betas))
    np.testing.assert_allclose(zero_terminal_snr(betas), oracle.numpy(), rtol=1e-9)


@given(
    st.sampled_from(sorted(BETA_RANGE_KINDS)), st.integers(1, 300), st.floats(1e-6, 0.9), st.floats(0.0, 1.0)
)
@settings(deadline=None, derandomize=True, database=None, max_examples=200)
def test_betas_rise_within_the_range_that_was_asked_for(kind, total, beta_start, share):
    beta_end = beta_start + share * (0.99 - beta_start)
    betas = BETA_RANGE_KINDS[kind](total, beta_start, beta_end)
    assert betas.shape == (total,)
    assert betas.dtype == np.float64
    tolerance = 1e-12 * beta_end
    assert np.all(np.diff(betas) >= -tolerance)
    assert betas[0] >= beta_start - tolerance
    assert betas[-1] <= beta_end + tolerance
    NoiseSchedule(betas)


def test_scaled_linear_betas_have_square_roots_in_equal_steps_between_both_ends():
    roots = np.sqrt(scaled_linear_betas(500, 1e-4, 0.04))
    np.testing.assert_allclose(roots[[0, -1]], [0.01, 0.2], rtol=1e-12)
    np.testing.assert_allclose(np.diff(roots), (0.2 - 0.01) / 499, rtol=1e-9)


def test_quadratic_is_scaled_linear_by_the_name_that_ddims_code_has_for_it():
    """There: np.linspace(beta_start ** 0.5, beta_end ** 0.5, T, dtype=np.float64) ** 2."""
    betas = quadratic_betas(321, 3e-4, 0.07)
    np.testing.assert_array_equal(betas, scaled_linear_betas(321, 3e-4, 0.07))
    np.testing.assert_allclose(betas, np.linspace(3e-4**0.5, 0.07**0.5, 321) ** 2, rtol=1e-14)


def test_sigmoid_betas_are_symmetric_about_their_middle():
    betas = sigmoid_betas(101, 0.01, 0.05)
    np.testing.assert_allclose(betas + betas[::-1], 0.06, rtol=1e-12)
    assert betas[50] == pytest.approx(0.03, rel=1e-12)
    # The logit of the share between both ends is even from -6 to 6.
    share = (betas - 0.01) / 0.04
    np.testing.assert_allclose(np.log(share / (1.0 - share)), np.linspace(-6.0, 6.0, 101), atol=1e-9)


@pytest.mark.parametrize("terminal_noise", [1e-6, 0.02, 0.5, 0.9999, 1.0 - 1e-12])
@pytest.mark.parametrize("total", [1, 10, 1000])
def test_constant_betas_leave_the_noise_that_was_asked_for(total, terminal_noise):
    betas = constant_betas(total, terminal_noise)
    assert betas.shape == (total,)
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
def test_zero_terminal_snr_ends_at_zero_keeps_the_first_step_and_moves_the_rest_linearly(betas):
    before, after = NoiseSchedule(betas), NoiseSchedule(zero_terminal_snr(betas))
    assert after.betas[-1] == 1.0
    assert after.alphas_cumprod[-1] == 0.0
    assert after.log_snr[-1] == -np.inf
    assert after.betas[0] == before.betas[0]
    # sqrt(alphas_cumprod) is mapped by the line through (first, first) and (last, 0).
    root = np.sqrt(before.alphas_cumprod)
    expected = root[0] * (root - root[-1]) / (root[0] - root[-1])
    np.testing.assert_allclose(np.sqrt(after.alphas_cumprod), expected, rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_leaves_a_schedule_that_has_it_and_the_callers_array():
    betas = linear_betas(50, 1e-3, 0.2)
    kept = betas.copy()
    once = zero_terminal_snr(betas)
    np.testing.assert_array_equal(betas, kept)
    np.testing.assert_allclose(zero_terminal_snr(once), once, rtol=1e-9)


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
def test_impossible_ranges_are_refused_by_a_message_with_the_value(build, arguments, named):
    with pytest.raises(ValueError, match=named):
        build(*arguments)


@pytest.mark.parametrize("terminal_noise", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_constant_betas_refuse_impossible_noise_by_value(terminal_noise):
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
def test_zero_terminal_snr_refuses_what_it_cannot_rescale(betas, named):
    with pytest.raises(ValueError, match=named):
        zero_terminal_snr(betas)


@pytest.mark.parametrize("kind", BETA_RANGE_KINDS)
def test_a_config_builds_each_kind_that_runs_between_two_betas(kind):
    config = ScheduleConfig(kind=kind, num_train_timesteps=40, beta_start=1e-3, beta_end=0.1)
    assert config.uses_betas
    np.testing.assert_array_equal(config.build().betas, BETA_RANGE_KINDS[kind](40, 1e-3, 0.1))
    with pytest.raises(InputError, match="--schedule.beta-start 0.3"):
        ScheduleConfig(kind=kind, beta_start=0.3, beta_end=0.02)


@pytest.mark.parametrize(
    ("kind", "expected"), [("cosine", cosine_betas(40)), ("constant", constant_betas(40, 0.75))]
)
def test_kinds_without_two_betas_are_not_touched_by_them(kind, expected):
    for betas in ({}, {"beta_start": 0.9, "beta_end": 0.8}):
        config = ScheduleConfig(kind=kind, num_train_timesteps=40, terminal_noise=0.75, **betas)
        assert not config.uses_betas
        np.testing.assert_array_equal(config.build().betas, expected)
        assert config.why_it_cannot_run() is None


@pytest.mark.parametrize("terminal_noise", [0.0, 1.0, -0.5, float("nan")])
def test_a_config_refuses_impossible_noise_with_its_flag(terminal_noise):
    with pytest.raises(InputError, match=f"--schedule.terminal-noise {terminal_noise}"):
        ScheduleConfig(kind="constant", terminal_noise=terminal_noise)


def test_a_constant_schedule_too_small_for_float64_is_pruned_with_its_beta():
    reason = ScheduleConfig(kind="constant", num_train_timesteps=10, terminal_noise=1e-18).why_it_cannot_run()
    assert "1e-19" in reason
