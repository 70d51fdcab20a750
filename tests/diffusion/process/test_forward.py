import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torch.distributions import Normal

from diffusion.process.forward import q_posterior, q_sample, q_step, to_epsilon, to_score, to_v, to_x_0
from diffusion.process.schedules import NoiseSchedule, linear_betas


@pytest.fixture(name="schedule")
def _schedule():
    return NoiseSchedule(linear_betas(12, 0.01, 0.4))


@pytest.fixture(name="batch")
def _batch(schedule):
    generator = torch.Generator().manual_seed(1)
    x_0, noise = torch.randn(2, 12, 3, 2, 2, generator=generator, dtype=torch.float64)
    return x_0, torch.arange(12), noise


def test_q_sample_is_the_closed_form_with_a_timestep_per_example(schedule, batch):
    x_0, timesteps, noise = batch
    x_t = q_sample(schedule, x_0, timesteps, noise)
    for t in range(12):
        a = schedule.alphas_cumprod[t]
        torch.testing.assert_close(
            x_t[t], a**0.5 * x_0[t] + (1.0 - a) ** 0.5 * noise[t], rtol=1e-12, atol=1e-14
        )


def test_step_by_step_noising_has_the_moments_of_q_sample(schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, applied t + 1 times, gives the Gaussian of Eq. 4."""
    count, start = 40_000, 1.5
    generator = torch.Generator().manual_seed(0)
    x = torch.full((count,), start, dtype=torch.float64)
    for t, beta in enumerate(schedule.betas):
        x = (1.0 - beta) ** 0.5 * x + beta**0.5 * torch.randn(count, generator=generator, dtype=torch.float64)
        a = schedule.alphas_cumprod[t]
        closed_form = q_sample(
            schedule,
            torch.full((count,), start, dtype=torch.float64),
            torch.full((count,), t),
            torch.randn(count, generator=generator, dtype=torch.float64),
        )
        for sample in (x, closed_form):
            assert abs(sample.mean().item() - a**0.5 * start) < 4.5 * ((1.0 - a) / count) ** 0.5
            assert abs(sample.var().item() / (1.0 - a) - 1.0) < 4.5 * (2.0 / count) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 1, 8, 8)])
def test_q_sample_keeps_shape_and_dtype(schedule, shape, dtype):
    x_t = q_sample(
        schedule, torch.ones(shape, dtype=dtype), torch.tensor([0, 3, 7, 11]), torch.zeros(shape, dtype=dtype)
    )
    assert x_t.shape == shape
    assert x_t.dtype == dtype


def test_alternating_schedules_use_their_own_factors(batch):
    """The factors are cached per schedule."""
    x_0, timesteps, noise = batch
    schedules = [NoiseSchedule(np.full(12, beta)) for beta in (0.1, 0.2)]
    for schedule in (*schedules, *schedules):
        x_t = q_sample(schedule, x_0, timesteps, 0.0 * noise)
        torch.testing.assert_close(x_t[0], schedule.alphas[0] ** 0.5 * x_0[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_exact_outputs_of_every_prediction_type_give_the_true_epsilon_x_0_and_v(
    schedule, batch, prediction_type
):
    x_0, timesteps, noise = batch
    x_t = q_sample(schedule, x_0, timesteps, noise)
    a = torch.tensor(schedule.alphas_cumprod).reshape(-1, 1, 1, 1)
    v = a.sqrt() * noise - (1.0 - a).sqrt() * x_0
    output = {"epsilon": noise, "sample": x_0, "v_prediction": v}[prediction_type]
    for convert, truth in ((to_epsilon, noise), (to_x_0, x_0), (to_v, v)):
        converted = convert(schedule, prediction_type, output, x_t, timesteps)
        torch.testing.assert_close(converted, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_score_is_the_gradient_of_the_logarithm_of_the_density(schedule, batch, prediction_type):
    """By autograd, for data that are a single point: then q(x_t) is the Gaussian q(x_t | x_0)."""
    x_0, timesteps, noise = batch
    x_t = q_sample(schedule, x_0, timesteps, noise).requires_grad_()
    a = torch.tensor(schedule.alphas_cumprod).reshape(-1, 1, 1, 1)
    density = torch.distributions.Normal(a.sqrt() * x_0, (1.0 - a).sqrt())
    (gradient,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    v = a.sqrt() * noise - (1.0 - a).sqrt() * x_0
    output = {"epsilon": noise, "sample": x_0, "v_prediction": v}[prediction_type]
    score = to_score(schedule, prediction_type, output, x_t.detach(), timesteps)
    torch.testing.assert_close(score, gradient, rtol=1e-8, atol=1e-8)


def test_epsilon_to_x_0_to_v_to_epsilon_is_the_identity(schedule, batch):
    x_t, timesteps, epsilon = batch  # arbitrary values for x_t and the output
    x_0 = to_x_0(schedule, "epsilon", epsilon, x_t, timesteps)
    v = to_v(schedule, "sample", x_0, x_t, timesteps)
    back = to_epsilon(schedule, "v_prediction", v, x_t, timesteps)
    torch.testing.assert_close(back, epsilon, rtol=1e-9, atol=1e-9)
    x_0_again = to_x_0(schedule, "v_prediction", v, x_t, timesteps)
    torch.testing.assert_close(x_0_again, x_0, rtol=1e-9, atol=1e-9)


def test_q_step_is_the_formula_with_a_timestep_per_example(schedule, batch):
    """It draws from N(sqrt(1 - beta_t) x_{t-1}, beta_t)."""
    x_previous, timesteps, noise = batch
    x_t = q_step(schedule, x_previous, timesteps, noise)
    for t, beta in enumerate(schedule.betas):
        expected = (1.0 - beta) ** 0.5 * x_previous[t] + beta**0.5 * noise[t]
        torch.testing.assert_close(x_t[t], expected, rtol=1e-12, atol=1e-14)


def test_repeated_steps_agree_in_distribution_with_the_closed_form(schedule):
    """Beyond the moments: a Kolmogorov-Smirnov test finds no difference, for data at two points."""
    count = 20_000
    generator = torch.Generator().manual_seed(3)
    x_0 = torch.where(torch.rand(count, generator=generator) < 0.3, -1.0, 2.0).double()
    x = x_0
    for t in range(12):
        step_noise, closed_form_noise = torch.randn(2, count, generator=generator, dtype=torch.float64)
        timesteps = torch.full((count,), t)
        x = q_step(schedule, x, timesteps, step_noise)
        closed_form = q_sample(schedule, x_0, timesteps, closed_form_noise)
        assert ks_2samp(x, closed_form).pvalue > 1e-4


def test_the_posterior_is_bayes_rule_on_a_grid(schedule):
    """Its moments are those of q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised over a grid of x_{t-1}."""
    x_0, x_t = 1.3, -0.4
    grid = torch.linspace(-8.0, 8.0, 20_001, dtype=torch.float64)
    for t in range(1, 12):
        beta, a_prev = schedule.betas[t], schedule.alphas_cumprod_prev[t]
        joint = Normal((1.0 - beta) ** 0.5 * grid, beta**0.5).log_prob(torch.tensor(x_t))
        joint = joint + Normal(a_prev**0.5 * x_0, (1.0 - a_prev) ** 0.5).log_prob(grid)
        probabilities = joint.softmax(0)
        expected_mean = (probabilities * grid).sum()
        expected_variance = (probabilities * (grid - expected_mean) ** 2).sum()
        arguments = torch.tensor([[x_0], [x_t]], dtype=torch.float64)
        mean, variance = q_posterior(schedule, arguments[:1], arguments[1:], torch.tensor([t]))
        torch.testing.assert_close(mean.squeeze(), expected_mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(variance.squeeze(), expected_variance, rtol=1e-6, atol=0)


def test_a_draw_from_the_posterior_undoes_a_step_in_distribution(schedule):
    """x_{t-1} drawn from q(x_{t-1} | x_t, x_0) has the moments of q(x_{t-1} | x_0)."""
    count = 40_000
    generator = torch.Generator().manual_seed(5)
    noise, z = torch.randn(2, count, 1, generator=generator, dtype=torch.float64)
    x_0 = torch.full((count, 1), 1.5, dtype=torch.float64)
    for t in range(1, 12):
        timesteps = torch.full((count,), t)
        mean, variance = q_posterior(schedule, x_0, q_sample(schedule, x_0, timesteps, noise), timesteps)
        x = mean + variance.sqrt() * z
        a_prev = schedule.alphas_cumprod[t - 1]
        assert abs(x.mean().item() - a_prev**0.5 * 1.5) < 4.5 * ((1.0 - a_prev) / count) ** 0.5
        assert abs(x.var().item() / (1.0 - a_prev) - 1.0) < 4.5 * (2.0 / count) ** 0.5


def test_at_the_first_timestep_the_posterior_is_x_0(schedule, batch):
    x_0, _, x_t = batch
    mean, variance = q_posterior(schedule, x_0, x_t, torch.zeros(12, dtype=torch.int64))
    torch.testing.assert_close(mean, x_0, rtol=1e-12, atol=0.0)
    assert not variance.any()
    assert variance.shape == (12, 1, 1, 1)


@given(
    st.integers(1, 200),
    st.floats(1e-4, 0.5),
    st.sampled_from(["epsilon", "sample", "v_prediction"]),
    st.sampled_from([to_epsilon, to_x_0, to_v]),
)
@settings(max_examples=100)
def test_conversions_round_trip_on_every_schedule(num_train_timesteps, beta_end, prediction_type, convert):
    """Any output is unchanged after a conversion and the inverse conversion."""
    schedule = NoiseSchedule(linear_betas(num_train_timesteps, min(1e-3, beta_end), beta_end))
    assume(schedule.alphas_cumprod[-1] > 1e-8)
    generator = torch.Generator().manual_seed(num_train_timesteps)
    output, x_t = torch.randn(2, num_train_timesteps, 2, generator=generator, dtype=torch.float64)
    timesteps = torch.arange(num_train_timesteps)
    name = {to_epsilon: "epsilon", to_x_0: "sample", to_v: "v_prediction"}[convert]
    back = {"epsilon": to_epsilon, "sample": to_x_0, "v_prediction": to_v}[prediction_type]
    converted = convert(schedule, prediction_type, output, x_t, timesteps)
    torch.testing.assert_close(back(schedule, name, converted, x_t, timesteps), output, rtol=1e-6, atol=1e-6)
