"""EDM's samplers, arXiv:2206.00364, Algorithms 1 and 2, as rows of the sampler table."""

import numpy as np
import pytest

from benchmarks.diffusers_reference import (
    heun_trajectory,
    our_trajectory,
    relative_difference,
    shared_noise,
)
from diffusion.process.samplers import last_sample, sampler_table, trajectory
from diffusion.process.schedules import (
    NoiseSchedule,
    constant_betas,
    linear_betas,
    respaced_timesteps,
    zero_terminal_snr,
)
from tests.diffusion.process.conftest import CLIP, NUM_TRAIN_TIMESTEPS, PREDICTION_TYPES, SPACINGS

FINE = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))


def network(x, t):
    return np.sin(1.7 * x + 0.05 * t)


def predict(schedule, prediction_type, clip, x, t):
    """The clipped x_0 of the network's output."""
    alphas_cumprod = schedule.alphas_cumprod[t]
    signal, sigma, out = np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod), network(x, t)
    x0 = {"epsilon": (x - sigma * out) / signal, "sample": out, "v_prediction": signal * x - sigma * out}
    return np.clip(x0[prediction_type], *clip)


def plain_loop(schedule, num_steps, start, *, spacing, prediction_type, clip, gamma=0.0, noise=None):
    """Algorithm 2 in u = x / sqrt(A) and sigma, with timesteps for sigma, written out.

    The first and the last step have no churn. A step has a second slope if sigma falls by at most 3.
    """
    visited = respaced_timesteps(schedule, num_steps, spacing)
    scale = np.sqrt(schedule.alphas_cumprod)
    sigma = np.sqrt(1.0 - schedule.alphas_cumprod) / scale
    u, t = start / scale[visited[0]], visited[0]
    for step, end in enumerate(visited[1:]):
        if step > 0:
            raised = np.abs(np.log(sigma) - np.log((1.0 + gamma) * sigma[t])).argmin()
            u = u + np.sqrt(max(sigma[raised] ** 2 - sigma[t] ** 2, 0.0)) * noise(2 * step - 1)
            t = raised
        slope = (u - predict(schedule, prediction_type, clip, scale[t] * u, t)) / sigma[t]
        result = u + (sigma[end] - sigma[t]) * slope
        if sigma[t] / sigma[end] <= 3.0:
            x0 = predict(schedule, prediction_type, clip, scale[end] * result, end)
            result = u + (sigma[end] - sigma[t]) * (slope + (result - x0) / sigma[end]) / 2.0
        u, t = result, end
    return predict(schedule, prediction_type, clip, scale[t] * u, t)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_rows_are_the_algorithm(eta, spacing, prediction_type, rng):
    start = rng.standard_normal((7, 2))
    drawn = rng.standard_normal((60, 7, 2))
    options = {"spacing": spacing, "prediction_type": prediction_type, "clip": (-0.8, 0.8)}
    for num_steps in (1, 2, 9, 30):
        table = sampler_table(FINE, "heun_churn", num_steps, eta=eta, **options)
        assert (table.num_rows, table.num_steps) == (2 * num_steps - 1, num_steps)
        actual = last_sample(trajectory(network, start, table, lambda row: drawn[row]))
        gamma = eta * (np.sqrt(2.0) - 1.0)
        expected = plain_loop(FINE, num_steps, start, gamma=gamma, noise=lambda row: drawn[row], **options)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
        assert table.column("s").any() == (eta > 0.0 and num_steps > 2)
        if eta == 0.0:
            heun = sampler_table(FINE, "heun", num_steps, **options)
            np.testing.assert_array_equal(table.coefficients, heun.coefficients)


def test_churn_has_an_eta_of_its_own_where_none_is_asked_for():
    own, quarter, none = (sampler_table(FINE, "heun_churn", 20, eta=eta) for eta in (None, 0.25, 0.0))
    np.testing.assert_array_equal(own.coefficients, quarter.coefficients)
    assert own.column("s").any() and not none.column("s").any()


@pytest.mark.parametrize("eta", [0.25, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_churn_keeps_the_marginals_of_the_forward_process(spacing, eta):
    """For data at one point, every row's x has the mean and variance of q(x_t | x_0)."""
    table, point = sampler_table(FINE, "heun_churn", 12, eta=eta, spacing=spacing), 1.7
    a = table.alphas_cumprod
    mean, variance = np.sqrt(a[0]) * point, 1.0 - a[0]
    for index, row in enumerate(table.coefficients):
        a_, b, c, d, e, _, s, _, _ = row
        # The exact epsilon is (x - sqrt(A) point) / sqrt(1 - A), which makes x0 the point in every row.
        slope = a_ + b / np.sqrt(1.0 - a[index])
        assert slope == pytest.approx(0.0, abs=1e-9 * a_)
        mean = (c + e) * point + d * mean
        variance = d**2 * variance + s**2
        assert mean == pytest.approx(np.sqrt(a[index + 1]) * point, rel=1e-9)
        assert variance == pytest.approx(1.0 - a[index + 1], abs=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_heun_agrees_with_diffusers(schedule, spacing, prediction_type):
    """diffusers' scheduler at the same timesteps, with its second evaluations."""
    table = sampler_table(
        schedule, "heun", 12, spacing=spacing, prediction_type=prediction_type, step_ratio_guard=None
    )
    start, noise = shared_noise(table.num_rows)
    theirs = heun_trajectory(table, schedule, start, prediction_type=prediction_type)
    assert relative_difference(our_trajectory(table, start, noise), theirs) <= 1e-5


def test_a_clip_interval_has_an_effect(schedule, rng):
    start = rng.standard_normal((7, 2))
    free, clipped = (
        last_sample(trajectory(network, start, sampler_table(schedule, "heun", 12, clip=clip), None))
        for clip in (None, CLIP)
    )
    assert np.abs(free - clipped).max() > 0.1 and np.abs(clipped).max() <= CLIP[1]


def test_only_steps_within_the_guard_are_of_second_order():
    """sigma falls by 2, 4 and 2.5."""
    sigma = np.array([20.0, 10.0, 2.5, 1.0])[::-1]
    alphas_cumprod = 1.0 / (1.0 + sigma**2)
    schedule = NoiseSchedule(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))
    for guard, second_order in ((3.0, [True, False, True]), (None, [True] * 3), (2.2, [True, False, False])):
        table = sampler_table(schedule, "heun", 4, step_ratio_guard=guard)
        np.testing.assert_array_equal(table.column("e")[1::2] != 0.0, second_order)


@pytest.mark.parametrize("sampler", ["heun", "heun_churn", "dpmpp_3m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("guard", [3.0, None])
def test_from_zero_terminal_snr_samples_are_finite(sampler, prediction_type, guard, rng):
    schedule = NoiseSchedule(zero_terminal_snr(constant_betas(NUM_TRAIN_TIMESTEPS)))
    for num_steps in (1, 2, 3, 4, 17, NUM_TRAIN_TIMESTEPS):
        table = sampler_table(
            schedule, sampler, num_steps, prediction_type=prediction_type, step_ratio_guard=guard
        )
        assert table.alphas_cumprod[0] == 0.0
        start = rng.standard_normal((3, 2))
        x = last_sample(trajectory(network, start, table, lambda row: np.ones((3, 2))))
        assert np.isfinite(x).all()
