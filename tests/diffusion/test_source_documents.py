"""Errors in the source documents (docs/source-documents.md): for each, a test that the formula cannot hold.

Document 000 has no error. The table of numbers in document 004, which is right, is tested in
networks/test_embeddings.py; that guidance lowers diversity, contrary to document 003, in
training/test_conditional.py.
"""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.process.forward import q_posterior, q_sample, q_step, to_x_0
from diffusion.process.samplers import COEFFICIENTS, sampler_table
from diffusion.process.schedules import NoiseSchedule, constant_betas, linear_betas
from diffusion.training.loss import DenoisingLoss

DDPM = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))
SHORT = NoiseSchedule(linear_betas(12, 0.01, 0.4))


def column(table, name):
    """One coefficient of a table that has all timesteps, ordered by increasing t."""
    return table.coefficients[::-1, COEFFICIENTS.index(name)]


def test_000_and_004_reverse_step_with_epsilon_is_the_posterior_mean_with_the_estimate_of_x_0():
    """(x - beta_t / sqrt(1 - abar_t) epsilon) / sqrt(alpha_t) + sigma_t z: DDPM, Eq. 11 and Algorithm 2."""
    for schedule in (DDPM, SHORT):
        table = sampler_table(schedule, "ddpm", schedule.num_train_timesteps)
        a, b, c, d, s = (column(table, name) for name in "abcds")
        x_factor = 1.0 / np.sqrt(schedule.alphas)
        np.testing.assert_allclose(c * a + d, x_factor, rtol=1e-9)
        epsilon_factor = -x_factor * schedule.betas / np.sqrt(1.0 - schedule.alphas_cumprod)
        np.testing.assert_allclose(c * b, epsilon_factor, rtol=1e-9)
        np.testing.assert_allclose(s, np.sqrt(schedule.posterior_variance), rtol=1e-9, atol=1e-15)


def run_forward_chain(schedule, num_steps, start, count=50_000):
    """x after `num_steps` steps of the forward process from `start`, float64 [count, 1]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((count, 1), start, dtype=torch.float64)
    for t in range(num_steps):
        noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        x = q_step(schedule, x, torch.full((count,), t), noise)
    return x


def test_001_prints_the_distribution_of_one_step_instead_of_all_steps():
    """It prints N(sqrt(1 - beta_t) x_0, beta_t I) as q(x_t | x_0), which the chain does not have."""
    x, t, count = run_forward_chain(SHORT, 12, start=1.5), 11, 50_000
    a, beta = SHORT.alphas_cumprod[t], SHORT.betas[t]
    mean, variance = x.mean().item(), x.var().item()
    standard_error = ((1.0 - a) / count) ** 0.5
    assert abs(mean - a**0.5 * 1.5) < 4.5 * standard_error
    assert abs(variance / (1.0 - a) - 1.0) < 4.5 * (2.0 / count) ** 0.5
    assert abs(mean - (1.0 - beta) ** 0.5 * 1.5) > 100.0 * standard_error
    assert variance > 2.0 * beta
    # q_sample has the distribution of the chain.
    zero, one = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    assert q_sample(SHORT, one, torch.tensor([t]), zero).item() == pytest.approx(a**0.5, rel=1e-12)
    assert q_sample(SHORT, zero, torch.tensor([t]), one).item() == pytest.approx((1.0 - a) ** 0.5, rel=1e-12)


def test_002_drops_the_index_of_beta_that_keeps_the_variance_at_1():
    """With one beta for all t, N(sqrt(1 - beta) x_{t-1}, beta_t I) does not keep a variance of 1."""
    for beta in (DDPM.betas[0], DDPM.betas.mean(), DDPM.betas[-1]):
        variance = 1.0
        for beta_t in DDPM.betas:
            variance = (1.0 - beta) * variance + beta_t
        assert abs(variance - 1.0) > 0.04
    variance, one = 1.0, torch.ones(1, 1, dtype=torch.float64)
    for t in torch.arange(1000):
        x_factor = q_step(DDPM, one, t.reshape(1), 0.0 * one).item()
        noise_factor = q_step(DDPM, 0.0 * one, t.reshape(1), one).item()
        variance = x_factor**2 * variance + noise_factor**2
    assert variance == pytest.approx(1.0, rel=1e-12)


def test_002_gives_the_network_x_0_and_epsilon_instead_of_x_t():
    """With epsilon among its inputs a network could return it; it receives only x_t and t."""
    generator = torch.Generator().manual_seed(2)
    x_0, noise = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64)
    timesteps = torch.arange(12)
    calls = []

    def network(*inputs):
        calls.append(inputs)
        return 0.0 * inputs[0]

    DenoisingLoss(SHORT)(network, x_0, timesteps, noise)
    ((x_t, t),) = calls
    torch.testing.assert_close(x_t, q_sample(SHORT, x_0, timesteps, noise))
    assert torch.equal(t, timesteps)


class LinearPerTimestep(nn.Module):
    """output = weight[t] x_t."""

    def __init__(self, num_train_timesteps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_train_timesteps, 1, dtype=torch.float64))

    def forward(self, x, t):
        return self.weight[t] * x


def sampled_variance(weights, num_steps=12):
    """Variance of DDIM's samples if epsilon_theta = weights[t] x_t, starting from N(0, 1), in closed form."""
    table, factor = sampler_table(SHORT, "ddim", num_steps), 1.0
    for row, t in zip(table.coefficients, table.timesteps, strict=True):
        a, b, c, d, _, _, _, _, _ = row
        factor *= c * (a + b * weights[t]) + d
    return factor**2


def fit_weights(loss):
    """The weights of `LinearPerTimestep` that minimise a loss for data of variance 2.25."""
    generator = torch.Generator().manual_seed(1)
    x_0, noise = torch.randn(2, 12 * 4000, 1, generator=generator, dtype=torch.float64)
    x_0, timesteps = 1.5 * x_0, torch.arange(12).repeat(4000)
    network = LinearPerTimestep(12)
    optimizer = torch.optim.SGD(network.parameters(), lr=2.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss(network, x_0, timesteps, noise).backward()
        optimizer.step()
    return network.weight.detach().flatten().numpy()


def test_003_prints_a_loss_whose_minimum_is_not_the_noise():
    """|x_0 - epsilon - epsilon_theta|^2 is minimal for E[x_0 - epsilon | x_t], which samples other data."""
    a, data_variance = SHORT.alphas_cumprod, 2.25
    variance = a * data_variance + 1.0 - a

    def printed_loss(network, x_0, timesteps, noise):
        output = network(q_sample(SHORT, x_0, timesteps, noise), timesteps)
        return (x_0 - noise - output).square().mean()

    wrong = fit_weights(printed_loss)
    np.testing.assert_allclose(wrong, (np.sqrt(a) * data_variance - np.sqrt(1.0 - a)) / variance, atol=0.1)
    right = fit_weights(lambda *batch: DenoisingLoss(SHORT)(*batch).loss)
    np.testing.assert_allclose(right, np.sqrt(1.0 - a) / variance, atol=0.1)
    # Twelve steps of DDIM have some discretisation error, but much less than the wrong loss.
    assert sampled_variance(right) == pytest.approx(data_variance, rel=0.2)
    assert sampled_variance(wrong) > 2.0 * data_variance


def test_003_prints_products_of_beta_instead_of_alpha():
    """After a few steps the product of the betas is negligible: 1 - beta-bar is 1, as if x_t were noise."""
    beta_bar = np.cumprod(DDPM.betas)
    assert (1.0 - beta_bar[4:] == 1.0).all()
    assert 1.0 - DDPM.alphas_cumprod[4] < 1e-3, "x_t has next to no noise at this timestep"
    # The factor of epsilon in the update becomes beta_t / sqrt(alpha_t), which is not that of Eq. 11.
    table = sampler_table(DDPM, "ddpm", 1000)
    epsilon_factor = -column(table, "c") * column(table, "b")
    printed = DDPM.betas / np.sqrt(1.0 - beta_bar) / np.sqrt(DDPM.alphas)
    assert epsilon_factor[4] > 20.0 * printed[4]


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_003_prints_an_unbounded_sigma_instead_of_eta_times_the_root_of_beta_tilde(eta):
    """eta sqrt(beta_t (1 - beta-bar) / beta-bar) against DDIM, arXiv:2010.02502, Eq. 16."""
    table = sampler_table(DDPM, "ddim", 1000, eta=eta)
    np.testing.assert_allclose(column(table, "s")[1:], eta * np.sqrt(DDPM.posterior_variance)[1:], rtol=1e-9)
    beta_bar = np.cumprod(DDPM.betas)[:50]  # after 50 steps it approaches the smallest float64 numbers
    printed = eta * np.sqrt(DDPM.betas[:50] * (1.0 - beta_bar) / beta_bar)
    assert printed[1] > 10.0, "standard deviations of the data, in the last step but one"
    assert printed[-1] > 1e50
    # The last step would add noise of eta times the data's standard deviation to the finished sample.
    assert printed[0] > 0.99 * eta
    assert column(table, "s")[0] == 0.0
    # Replacing only beta-bar by the product of the alphas does not give the posterior's value either.
    a = DDPM.alphas_cumprod
    assert (eta * np.sqrt(DDPM.betas * (1.0 - a) / a))[-1] > 10.0 * column(table, "s")[-1]


def test_003_scales_the_noise_by_eta_but_not_the_mean():
    """For N(0, 1) data and the exact denoiser, DDPM's mean without noise (eta = 0) shrinks all samples to
    almost 0; DDIM's mean, which depends on eta, keeps their variance."""
    variances = {}
    for sampler in ("ddpm", "ddim"):
        table, factor = sampler_table(DDPM, sampler, 1000), 1.0
        for row, alphas_cumprod in zip(table.coefficients, table.alphas_cumprod[:-1], strict=True):
            a, b, c, d, _, _, _, _, _ = row
            factor *= c * (a + b * np.sqrt(1.0 - alphas_cumprod)) + d
        variances[sampler] = factor**2
    assert variances["ddpm"] < 1e-4
    assert variances["ddim"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("num_train_timesteps", [10, 100, 1000, 10_000])
def test_003_with_its_small_constant_leaves_almost_no_noise_for_any_T(num_train_timesteps):
    """It prints beta_t = 1 - (1 - beta_min)^(1/T) with a small beta_min. The product of the alphas is then
    1 - beta_min for every T, so x_T is x_0 with a little noise."""
    beta_min = 1e-4
    printed = np.full(num_train_timesteps, 1.0 - (1.0 - beta_min) ** (1.0 / num_train_timesteps))
    np.testing.assert_allclose(constant_betas(num_train_timesteps, beta_min), printed, rtol=1e-7)
    assert NoiseSchedule(printed).alphas_cumprod[-1] == pytest.approx(1.0 - beta_min, rel=1e-9)
    # The standard deviation of the noise in x_T: a hundredth of the data's.
    assert np.sqrt(1.0 - NoiseSchedule(printed).alphas_cumprod[-1]) == pytest.approx(0.01, rel=1e-6)


def test_003_forward_process_tends_to_a_gaussian_not_a_uniform_distribution():
    """From two points at +-1 the excess kurtosis of x_T (uniform: -1.2, Gaussian: 0) tends to 0."""
    a = NoiseSchedule(constant_betas(1000)).alphas_cumprod[-1]
    # Cumulants add: the fourth of x_0 is -2, that of the noise 0; the variance stays 1.
    assert abs(-2.0 * a**2) < 1e-7
    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 1.0], size=200_000)
    for beta in constant_betas(20):
        x = np.sqrt(1.0 - beta) * x + np.sqrt(beta) * rng.standard_normal(x.size)
    standard_error = np.sqrt(24.0 / x.size)
    assert abs(np.mean(x**4) / np.mean(x**2) ** 2 - 3.0) < 4.0 * standard_error


def count_peaks(density):
    """Number of local maxima of a density on a grid."""
    return int(((density[1:-1] > density[:-2]) & (density[1:-1] > density[2:])).sum())


def test_004_leaves_x_0_out_of_bayes_rule():
    """It calls the result q(x_{t-1} | x_t) and Gaussian. For data at -1 and 1 that distribution has two
    peaks; q(x_{t-1} | x_t, x_0), whose mean and variance the document gives, has one."""
    schedule = NoiseSchedule([0.01, 0.6])
    grid = torch.linspace(-3.0, 3.0, 6001, dtype=torch.float64)
    normal = torch.distributions.Normal
    alphas_cumprod_prev, x_t = schedule.alphas_cumprod[0], 0.1
    likelihood = normal(schedule.alphas[1] ** 0.5 * grid, schedule.betas[1] ** 0.5).log_prob(
        torch.tensor(x_t)
    )
    densities = {
        x_0: (
            likelihood
            + normal(alphas_cumprod_prev**0.5 * x_0, (1.0 - alphas_cumprod_prev) ** 0.5).log_prob(grid)
        ).exp()
        for x_0 in (-1.0, 1.0)
    }
    assert count_peaks(densities[-1.0] + densities[1.0]) == 2
    for x_0, density in densities.items():
        assert count_peaks(density) == 1
        mean, variance = q_posterior(
            schedule,
            torch.tensor([[x_0]], dtype=torch.float64),
            torch.tensor([[x_t]], dtype=torch.float64),
            torch.tensor([1]),
        )
        gaussian = normal(mean.squeeze(), variance.squeeze().sqrt()).log_prob(grid).exp()
        torch.testing.assert_close(density / density.sum(), gaussian / gaussian.sum(), rtol=1e-6, atol=1e-12)


def test_004_calls_the_variance_sigma():
    """Its sigma_{t-1|t} = (1 - abar_{t-1}) / (1 - abar_t) (1 - alpha_t) is beta-tilde. The factor of z is the
    square root of it, as the document itself has in the update below."""
    a, a_prev = DDPM.alphas_cumprod, DDPM.alphas_cumprod_prev
    printed = (1.0 - a_prev) / (1.0 - a) * (1.0 - DDPM.alphas)
    np.testing.assert_allclose(printed, DDPM.posterior_variance, rtol=1e-9)
    standard_deviation = column(sampler_table(DDPM, "ddpm", 1000), "s")
    np.testing.assert_allclose(standard_deviation**2, printed, rtol=1e-9, atol=1e-15)
    assert (standard_deviation[1:] > 5.0 * printed[1:]).all()


def test_004_multiplies_alpha_over_the_wrong_index():
    """abar_t = prod_T alpha_t, read literally, is alpha_t to the power of T, or one number for all t."""
    np.testing.assert_allclose(
        DDPM.alphas_cumprod, [np.prod(DDPM.alphas[: t + 1]) for t in range(1000)], rtol=1e-9
    )
    assert (np.diff(DDPM.alphas_cumprod) < 0.0).all()
    to_the_power_of_T = DDPM.alphas**1000
    assert to_the_power_of_T[0] < 0.91 < 0.9998 < DDPM.alphas_cumprod[0]
    # x_1 would not be that of the chain: it would have the noise of a thousand steps.
    variance = run_forward_chain(DDPM, 1, start=0.0).var().item()
    assert variance == pytest.approx(DDPM.betas[0], rel=0.05)
    assert 1.0 - to_the_power_of_T[0] > 900.0 * variance


def test_004_recovers_x_0_with_the_noise_of_the_last_step_instead_of_all_steps():
    """It calls the noise in x_0 = (x_t - sqrt(1 - abar_t) epsilon_t) / sqrt(abar_t) that of step t."""
    generator = torch.Generator().manual_seed(4)
    x_0, *step_noise = torch.randn(9, 50, 1, generator=generator, dtype=torch.float64)
    x_t = x_0
    for t, noise in enumerate(step_noise):
        x_t = q_step(SHORT, x_t, torch.full((50,), t), noise)
    a, timesteps = SHORT.alphas_cumprod, torch.full((50,), 7)
    total_noise = sum(
        (SHORT.betas[t] * a[7] / a[t] / (1.0 - a[7])) ** 0.5 * noise for t, noise in enumerate(step_noise)
    )
    torch.testing.assert_close(to_x_0(SHORT, "epsilon", total_noise, x_t, timesteps), x_0)
    from_step_noise = to_x_0(SHORT, "epsilon", step_noise[-1], x_t, timesteps)
    assert (from_step_noise - x_0).std() > 0.5


def test_the_page_of_the_source_documents_names_existing_code_and_tests():
    """docs/source-documents.md names every formula's function, and for each error a test in this folder."""
    folder = Path(__file__).parent
    page = (folder.parents[1] / "docs" / "source-documents.md").read_text()
    names = re.findall(r"`((?:process|networks|training|evaluation)\.[\w.]+)`", page)
    assert len(names) > 15
    for module, name in (name.rsplit(".", 1) for name in names):
        assert hasattr(importlib.import_module(f"diffusion.{module}"), name), name
    sources = "".join(path.read_text() for path in folder.rglob("test_*.py"))
    tests = re.findall(r"`(test_\w+)`", page)
    assert len(tests) >= 14
    assert [name for name in tests if f"def {name}(" not in sources] == []
    own_tests = re.findall(r"^def (test_00[1-4]_\w+)\(", Path(__file__).read_text(), re.MULTILINE)
    assert set(own_tests) <= set(tests)
