from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.process.schedules import (
    NoiseSchedule,
    Spacing,
    cosine_betas,
    linear_betas,
    nearest_timesteps,
    respaced_timesteps,
    zero_terminal_snr,
)

SPACINGS = get_args(Spacing)

SCHEDULES = {
    "ddpm": linear_betas(1000, 1e-4, 0.02),
    "short": linear_betas(10, 0.05, 0.6),
    "cosine": cosine_betas(50),
    "one_step": np.array([0.3]),
    "constant": np.full(40, 0.1),
    "long": linear_betas(3000, 1e-5, 0.05),
}


@pytest.fixture(params=SCHEDULES, name="schedule")
def _schedule(request):
    return NoiseSchedule(SCHEDULES[request.param])


def test_linear_betas_grow_in_equal_steps_from_start_to_end():
    betas = linear_betas(1000, 1e-4, 0.02)
    assert betas.dtype == np.float64
    assert betas[0] == 1e-4
    assert betas[-1] == 0.02
    np.testing.assert_allclose(np.diff(betas), (0.02 - 1e-4) / 999, rtol=1e-9)


def test_a_single_linear_beta_is_beta_start():
    np.testing.assert_array_equal(linear_betas(1, 0.1, 0.2), [0.1])


def test_cosine_alphas_cumprod_follow_the_squared_cosine_up_to_the_limit():
    """Improved DDPM, Eq. 17: alpha-bar(t) = f(t) / f(0) as long as no beta is clipped."""
    num_train_timesteps, s = 200, 0.008
    betas = cosine_betas(num_train_timesteps, s)
    u = np.arange(num_train_timesteps + 1) / num_train_timesteps
    f = np.cos((u + s) / (1 + s) * np.pi / 2) ** 2
    unclipped = betas < 0.999
    assert unclipped[:-1].all()
    alphas_cumprod = NoiseSchedule(betas).alphas_cumprod
    np.testing.assert_allclose(alphas_cumprod[unclipped], (f[1:] / f[0])[unclipped], rtol=1e-10)


@given(st.integers(1, 500), st.floats(0.0, 1.0), st.floats(0.01, 0.999))
@settings(max_examples=50)
def test_cosine_betas_are_valid_and_never_above_the_limit(num_train_timesteps, s, max_beta):
    betas = cosine_betas(num_train_timesteps, s, max_beta)
    assert betas.shape == (num_train_timesteps,)
    assert betas.max() <= max_beta
    assert betas.min() > 0.0


def test_alphas_cumprod_is_the_cumulative_product(schedule):
    expected, product = [], 1.0
    for beta in schedule.betas:
        product *= 1.0 - beta
        expected.append(product)
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=1e-12)
    np.testing.assert_array_equal(schedule.alphas_cumprod_prev, [1.0, *schedule.alphas_cumprod[:-1]])
    np.testing.assert_array_equal(schedule.alphas, 1.0 - schedule.betas)
    assert schedule.num_train_timesteps == len(schedule.betas)


def test_log_snr_is_the_logit_of_alphas_cumprod_and_decreases(schedule):
    from_log_snr = 1.0 / (1.0 + np.exp(-schedule.log_snr))
    np.testing.assert_allclose(from_log_snr, schedule.alphas_cumprod, rtol=1e-9)
    assert np.all(np.diff(schedule.log_snr) < 0.0)


def test_log_snr_is_accurate_where_alphas_cumprod_rounds_to_1_or_underflows():
    tiny = NoiseSchedule(np.full(3, 1e-20))
    np.testing.assert_allclose(tiny.log_snr, -np.log([1e-20, 2e-20, 3e-20]), rtol=1e-12)
    deep = NoiseSchedule(np.full(4000, 0.5))
    assert deep.alphas_cumprod[-1] == 0.0
    np.testing.assert_allclose(deep.log_snr[-1], 4000 * np.log(0.5), rtol=1e-12)


def test_log_snr_is_minus_infinity_if_no_signal_is_left():
    schedule = NoiseSchedule([0.1, 1.0])
    assert schedule.log_snr[1] == -np.inf
    assert schedule.alphas_cumprod[1] == 0.0
    np.testing.assert_allclose(schedule.log_snr[0], np.log(9.0), rtol=1e-12)


def test_posterior_is_bayes_rule_for_gaussians(schedule):
    """q(x_{t-1}|x_t, x_0) is the product of N(sqrt(abar_{t-1}) x_0, 1 - abar_{t-1}) and of the
    likelihood of x_t, so precisions add and means are weighted by precision."""
    prev, alpha, beta = schedule.alphas_cumprod_prev[1:], schedule.alphas[1:], schedule.betas[1:]
    prior_precision, likelihood_precision = 1.0 / (1.0 - prev), alpha / beta
    variance = 1.0 / (prior_precision + likelihood_precision)
    np.testing.assert_allclose(schedule.posterior_variance[1:], variance, rtol=1e-8)
    np.testing.assert_allclose(
        schedule.posterior_mean_coef1[1:], variance * prior_precision * np.sqrt(prev), rtol=1e-8
    )
    np.testing.assert_allclose(schedule.posterior_mean_coef2[1:], variance * np.sqrt(alpha) / beta, rtol=1e-8)


def test_posterior_of_the_first_step_is_x_0_itself(schedule):
    assert schedule.posterior_variance[0] == 0.0
    assert schedule.posterior_mean_coef2[0] == 0.0
    assert schedule.posterior_mean_coef1[0] == pytest.approx(1.0, rel=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        "betas",
        "alphas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "log_snr",
        "posterior_variance",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ],
)
def test_every_quantity_is_float64_of_length_T_and_read_only(schedule, name):
    values = getattr(schedule, name)
    assert values.dtype == np.float64
    assert values.shape == (schedule.num_train_timesteps,)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 0.5


def test_a_schedule_copies_the_callers_array():
    betas = np.array([0.1, 0.2])
    schedule = NoiseSchedule(betas)
    betas[0] = 0.9
    assert schedule.betas[0] == 0.1


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: linear_betas(0, 1e-4, 0.02), "0"),
        (lambda: linear_betas(-3, 1e-4, 0.02), "-3"),
        (lambda: linear_betas(10, 0.5, 0.25), "0.25"),
        (lambda: linear_betas(10, 0.0, 0.25), "0.0"),
        (lambda: linear_betas(10, 0.1, 1.0), "1.0"),
        (lambda: linear_betas(10, 0.1, float("nan")), "nan"),
        (lambda: cosine_betas(0), "0"),
        (lambda: cosine_betas(10, s=-0.5), "-0.5"),
        (lambda: cosine_betas(10, max_beta=1.0), "1.0"),
        (lambda: NoiseSchedule([0.1, 0.0]), "0.0"),
        (lambda: NoiseSchedule([0.1, 1.5]), "1.5"),
        (lambda: NoiseSchedule([0.1, float("nan")]), "nan"),
        (lambda: NoiseSchedule([]), r"\(0,\)"),
        (lambda: NoiseSchedule([[0.1]]), r"\(1, 1\)"),
    ],
)
def test_invalid_schedules_are_rejected_with_their_value(build, named):
    with pytest.raises(ValueError, match=named):
        build()


@st.composite
def schedules_and_steps(draw):
    num_train_timesteps = draw(st.integers(1, 300))
    kind = draw(st.sampled_from(["linear", "cosine", "constant", "zero_terminal"]))
    if kind == "cosine":
        betas = cosine_betas(num_train_timesteps)
    elif kind == "constant":
        betas = np.full(num_train_timesteps, draw(st.floats(1e-4, 0.9)))
    else:
        start = draw(st.floats(1e-5, 0.5))
        betas = linear_betas(num_train_timesteps, start, draw(st.floats(start, 0.99)))
    if kind == "zero_terminal":
        betas[-1] = 1.0
    return NoiseSchedule(betas), draw(st.integers(1, num_train_timesteps))


@given(schedules_and_steps(), st.sampled_from(SPACINGS))
@settings(max_examples=300)
def test_respacing_gives_S_distinct_decreasing_timesteps(schedule_and_steps, spacing):
    schedule, steps = schedule_and_steps
    timesteps = respaced_timesteps(schedule, steps, spacing)
    assert timesteps.dtype == np.int64
    assert timesteps.shape == (steps,)
    assert np.all(np.diff(timesteps) < 0)
    assert 0 <= timesteps[-1]
    assert timesteps[0] < schedule.num_train_timesteps


@pytest.mark.parametrize("num_train_timesteps", [1, 2, 3, 7, 10, 49, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_respacing_to_T_steps_gives_every_timestep(num_train_timesteps, spacing):
    schedule = NoiseSchedule(linear_betas(num_train_timesteps, 1e-4, 0.3))
    np.testing.assert_array_equal(
        respaced_timesteps(schedule, num_train_timesteps, spacing), np.arange(num_train_timesteps)[::-1]
    )


@given(schedules_and_steps())
@settings(max_examples=100)
def test_spacings_include_the_documented_ends(schedule_and_steps):
    schedule, steps = schedule_and_steps
    last = schedule.num_train_timesteps - 1
    assert respaced_timesteps(schedule, steps, "leading")[-1] == 0
    assert respaced_timesteps(schedule, steps, "trailing")[0] == last
    for spacing in ("linspace", "logsnr", "karras"):
        timesteps = respaced_timesteps(schedule, steps, spacing)
        assert timesteps[0] == last
        assert steps == 1 or timesteps[-1] == 0


def test_the_table_of_arXiv_2305_08891():
    """Table 2 of the paper has 1-based timesteps for T = 1000 and S = 10."""
    schedule = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))
    expected = {
        "leading": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
        "trailing": [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100],
        "linspace": [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1],
    }
    for spacing, one_based in expected.items():
        np.testing.assert_array_equal(respaced_timesteps(schedule, 10, spacing) + 1, one_based)


def test_logsnr_spacing_has_equal_steps_in_log_snr_if_the_schedule_is_fine_enough():
    schedule = NoiseSchedule(linear_betas(100_000, 1e-6, 2e-4))
    log_snr = schedule.log_snr[respaced_timesteps(schedule, 12, "logsnr")]
    gaps = np.diff(log_snr)
    # Rounding to a timestep may cost at most half the distance at both ends of a gap. The distances in
    # log-SNR are largest between the first timesteps.
    assert np.abs(gaps - gaps.mean()).max() <= np.abs(np.diff(schedule.log_snr))[:10].max()
    assert gaps.min() > 0.0


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(cosine_betas(1000)),
        NoiseSchedule(linear_betas(1000, 1e-4, 0.2)),
        NoiseSchedule(zero_terminal_snr(linear_betas(1000, 1e-4, 0.02))),
    ],
    ids=["cosine", "steep", "zero terminal SNR"],
)
@pytest.mark.parametrize("steps", [2, 10, 30])
def test_logsnr_spacing_loses_no_step_in_pure_noise(schedule, steps):
    assert schedule.log_snr[-1] < -15.0
    visited = schedule.log_snr[respaced_timesteps(schedule, steps, "logsnr")]
    assert visited[0] == schedule.log_snr[-1]
    expected = np.linspace(-10.0, schedule.log_snr[0], steps)
    is_fine = expected < 5.0  # there the timesteps of a schedule are closer than the steps
    np.testing.assert_allclose(visited[1:][is_fine[1:]], expected[1:][is_fine[1:]], atol=0.3)


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_respacing_rejects_a_wrong_number_of_steps_with_its_value(steps):
    schedule = NoiseSchedule(linear_betas(10, 1e-4, 0.02))
    with pytest.raises(ValueError, match=rf"num_inference_steps {steps}\b.*1 to 10"):
        respaced_timesteps(schedule, steps)


def test_respacing_rejects_an_unknown_spacing_with_its_name():
    schedule = NoiseSchedule(linear_betas(10, 1e-4, 0.02))
    with pytest.raises(ValueError, match="'quadratic'.*leading, trailing, linspace, logsnr"):
        respaced_timesteps(schedule, 5, "quadratic")


def test_karras_has_equal_steps_in_the_seventh_root_of_sigma():
    """EDM, arXiv:2206.00364, Eq. 5, on timesteps so dense that rounding to one does not show."""
    schedule = NoiseSchedule(linear_betas(100_000, 1e-6, 1.9e-4))
    timesteps = respaced_timesteps(schedule, 18, "karras")
    sigma = np.sqrt((1.0 - schedule.alphas_cumprod) / schedule.alphas_cumprod)[timesteps]
    highest, lowest, i = sigma[0], sigma[-1], np.arange(18)
    expected = (highest ** (1 / 7) + i / 17 * (lowest ** (1 / 7) - highest ** (1 / 7))) ** 7
    assert timesteps[0] == 99_999 and timesteps[-1] == 0
    np.testing.assert_allclose(sigma, expected, rtol=5e-3)


def test_karras_is_karras_of_diffusers():
    """diffusers' sigmas between the same ends, as the nearest timesteps."""
    from diffusers import EulerDiscreteScheduler

    schedule = NoiseSchedule(linear_betas(1000, 1e-4, 0.019))  # log-SNR ends above -10
    sigma = np.sqrt((1.0 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    made = EulerDiscreteScheduler(trained_betas=schedule.betas.tolist(), use_karras_sigmas=True)
    made.sigma_min, made.sigma_max = sigma[0], sigma[-1]
    theirs = made._convert_to_karras(in_sigmas=sigma[::-1], num_inference_steps=20)
    nearest = np.abs(np.log(sigma)[None, :] - np.log(np.asarray(theirs))[:, None]).argmin(axis=1)
    np.testing.assert_array_equal(respaced_timesteps(schedule, 20, "karras"), nearest)


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_nearest_timesteps_is_a_search_over_all(num_timesteps, seed):
    """The smallest of equally near ones, with equal values and an infinite one among them."""
    rng = np.random.default_rng(seed)
    log_snr = -np.sort(rng.integers(-8, 8, num_timesteps).astype(float))
    if seed % 3 == 0 and num_timesteps > 1:
        log_snr[-1] = -np.inf
    targets = rng.integers(-20, 20, 30) / 2.0
    expected = np.abs(log_snr[None, :] - targets[:, None]).argmin(axis=1)
    np.testing.assert_array_equal(nearest_timesteps(log_snr, targets), expected)
