"""DPM-Solver++ (2M, its SDE, and 3M), arXiv:2211.01095, as rows of the sampler table."""

from itertools import product

import numpy as np
import pytest
import torch

from benchmarks.diffusers_reference import (
    denoise,
    diffusers_trajectory,
    our_trajectory,
    relative_difference,
    shared_noise,
)
from diffusion.process.samplers import sampler_table, step, trajectory
from diffusion.process.schedules import (
    NoiseSchedule,
    constant_betas,
    cosine_betas,
    linear_betas,
    zero_terminal_snr,
)
from tests.diffusion.process.conftest import CLIP, NUM_TRAIN_TIMESTEPS, PREDICTION_TYPES, SPACINGS


def half_log_snr(schedule, table):
    return schedule.log_snr[table.timesteps] / 2.0


def initial_noise():
    return torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def assert_agreement(schedule, steps, network=None, **options):
    """The oracle gets a network that clips its output, if one is given, since diffusers does not clip."""
    table = sampler_table(schedule, "dpmpp_2m", steps, step_ratio_guard=None, **options)
    start, noise = shared_noise(table.num_rows)
    theirs = diffusers_trajectory(
        "dpmpp_2m",
        table,
        schedule,
        start,
        noise,
        network or denoise,
        prediction_type=options["prediction_type"],
    )
    ours = our_trajectory(table, start, noise)
    assert torch.isfinite(theirs).all()
    assert relative_difference(ours, theirs) <= 1e-5
    return ours


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("spacing", "steps"), list(product(SPACINGS, [NUM_TRAIN_TIMESTEPS, 20, 12, 3, 2, 1]))
)
def test_2m_agrees_with_diffusers(schedule, spacing, steps, prediction_type):
    """20 and 12 steps are on both sides of 15, below which diffusers lowers the order of the last step."""
    assert_agreement(schedule, steps, prediction_type=prediction_type, spacing=spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_clipped_2m_agrees_with_diffusers_for_a_network_that_clips_its_output(schedule, spacing):
    """diffusers does not clip here, but it takes both x0 from the network's output."""
    options = {"prediction_type": "sample", "spacing": spacing}
    clipped = assert_agreement(schedule, 12, lambda x, t: denoise(x, t).clip(*CLIP), clip=CLIP, **options)
    free = assert_agreement(schedule, 12, **options)
    assert (clipped[-1] - free[-1]).abs().max() > 0.1


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("spacing", "steps"), list(product(SPACINGS, [NUM_TRAIN_TIMESTEPS, 20, 12, 4, 3, 2, 1]))
)
@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "dpmpp_3m"])
def test_the_sde_and_the_third_order_agree_with_diffusers(schedule, sampler, spacing, steps, prediction_type):
    """The SDE with diffusers' sde-dpmsolver++, 3M with the predictor of its UniPC, at the same timesteps."""
    options = {"prediction_type": prediction_type, "spacing": spacing}
    table = sampler_table(schedule, sampler, steps, step_ratio_guard=None, **options)
    start, noise = shared_noise(table.num_rows)
    theirs = diffusers_trajectory(sampler, table, schedule, start, noise, **options)
    ours = our_trajectory(table, start, noise)
    assert torch.isfinite(theirs).all()
    if sampler == "dpmpp_3m" and steps >= 15:  # UniPC lowers the order of the last two rows here, too
        ours, theirs = ours[:-2], theirs[:-2]
    assert relative_difference(ours, theirs) <= 2e-5  # diffusers' sigmas are float32


@pytest.mark.parametrize("spacing", SPACINGS)
def test_without_extrapolation_the_sde_is_ddpm(schedule, spacing):
    ddpm = sampler_table(schedule, "ddpm", 12, spacing=spacing)
    table = sampler_table(schedule, "dpmpp_2m_sde", 12, spacing=spacing)
    for name in "abdfs":
        np.testing.assert_array_equal(table.column(name), ddpm.column(name))
    np.testing.assert_allclose(table.column("c") + table.column("e"), ddpm.column("c"), rtol=1e-12)
    flat = table.column("e") == 0.0
    np.testing.assert_array_equal(table.coefficients[flat], ddpm.coefficients[flat])


def exact_polynomial_row(schedule, table, row, degree):
    """x of the next row if x0 is a polynomial of half the log-SNR, integrated by quadrature."""
    lambdas, alphas_cumprod = half_log_snr(schedule, table), table.alphas_cumprod
    begin, end = lambdas[row], lambdas[row + 1]
    points, weights = np.polynomial.legendre.leggauss(40)
    at = begin + (points + 1.0) * (end - begin) / 2.0
    integral = (end - begin) / 2.0 * (weights * np.exp(at - end) * (at - begin) ** degree).sum()
    x = 0.8
    sigma_ratio = np.sqrt((1.0 - alphas_cumprod[row + 1]) / (1.0 - alphas_cumprod[row]))
    return x, sigma_ratio * x + np.sqrt(alphas_cumprod[row + 1]) * integral


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_rows_of_third_order_are_exact_for_parabolas(schedule, spacing, degree):
    """x_s = sigma_s / sigma_t x + sqrt(abar_s) integral exp(lambda - lambda_s) x0(lambda) d lambda, Eq. 8."""
    table = sampler_table(schedule, "dpmpp_3m", 20, prediction_type="sample", spacing=spacing)
    lambdas = half_log_snr(schedule, table)
    rows = np.flatnonzero(table.column("e2"))
    assert len(rows) >= 10
    for row in rows:
        x, expected = exact_polynomial_row(schedule, table, row, degree)
        x0, x0_previous, x0_previous_2 = (lambdas[[row, row - 1, row - 2]] - lambdas[row]) ** degree
        actual, _ = step(
            table.coefficients[row],
            np.float64(x),
            x0,
            x0_previous,
            0.0,
            columns=table.columns,
            x0_previous_2=x0_previous_2,
        )
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_third_order_is_lowered_at_the_ends_and_after_long_steps():
    """Steps in log-SNR of 1, 1, 1, 4, 3, 3, 2 and a last one to x_0, or twice as many equal ones."""
    log_snr = np.cumsum([-9.0, 1.0, 1.0, 1.0, 4.0, 3.0, 3.0, 2.0])
    alphas_cumprod = 1.0 / (1.0 + np.exp(-log_snr[::-1]))
    schedule = NoiseSchedule(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))
    second = sampler_table(schedule, "dpmpp_2m", 8)
    third = sampler_table(schedule, "dpmpp_3m", 8)
    # Row 3 has the step of 4, row 4 follows it, row 6 is the last but one of fewer than 15, row 7 the last.
    np.testing.assert_array_equal(np.flatnonzero(third.column("e2")), [2, 5])
    lower = third.column("e2") == 0.0
    np.testing.assert_array_equal(third.coefficients[lower, :9], second.coefficients[lower])
    for steps, last in ((14, 11), (15, 13)):
        equal = sampler_table(equal_log_snr_steps(steps - 1), "dpmpp_3m", steps)
        assert np.flatnonzero(equal.column("e2")).tolist() == list(range(2, last + 1))


def test_a_table_has_the_column_e2_only_if_it_needs_it(schedule):
    for sampler, steps, needed in (("dpmpp_3m", 4, False), ("dpmpp_3m", 5, True), ("dpmpp_2m", 20, False)):
        assert ("e2" in sampler_table(schedule, sampler, steps).columns) == needed


@pytest.mark.parametrize("guard", [None, 3.0, 1.2])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_rows_apply_the_formula_of_the_algorithm(schedule, rng, spacing, guard):
    """x <- (sigma_s / sigma_t) x - sqrt(abar_s) (exp(-h) - 1) ((1 + 1/2r) x0 - 1/2r x0_previous)."""
    table = sampler_table(
        schedule, "dpmpp_2m", 9, prediction_type="sample", spacing=spacing, step_ratio_guard=guard
    )
    lambdas, alphas_cumprod = half_log_snr(schedule, table), table.alphas_cumprod
    x, x0, x0_previous = rng.standard_normal((3, 40))
    first_order = []
    for row in range(8):
        h = lambdas[row + 1] - lambdas[row]
        extrapolated = x0
        if row > 0:
            r = (lambdas[row] - lambdas[row - 1]) / h
            if guard is None or 1.0 / r <= guard:
                extrapolated = (1.0 + 0.5 / r) * x0 - 0.5 / r * x0_previous
            else:
                first_order.append(row)
        sigma_ratio = np.sqrt((1.0 - alphas_cumprod[row + 1]) / (1.0 - alphas_cumprod[row]))
        expected = sigma_ratio * x - np.sqrt(alphas_cumprod[row + 1]) * (np.exp(-h) - 1.0) * extrapolated
        x_next, _ = step(table.coefficients[row], x, x0, x0_previous, 0.0)
        np.testing.assert_allclose(x_next, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(np.flatnonzero(table.column("e")[:8] == 0.0), [0, *first_order])


def test_the_guard_makes_only_rows_with_a_long_step_first_order():
    """The steps in log-SNR are 1, 1, 4, 3, 3 and 2, and then a last one to x_0."""
    log_snr = np.array([-8.0, -7.0, -6.0, -2.0, 1.0, 4.0, 6.0])
    alphas_cumprod = 1.0 / (1.0 + np.exp(-log_snr[::-1]))
    schedule = NoiseSchedule(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))
    ddim = sampler_table(schedule, "ddim", 7)
    for guard, rows in ((3.0, [0, 2, 6]), (None, [0, 6]), (4.5, [0, 6]), (0.9, [0, 1, 2, 4, 6])):
        table = sampler_table(schedule, "dpmpp_2m", 7, step_ratio_guard=guard)
        first_order = table.column("e") == 0.0
        np.testing.assert_array_equal(np.flatnonzero(first_order), rows)
        np.testing.assert_allclose(table.coefficients[first_order], ddim.coefficients[first_order])
    default = sampler_table(schedule, "dpmpp_2m", 7).coefficients
    np.testing.assert_array_equal(
        default, sampler_table(schedule, "dpmpp_2m", 7, step_ratio_guard=3.0).coefficients
    )


def test_the_guard_bounds_the_extrapolation():
    """The extrapolation weight w = h / (2 h_previous) is at most 1.5."""
    schedule = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))
    for spacing, steps in product(SPACINGS, [5, 20, 100]):
        ddim = sampler_table(schedule, "ddim", steps, spacing=spacing)
        table = sampler_table(schedule, "dpmpp_2m", steps, spacing=spacing)
        weight = -table.column("e")[:-1] / ddim.column("c")[:-1]
        assert weight.min() >= 0.0
        assert weight.max() <= 1.5 + 1e-9
    unguarded = sampler_table(schedule, "dpmpp_2m", 20, spacing="linspace", step_ratio_guard=None)
    assert -unguarded.column("e").min() > 1.5


@pytest.mark.parametrize("guard", [0.0, -1.0, float("nan")])
def test_an_invalid_guard_is_rejected_with_its_value(schedule, guard):
    with pytest.raises(ValueError, match=f"step_ratio_guard {guard}"):
        sampler_table(schedule, "dpmpp_2m", 5, step_ratio_guard=guard)


def test_eta_and_variance_do_not_affect_2m(schedule):
    plain = sampler_table(schedule, "dpmpp_2m", 10)
    other = sampler_table(schedule, "dpmpp_2m", 10, eta=0.7, variance="beta", use_clipped_model_output=False)
    np.testing.assert_array_equal(other.coefficients, plain.coefficients)
    assert not plain.column("s").any()
    assert not plain.column("f").any()


def window_errors(schedule, sampler, intervals, last_timestep, variance):
    """Errors of the factor between x at T - 1 and x at `last_timestep`, for x_0 ~ N(0, variance).

    The probability flow multiplies x by the ratio of the standard deviations of x_t, sqrt(a variance +
    1 - a). With the exact network a deterministic sampler is linear in x as well.
    """
    errors = []
    for num_intervals in intervals:
        table = sampler_table(
            schedule, sampler, num_intervals + 1, spacing="linspace", prediction_type="epsilon"
        )
        rows = int(np.flatnonzero(table.timesteps == last_timestep)[0])
        assert rows < num_intervals + 1, "the last row, a step to infinite log-SNR, must not be included"
        x, x0 = 1.0, np.float64(0.0)
        for row, a in zip(table.coefficients[:rows], table.alphas_cumprod[:rows], strict=True):
            epsilon = np.float64(x * np.sqrt(1.0 - a) / (a * variance + 1.0 - a))
            x, x0 = step(row, np.float64(x), epsilon, x0, 0.0)
        standard_deviations = np.sqrt(table.alphas_cumprod * (variance - 1.0) + 1.0)
        errors.append(abs(x - standard_deviations[rows] / standard_deviations[0]))
    return np.array(errors)


def equal_log_snr_steps(num_intervals):
    alphas_cumprod = 1.0 / (1.0 + np.exp(-np.linspace(8.0, -8.0, num_intervals + 1)))
    return NoiseSchedule(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


INTERVALS = np.array([80, 160, 320, 640, 1280])
WINDOWS = {
    # Equal steps in log-SNR, where r is 1, and steps that shrink or grow, where it is not.
    "equal log-SNR steps": (equal_log_snr_steps(5120), 0),
    "linear": (NoiseSchedule(linear_betas(10_241, 1e-6, 2e-3)), 1280),
    "cosine": (NoiseSchedule(np.minimum(cosine_betas(10_241), 0.01)), 1280),
}


@pytest.mark.parametrize("variance", [0.04, 4.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_over_a_finite_window_ddim_is_of_first_order_and_2m_of_second_order(window, variance):
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
@pytest.mark.parametrize("steps", [1, 2, 3, 10, NUM_TRAIN_TIMESTEPS])
def test_from_zero_terminal_snr_2m_is_finite(gaussian_denoiser, spacing, steps, guard, prediction_type):
    schedule = NoiseSchedule(zero_terminal_snr(constant_betas(NUM_TRAIN_TIMESTEPS)))
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
    # The first row is always of first order; the second is, because the step before it was infinite.
    assert not table.column("e")[:2].any()
    network = gaussian_denoiser(schedule, variance=1.0, mean=0.5, prediction_type=prediction_type)
    states = list(
        trajectory(lambda x, t: network(x, torch.tensor([t])), initial_noise(), table, lambda row: None)
    )
    assert all(torch.isfinite(x).all() for x, _ in states)
    # Where alphas_cumprod is 0, x says nothing about x_0, so the prediction is the mean of the data.
    torch.testing.assert_close(states[0][1], torch.full_like(initial_noise(), 0.5))
    if steps == NUM_TRAIN_TIMESTEPS:
        torch.testing.assert_close(states[-1][0], initial_noise() + 0.5, atol=0.15, rtol=0.0)


def test_zero_terminal_snr_is_the_limit_of_small_terminal_snr(schedule):
    betas = linear_betas(20, 0.01, 0.5)
    tables = []
    for last in (1.0 - 1e-14, 1.0):
        betas[-1] = last
        tables.append(sampler_table(NoiseSchedule(betas), "dpmpp_2m", 20, prediction_type="v_prediction"))
    near, zero = (table.coefficients[:, :7] for table in tables)
    # 1 / h_previous tends to 0 only like 1 / log, so e and c of row 1 still differ.
    np.testing.assert_allclose(near[0], zero[0], atol=1e-6)
    np.testing.assert_allclose(near[2:], zero[2:], atol=1e-12)
    assert abs(near[1] - zero[1]).max() < 0.1


def test_epsilon_prediction_from_zero_terminal_snr_is_rejected():
    schedule = NoiseSchedule(zero_terminal_snr(linear_betas(20, 0.01, 0.5)))
    with pytest.raises(ValueError, match="alphas_cumprod reaches 0"):
        sampler_table(schedule, "dpmpp_2m", 10)
