import numpy as np
import pytest
import torch
from torch import nn

from diffusion.process import epsilon_loss, q_sample, to_epsilon, to_v, to_x_0
from diffusion.schedules import NoiseSchedule, linear_betas


@pytest.fixture(name="schedule")
def _schedule():
    return NoiseSchedule(linear_betas(12, 0.01, 0.4))


@pytest.fixture(name="batch")
def _batch(schedule):
    generator = torch.Generator().manual_seed(1)
    x_0, noise = torch.randn(2, 12, 3, 2, 2, generator=generator, dtype=torch.float64)
    return x_0, torch.arange(12), noise


def test_q_sample_is_the_closed_form_for_each_examples_own_timestep(schedule, batch):
    x_0, timesteps, noise = batch
    x_t = q_sample(schedule, x_0, timesteps, noise)
    for t in range(12):
        at = schedule.alphas_cumprod[t]
        torch.testing.assert_close(
            x_t[t], at**0.5 * x_0[t] + (1.0 - at) ** 0.5 * noise[t], rtol=1e-12, atol=1e-14
        )


def test_step_by_step_noising_has_the_moments_of_q_sample(schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, applied t + 1 times, is Eq. 4's Gaussian."""
    count, start = 40_000, 1.5
    generator = torch.Generator().manual_seed(0)
    x = torch.full((count,), start, dtype=torch.float64)
    for t, beta in enumerate(schedule.betas):
        x = (1.0 - beta) ** 0.5 * x + beta**0.5 * torch.randn(count, generator=generator, dtype=torch.float64)
        at = schedule.alphas_cumprod[t]
        closed = q_sample(
            schedule,
            torch.full((count,), start, dtype=torch.float64),
            torch.full((count,), t),
            torch.randn(count, generator=generator, dtype=torch.float64),
        )
        for sample in (x, closed):
            assert abs(sample.mean().item() - at**0.5 * start) < 4.5 * ((1.0 - at) / count) ** 0.5
            assert abs(sample.var().item() / (1.0 - at) - 1.0) < 4.5 * (2.0 / count) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 1, 8, 8)])
def test_q_sample_keeps_shape_and_dtype(schedule, shape, dtype):
    x_t = q_sample(
        schedule, torch.ones(shape, dtype=dtype), torch.tensor([0, 3, 7, 11]), torch.zeros(shape, dtype=dtype)
    )
    assert x_t.shape == shape
    assert x_t.dtype == dtype


def test_schedules_are_told_apart(batch):
    """The factors are cached by schedule: two schedules in turn must not see each other's."""
    x_0, timesteps, noise = batch
    schedules = [NoiseSchedule(np.full(12, beta)) for beta in (0.1, 0.2)]
    for schedule in (*schedules, *schedules):
        x_t = q_sample(schedule, x_0, timesteps, 0.0 * noise)
        torch.testing.assert_close(x_t[0], schedule.alphas[0] ** 0.5 * x_0[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_exact_outputs_of_every_kind_give_the_true_epsilon_x_0_and_v(schedule, batch, prediction_type):
    x_0, timesteps, noise = batch
    x_t = q_sample(schedule, x_0, timesteps, noise)
    at = torch.tensor(schedule.alphas_cumprod).reshape(-1, 1, 1, 1)
    v = at.sqrt() * noise - (1.0 - at).sqrt() * x_0
    output = {"epsilon": noise, "sample": x_0, "v_prediction": v}[prediction_type]
    for convert, truth in ((to_epsilon, noise), (to_x_0, x_0), (to_v, v)):
        found = convert(schedule, prediction_type, output, x_t, timesteps)
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)


def test_epsilon_to_x_0_to_v_to_epsilon_is_the_identity(schedule, batch):
    x_t, timesteps, epsilon = batch  # any x_t and any output, consistent with no data at all
    x_0 = to_x_0(schedule, "epsilon", epsilon, x_t, timesteps)
    v = to_v(schedule, "sample", x_0, x_t, timesteps)
    back = to_epsilon(schedule, "v_prediction", v, x_t, timesteps)
    torch.testing.assert_close(back, epsilon, rtol=1e-9, atol=1e-9)
    x_0_again = to_x_0(schedule, "v_prediction", v, x_t, timesteps)
    torch.testing.assert_close(x_0_again, x_0, rtol=1e-9, atol=1e-9)


class Linear(nn.Module):
    """epsilon_hat = weight x_t, the same at every timestep."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x, t):
        return self.weight * x


def gaussian_batch(variance=2.25, count=100_000, timestep=5):
    generator = torch.Generator().manual_seed(2)
    x_0, noise = torch.randn(2, count, 2, generator=generator, dtype=torch.float64)
    return variance**0.5 * x_0, torch.full((count,), timestep), noise


def test_epsilon_loss_is_the_mean_over_batch_and_dimensions(schedule):
    """A network that returns zeros has the mean square of the noise as its loss: 1 in expectation."""
    x_0, timesteps, noise = gaussian_batch()
    loss = epsilon_loss(Linear(0.0), schedule, x_0, timesteps, noise)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-12)
    assert loss.item() == pytest.approx(1.0, abs=4.5 * (2.0 / noise.numel()) ** 0.5)


def test_gradient_of_a_linear_denoiser_is_its_closed_form(schedule):
    """For N(0, v) data and epsilon_hat = w x_t: E loss = w^2 (a v + s^2) - 2 w s + 1, with s^2 = 1 - a,
    so its gradient is 2 (w (a v + s^2) - s); on the batch itself it is 2 mean(x_t (w x_t - epsilon))."""
    weight, variance = 0.8, 2.25
    x_0, timesteps, noise = gaussian_batch(variance)
    network = Linear(weight)
    epsilon_loss(network, schedule, x_0, timesteps, noise).backward()
    found = network.weight.grad.item()

    a = schedule.alphas_cumprod[5]
    x_t = a**0.5 * x_0 + (1.0 - a) ** 0.5 * noise
    terms = 2.0 * x_t * (weight * x_t - noise)
    assert found == pytest.approx(terms.mean().item(), rel=1e-10)
    population = 2.0 * (weight * (a * variance + 1.0 - a) - (1.0 - a) ** 0.5)
    assert abs(found - population) < 4.5 * terms.std().item() / terms.numel() ** 0.5


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
def test_one_training_step_of_a_linear_denoiser_is_the_one_computed_by_hand(schedule, optimizer_name):
    """SGD moves by -rate * gradient, AdamW's first step by -rate * gradient / (|gradient| + eps)."""
    weight, rate = 0.8, 0.01
    x_0, timesteps, noise = gaussian_batch(count=1000)
    network = Linear(weight)
    optimizer = getattr(torch.optim, optimizer_name)(network.parameters(), lr=rate, weight_decay=0.0)
    epsilon_loss(network, schedule, x_0, timesteps, noise).backward()
    optimizer.step()
    a = schedule.alphas_cumprod[5]
    x_t = a**0.5 * x_0 + (1.0 - a) ** 0.5 * noise
    gradient = 2.0 * (x_t * (weight * x_t - noise)).mean().item()
    update = gradient if optimizer_name == "SGD" else gradient / (abs(gradient) + 1e-8)
    assert network.weight.item() == pytest.approx(weight - rate * update, rel=1e-10)


def test_gradient_descent_on_the_loss_finds_the_exact_denoiser(schedule):
    """The minimum of the loss over w is s / (a v + s^2), the coefficient of E[epsilon | x_t]."""
    variance = 2.25
    x_0, timesteps, noise = gaussian_batch(variance)
    network = Linear(0.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    for _ in range(30):
        optimizer.zero_grad()
        epsilon_loss(network, schedule, x_0, timesteps, noise).backward()
        optimizer.step()
    a = schedule.alphas_cumprod[5]
    assert network.weight.item() == pytest.approx((1.0 - a) ** 0.5 / (a * variance + 1.0 - a), abs=0.01)
