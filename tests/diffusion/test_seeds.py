"""The seeds against the DDPM paper: where one of them is wrong, a test shows that it cannot be right.

000 and the numbers of 004's embedding (test_embeddings.py) are right throughout. That guidance lowers
diversity, which 003 has the other way round, is shown in test_conditional.py.
"""

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.objectives import Objective
from diffusion.process import q_posterior, q_sample, q_step
from diffusion.sampling import COEFFICIENTS, sampler_table
from diffusion.schedules import NoiseSchedule, constant_betas, linear_betas

DDPM = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))
SHORT = NoiseSchedule(linear_betas(12, 0.01, 0.4))


def column(table, name):
    """Of a table over all timesteps, by rising t."""
    return table.coefficients[::-1, COEFFICIENTS.index(name)]


def test_000_and_004_the_reverse_step_in_epsilon_is_the_posterior_mean_of_x_0s_estimate():
    """(x - beta_t / sqrt(1 - abar_t) epsilon) / sqrt(alpha_t) + sigma_t z: DDPM, Eq. 11 and Algorithm 2."""
    for schedule in (DDPM, SHORT):
        table = sampler_table(schedule, "ddpm", schedule.num_train_timesteps)
        a, b, c, d, s = (column(table, name) for name in "abcds")
        factor = 1.0 / np.sqrt(schedule.alphas)
        np.testing.assert_allclose(c * a + d, factor, rtol=1e-9)
        of_epsilon = -factor * schedule.betas / np.sqrt(1.0 - schedule.alphas_cumprod)
        np.testing.assert_allclose(c * b, of_epsilon, rtol=1e-9)
        np.testing.assert_allclose(s, np.sqrt(schedule.posterior_variance), rtol=1e-9, atol=1e-15)


def walk(schedule, steps, start, count=50_000):
    """x after so many steps of the forward chain, float64 [count, 1]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((count, 1), start, dtype=torch.float64)
    for t in range(steps):
        noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        x = q_step(schedule, x, torch.full((count,), t), noise)
    return x


def test_001_prints_one_step_where_it_announces_all_of_them():
    """As the law of x_t given x_0 it prints N(sqrt(1 - beta_t) x_0, beta_t I)."""
    x, t, count = walk(SHORT, 12, start=1.5), 11, 50_000
    a, beta = SHORT.alphas_cumprod[t], SHORT.betas[t]
    mean, variance = x.mean().item(), x.var().item()
    error = ((1.0 - a) / count) ** 0.5
    assert abs(mean - a**0.5 * 1.5) < 4.5 * error
    assert abs(variance / (1.0 - a) - 1.0) < 4.5 * (2.0 / count) ** 0.5
    assert abs(mean - (1.0 - beta) ** 0.5 * 1.5) > 100.0 * error
    assert variance > 2.0 * beta
    # What is implemented is the law that the chain has.
    zero, one = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    assert q_sample(SHORT, one, torch.tensor([t]), zero).item() == pytest.approx(a**0.5, rel=1e-12)
    assert q_sample(SHORT, zero, torch.tensor([t]), one).item() == pytest.approx((1.0 - a) ** 0.5, rel=1e-12)


def test_002_drops_the_index_that_keeps_the_variance_at_one():
    """N(sqrt(1 - beta) x_{t-1}, beta_t I) with one beta for all t: data of variance 1 do not keep it."""
    for beta in (DDPM.betas[0], DDPM.betas.mean(), DDPM.betas[-1]):
        variance = 1.0
        for beta_t in DDPM.betas:
            variance = (1.0 - beta) * variance + beta_t
        assert abs(variance - 1.0) > 0.04
    variance, one = 1.0, torch.ones(1, 1, dtype=torch.float64)
    for t in torch.arange(1000):
        of_x = q_step(DDPM, one, t.reshape(1), 0.0 * one).item()
        of_noise = q_step(DDPM, 0.0 * one, t.reshape(1), one).item()
        variance = of_x**2 * variance + of_noise**2
    assert variance == pytest.approx(1.0, rel=1e-12)


class PerTimestep(nn.Module):
    """output = weight[t] x_t."""

    def __init__(self, total):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(total, 1, dtype=torch.float64))

    def forward(self, x, t):
        return self.weight[t] * x


def sampled_variance(weights, steps=12):
    """Variance of DDIM's samples when epsilon_theta = weights[t] x_t, from N(0, 1), in closed form."""
    table, factor = sampler_table(SHORT, "ddim", steps), 1.0
    for row, t in zip(table.coefficients, table.timesteps, strict=True):
        a, b, c, d, _, _, _, _, _ = row
        factor *= c * (a + b * weights[t]) + d
    return factor**2


def fitted(loss):
    """The weights that minimise a loss(output, x_0, noise) for data of variance 2.25."""
    generator = torch.Generator().manual_seed(1)
    x_0, noise = torch.randn(2, 12 * 4000, 1, generator=generator, dtype=torch.float64)
    x_0, timesteps = 1.5 * x_0, torch.arange(12).repeat(4000)
    network = PerTimestep(12)
    optimizer = torch.optim.SGD(network.parameters(), lr=2.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss(network, x_0, timesteps, noise).backward()
        optimizer.step()
    return network.weight.detach().flatten().numpy()


def test_003_prints_a_loss_whose_minimum_is_no_noise():
    """|x_0 - epsilon - epsilon_theta|^2 teaches E[x_0 - epsilon | x_t], which samples other data."""
    a, v = SHORT.alphas_cumprod, 2.25
    total = a * v + 1.0 - a

    def printed(network, x_0, timesteps, noise):
        output = network(q_sample(SHORT, x_0, timesteps, noise), timesteps)
        return (x_0 - noise - output).square().mean()

    wrong = fitted(printed)
    np.testing.assert_allclose(wrong, (np.sqrt(a) * v - np.sqrt(1.0 - a)) / total, atol=0.1)
    right = fitted(lambda *batch: Objective(SHORT)(*batch).loss)
    np.testing.assert_allclose(right, np.sqrt(1.0 - a) / total, atol=0.1)
    # Twelve steps of DDIM are coarse, but not that coarse.
    assert sampled_variance(right) == pytest.approx(v, rel=0.2)
    assert sampled_variance(wrong) > 2.0 * v


def test_003_prints_products_of_beta_where_products_of_alpha_belong():
    """After a few steps the product of the betas is nothing beside 1: 1 - beta-bar says "all noise"."""
    beta_bar = np.cumprod(DDPM.betas)
    assert (1.0 - beta_bar[4:] == 1.0).all()
    assert 1.0 - DDPM.alphas_cumprod[4] < 1e-3, "where there is next to none"
    # The factor of epsilon in its update is then beta_t / sqrt(alpha_t), not that of Eq. 11.
    table = sampler_table(DDPM, "ddpm", 1000)
    of_epsilon = -column(table, "c") * column(table, "b")
    printed = DDPM.betas / np.sqrt(1.0 - beta_bar) / np.sqrt(DDPM.alphas)
    assert of_epsilon[4] > 20.0 * printed[4]


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_003_prints_a_sigma_without_bound_where_ddim_has_the_root_of_beta_tilde(eta):
    """eta sqrt(beta_t (1 - beta-bar) / beta-bar) against DDIM, arXiv:2010.02502, Eq. 16."""
    table = sampler_table(DDPM, "ddim", 1000, eta=eta)
    np.testing.assert_allclose(column(table, "s")[1:], eta * np.sqrt(DDPM.posterior_variance)[1:], rtol=1e-9)
    beta_bar = np.cumprod(DDPM.betas)[:50]  # beyond, it underflows
    printed = eta * np.sqrt(DDPM.betas[:50] * (1.0 - beta_bar) / beta_bar)
    assert printed[1] > 10.0, "of the data's deviations, in the step before the last"
    assert printed[-1] > 1e50
    # With the product of the alphas in it too it would be no posterior deviation, but another one.
    a = DDPM.alphas_cumprod
    assert (eta * np.sqrt(DDPM.betas * (1.0 - a) / a))[-1] > 10.0 * column(table, "s")[-1]


@pytest.mark.parametrize("total", [10, 100, 1000, 10_000])
def test_003_with_its_small_constant_leaves_almost_no_noise_whatever_T_is(total):
    """It prints beta_t = 1 - (1 - beta_min)^(1/T) with a small beta_min, "so that q(x_T) comes close
    to a uniform distribution". The product of the alphas is then 1 - beta_min for every T: x_T is
    x_0 with a little noise. And where noise does take over, the limit is Gaussian, not uniform."""
    beta_min = 1e-4
    printed = np.full(total, 1.0 - (1.0 - beta_min) ** (1.0 / total))
    np.testing.assert_allclose(constant_betas(total, beta_min), printed, rtol=1e-7)
    assert NoiseSchedule(printed).alphas_cumprod[-1] == pytest.approx(1.0 - beta_min, rel=1e-9)
    # The standard deviation of x_T given x_0: a hundredth of the data's.
    assert np.sqrt(1.0 - NoiseSchedule(printed).alphas_cumprod[-1]) == pytest.approx(0.01, rel=1e-6)


def test_003_s_forward_process_tends_to_a_gaussian_and_not_to_a_uniform_law():
    """From two points at +-1 the excess kurtosis of x_T (uniform: -1.2, Gaussian: 0) goes to 0."""
    at = NoiseSchedule(constant_betas(1000)).alphas_cumprod[-1]
    # Cumulants add: the fourth of x_0 is -2, that of the noise 0; the variance stays 1.
    assert abs(-2.0 * at**2) < 1e-7
    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 1.0], size=200_000)
    for beta in constant_betas(20):
        x = np.sqrt(1.0 - beta) * x + np.sqrt(beta) * rng.standard_normal(x.size)
    standard_error = np.sqrt(24.0 / x.size)
    assert abs(np.mean(x**4) / np.mean(x**2) ** 2 - 3.0) < 4.0 * standard_error


def two_peaks(density):
    """How many local maxima a density on a grid has."""
    return int(((density[1:-1] > density[:-2]) & (density[1:-1] > density[2:])).sum())


def test_004_leaves_x_0_out_of_bayes_rule():
    """Of two numerators with x_0 in them it makes q(x_{t-1} | x_t). For data at -1 and 1 that law has two
    peaks; q(x_{t-1} | x_t, x_0), with the mean and variance that it goes on to give, has one."""
    schedule = NoiseSchedule([0.01, 0.6])
    grid = torch.linspace(-3.0, 3.0, 6001, dtype=torch.float64)
    normal = torch.distributions.Normal
    before, x_t = schedule.alphas_cumprod[0], 0.1
    likelihood = normal(schedule.alphas[1] ** 0.5 * grid, schedule.betas[1] ** 0.5).log_prob(
        torch.tensor(x_t)
    )
    given = {
        x_0: (likelihood + normal(before**0.5 * x_0, (1.0 - before) ** 0.5).log_prob(grid)).exp()
        for x_0 in (-1.0, 1.0)
    }
    assert two_peaks(given[-1.0] + given[1.0]) == 2
    for x_0, density in given.items():
        assert two_peaks(density) == 1
        mean, variance = q_posterior(
            schedule,
            torch.tensor([[x_0]], dtype=torch.float64),
            torch.tensor([[x_t]], dtype=torch.float64),
            torch.tensor([1]),
        )
        gaussian = normal(mean.squeeze(), variance.squeeze().sqrt()).log_prob(grid).exp()
        torch.testing.assert_close(density / density.sum(), gaussian / gaussian.sum(), rtol=1e-6, atol=1e-12)


def test_004_calls_a_variance_sigma():
    """Its sigma_{t-1|t} = (1 - abar_{t-1}) / (1 - abar_t) (1 - alpha_t) is beta-tilde, whose root
    multiplies z, as it has it itself in the update further down."""
    a, before = DDPM.alphas_cumprod, DDPM.alphas_cumprod_prev
    printed = (1.0 - before) / (1.0 - a) * (1.0 - DDPM.alphas)
    np.testing.assert_allclose(printed, DDPM.posterior_variance, rtol=1e-9)
    deviation = column(sampler_table(DDPM, "ddpm", 1000), "s")
    np.testing.assert_allclose(deviation**2, printed, rtol=1e-9, atol=1e-15)
    assert (deviation[1:] > 5.0 * printed[1:]).all()


def test_004_multiplies_over_the_wrong_index():
    """abar_t = prod_T alpha_t, read as it stands, is alpha_t to the power T, or one number for all t."""
    np.testing.assert_allclose(
        DDPM.alphas_cumprod, [np.prod(DDPM.alphas[: t + 1]) for t in range(1000)], rtol=1e-9
    )
    assert (np.diff(DDPM.alphas_cumprod) < 0.0).all()
    to_the_power = DDPM.alphas**1000
    assert to_the_power[0] < 0.91 < 0.9998 < DDPM.alphas_cumprod[0]
    # x_t would not be what the chain makes: at the first step it holds a thousand steps' noise.
    variance = walk(DDPM, 1, start=0.0).var().item()
    assert variance == pytest.approx(DDPM.betas[0], rel=0.05)
    assert 1.0 - to_the_power[0] > 900.0 * variance
