"""DPM-Solver++(2M), arXiv:2211.01095, Algorithm 2, as rows of the sampler table."""

from itertools import product

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep

from diffusion.sampling import COEFFICIENTS, last_sample, sampler_table, step, trajectory
from diffusion.schedules import NoiseSchedule, constant_betas, cosine_betas, linear_betas, zero_terminal_snr

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace", "logsnr")
TOTAL = 60
CLIP = 0.8


@pytest.fixture(name="schedule")
def _schedule():
    return NoiseSchedule(linear_betas(TOTAL, 1e-3, 0.2))


def column(table, name):
    return table.coefficients[:, COEFFICIENTS.index(name)]


def half_log_snr(schedule, table):
    return schedule.log_snr[table.timesteps] / 2.0


def smooth_network(x, timestep):
    """Outputs that make some x0 leave the clip interval."""
    return torch.sin(1.7 * x + 0.05 * timestep) + 0.3 * x.roll(1, dims=-1)


def start():
    return torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def oracle_trajectory(table, schedule, denoise, prediction_type):
    oracle = scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler(
        num_train_timesteps=schedule.num_train_timesteps,
        trained_betas=schedule.betas.tolist(),
        solver_order=2,
        prediction_type=prediction_type,
        thresholding=False,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=True,
        euler_at_final=False,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        use_lu_lambdas=False,
        use_flow_sigmas=False,
        final_sigmas_type="zero",
        lambda_min_clipped=-float("inf"),
        variance_type=None,
        steps_offset=0,
        rescale_betas_zero_snr=False,
        use_dynamic_shifting=False,
    )
    oracle.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
    oracle.set_timesteps(timesteps=table.timesteps.tolist())
    np.testing.assert_array_equal(oracle.timesteps, table.timesteps)
    x, states = start(), []
    for timestep in oracle.timesteps:
        x = oracle.step(denoise(x, int(timestep)), timestep, x, return_dict=False)[0]
        states.append(x)
    return torch.stack(states)


def assert_same_trajectory(ours, oracle):
    axes = tuple(range(1, oracle.ndim))
    assert ours.shape == oracle.shape
    assert torch.isfinite(oracle).all()
    difference, largest = (ours - oracle).abs().amax(dim=axes), oracle.abs().amax(dim=axes)
    assert (difference <= 1e-5 * largest).all(), difference / largest


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("spacing", "steps"), list(product(SPACINGS, [TOTAL, 20, 12, 3, 2, 1])))
def test_2m_follows_diffusers(schedule, spacing, steps, prediction_type):
    """20 and 12 steps lie on both sides of the 15 below which diffusers lowers the order at the end."""
    table = sampler_table(
        schedule,
        "dpmpp_2m",
        steps,
        prediction_type=prediction_type,
        spacing=spacing,
        step_ratio_guard=None,
    )
    ours = torch.stack([x for x, _ in trajectory(smooth_network, start(), table, lambda row: None)])
    assert_same_trajectory(ours, oracle_trajectory(table, schedule, smooth_network, prediction_type))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_clipped_2m_follows_diffusers_with_a_network_that_clips_itself(schedule, spacing):
    """diffusers clips nothing here, but takes both x0 from what the network gives."""
    options = {"prediction_type": "sample", "spacing": spacing, "step_ratio_guard": None}
    table = sampler_table(schedule, "dpmpp_2m", 12, clip=(-CLIP, CLIP), **options)
    ours = torch.stack([x for x, _ in trajectory(smooth_network, start(), table, lambda row: None)])

    def clipped_network(x, timestep):
        return smooth_network(x, timestep).clip(-CLIP, CLIP)

    assert_same_trajectory(ours, oracle_trajectory(table, schedule, clipped_network, "sample"))
    free = sampler_table(schedule, "dpmpp_2m", 12, **options)
    unclipped = last_sample(trajectory(smooth_network, start(), free, lambda row: None))
    assert (ours[-1] - unclipped).abs().max() > 0.1


@pytest.mark.parametrize("guard", [None, 3.0, 1.2])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_rows_are_the_algorithms_formula(schedule, rng, spacing, guard):
    """x <- (sigma_s / sigma_t) x - sqrt(abar_s) (exp(-h) - 1) ((1 + 1/2r) x0 - 1/2r x0_previous)."""
    table = sampler_table(
        schedule, "dpmpp_2m", 9, prediction_type="sample", spacing=spacing, step_ratio_guard=guard
    )
    lambdas, at = half_log_snr(schedule, table), table.alphas_cumprod
    x, x0, x0_previous = rng.standard_normal((3, 40))
    first_order = []
    for row in range(8):
        h = lambdas[row + 1] - lambdas[row]
        ahead = x0
        if row > 0:
            r = (lambdas[row] - lambdas[row - 1]) / h
            if guard is None or 1.0 / r <= guard:
                ahead = (1.0 + 0.5 / r) * x0 - 0.5 / r * x0_previous
            else:
                first_order.append(row)
        ratio = np.sqrt((1.0 - at[row + 1]) / (1.0 - at[row]))
        expected = ratio * x - np.sqrt(at[row + 1]) * (np.exp(-h) - 1.0) * ahead
        found, _ = step(table.coefficients[row], x, x0, x0_previous, 0.0)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(np.flatnonzero(column(table, "e")[:8] == 0.0), [0, *first_order])


def test_the_guard_makes_exactly_the_rows_with_a_long_step_first_order():
    """Steps of 1, 1, 4, 3, 3 and 2 in log-SNR, and a last one to x_0."""
    log_snr = np.array([-8.0, -7.0, -6.0, -2.0, 1.0, 4.0, 6.0])
    alphas_cumprod = 1.0 / (1.0 + np.exp(-log_snr[::-1]))
    schedule = NoiseSchedule(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))
    ddim = sampler_table(schedule, "ddim", 7)
    for guard, rows in ((3.0, [0, 2, 6]), (None, [0, 6]), (4.5, [0, 6]), (0.9, [0, 1, 2, 4, 6])):
        table = sampler_table(schedule, "dpmpp_2m", 7, step_ratio_guard=guard)
        first_order = column(table, "e") == 0.0
        np.testing.assert_array_equal(np.flatnonzero(first_order), rows)
        np.testing.assert_allclose(table.coefficients[first_order], ddim.coefficients[first_order])
    default = sampler_table(schedule, "dpmpp_2m", 7).coefficients
    np.testing.assert_array_equal(
        default, sampler_table(schedule, "dpmpp_2m", 7, step_ratio_guard=3.0).coefficients
    )


def test_the_guard_bounds_the_extrapolation():
    """w = h / (2 h_previous) is what x0 is read ahead by: 1.5 at most."""
    schedule = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))
    for spacing, steps in product(SPACINGS, [5, 20, 100]):
        ddim = sampler_table(schedule, "ddim", steps, spacing=spacing)
        table = sampler_table(schedule, "dpmpp_2m", steps, spacing=spacing)
        weight = -column(table, "e")[:-1] / column(ddim, "c")[:-1]
        assert weight.min() >= 0.0
        assert weight.max() <= 1.5 + 1e-9
    far = sampler_table(schedule, "dpmpp_2m", 20, spacing="linspace", step_ratio_guard=None)
    assert -column(far, "e").min() > 1.5  # the guard is needed


@pytest.mark.parametrize("guard", [0.0, -1.0, float("nan")])
def test_an_impossible_guard_is_refused_by_value(schedule, guard):
    with pytest.raises(ValueError, match=f"step_ratio_guard {guard}"):
        sampler_table(schedule, "dpmpp_2m", 5, step_ratio_guard=guard)


def test_eta_and_variance_do_not_touch_2m(schedule):
    plain = sampler_table(schedule, "dpmpp_2m", 10)
    other = sampler_table(schedule, "dpmpp_2m", 10, eta=0.7, variance="beta", use_clipped_model_output=False)
    np.testing.assert_array_equal(other.coefficients, plain.coefficients)
    assert not column(plain, "s").any()
    assert not column(plain, "f").any()


def window_errors(schedule, sampler, intervals, last_timestep, variance):
    """Error of the factor that x gets between T - 1 and `last_timestep`, for x_0 ~ N(0, variance).

    The probability flow multiplies x by the ratio of the standard deviations of x_t, the root of
    a variance + 1 - a; what a deterministic sampler does to it with the exact network is linear too.
    """
    errors = []
    for number in intervals:
        table = sampler_table(schedule, sampler, number + 1, spacing="linspace", prediction_type="epsilon")
        rows = int(np.flatnonzero(table.timesteps == last_timestep)[0])
        assert rows < number + 1  # the last row, which steps to an infinite log-SNR, is not among them
        x, x0 = 1.0, np.float64(0.0)
        for row, a in zip(table.coefficients[:rows], table.alphas_cumprod[:rows], strict=True):
            epsilon = np.float64(x * np.sqrt(1.0 - a) / (a * variance + 1.0 - a))
            x, x0 = step(row, np.float64(x), epsilon, x0, 0.0)
        deviations = np.sqrt(table.alphas_cumprod * (variance - 1.0) + 1.0)
        errors.append(abs(x - deviations[rows] / deviations[0]))
    return np.array(errors)


def even_in_log_snr(num_intervals):
    alphas_cumprod = 1.0 / (1.0 + np.exp(-np.linspace(8.0, -8.0, num_intervals + 1)))
    return NoiseSchedule(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


INTERVALS = np.array([80, 160, 320, 640, 1280])
WINDOWS = {
    # Equal steps in log-SNR, and steps that shrink and grow: r is not 1.
    "even in log-SNR": (even_in_log_snr(5120), 0),
    "linear": (NoiseSchedule(linear_betas(10_241, 1e-6, 2e-3)), 1280),
    "cosine": (NoiseSchedule(np.minimum(cosine_betas(10_241), 0.01)), 1280),
}


@pytest.mark.parametrize("variance", [0.04, 4.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_over_a_finite_window_ddims_error_halves_and_2ms_falls_by_four(window, variance):
    schedule, last_timestep = WINDOWS[window]
    first, second = (
        window_errors(schedule, sampler, INTERVALS, last_timestep, variance)
        for sampler in ("ddim", "dpmpp_2m")
    )
    assert (second < 0.3 * first).all()
    for errors, order in ((first, 1.0), (second, 2.0)):
        slope, _ = np.polyfit(np.log(INTERVALS), np.log(errors), 1)
        assert -slope == pytest.approx(order, abs=0.1 * order), errors


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("guard", [3.0, None])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "logsnr"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, TOTAL])
def test_from_zero_terminal_snr_2m_is_finite(gaussian_denoiser, spacing, steps, guard, prediction_type):
    schedule = NoiseSchedule(zero_terminal_snr(constant_betas(TOTAL)))
    table = sampler_table(
        schedule,
        "dpmpp_2m",
        steps,
        prediction_type=prediction_type,
        spacing=spacing,
        step_ratio_guard=guard,
    )
    assert table.alphas_cumprod[0] == 0.0
    assert np.isfinite(table.coefficients[:, :7]).all()
    # The first row is first order by rule, the second since the step before it was infinite.
    assert not column(table, "e")[:2].any()
    network = gaussian_denoiser(schedule, variance=1.0, mean=0.5, prediction_type=prediction_type)
    states = list(trajectory(lambda x, t: network(x, torch.tensor([t])), start(), table, lambda row: None))
    assert all(torch.isfinite(x).all() for x, _ in states)
    # At alphas_cumprod = 0 x says nothing about x_0: the prediction is the mean of the data.
    torch.testing.assert_close(states[0][1], torch.full_like(start(), 0.5))
    if steps == TOTAL:
        torch.testing.assert_close(states[-1][0], start() + 0.5, atol=0.15, rtol=0.0)


def test_zero_terminal_snr_is_the_limit_of_small_terminal_snr(schedule):
    betas = linear_betas(20, 0.01, 0.5)
    tables = []
    for last in (1.0 - 1e-14, 1.0):
        betas[-1] = last
        tables.append(sampler_table(NoiseSchedule(betas), "dpmpp_2m", 20, prediction_type="v_prediction"))
    near, zero = (table.coefficients[:, :7] for table in tables)
    # 1 / h_previous goes to 0 like the inverse of a logarithm: only e and c of row 1 still differ.
    np.testing.assert_allclose(near[0], zero[0], atol=1e-6)
    np.testing.assert_allclose(near[2:], zero[2:], atol=1e-12)
    assert abs(near[1] - zero[1]).max() < 0.1


def test_epsilon_prediction_from_zero_terminal_snr_is_refused():
    schedule = NoiseSchedule(zero_terminal_snr(linear_betas(20, 0.01, 0.5)))
    with pytest.raises(ValueError, match="alphas_cumprod reaches 0"):
        sampler_table(schedule, "dpmpp_2m", 10)
