"""The bound compared with known entropies."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from diffusion.evaluation.elbo_window import elbo_window
from diffusion.evaluation.variational_bound import (
    DiscretisedGaussian,
    gaussian_decoder,
    kl_to_prior,
    variational_bound,
)
from diffusion.process.posterior import bound_terms
from diffusion.process.schedules import NoiseSchedule, cosine_betas, linear_betas, zero_terminal_snr

LONG = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))
SHORT = NoiseSchedule(linear_betas(12, 0.02, 0.6))
ENTROPY = 0.5 * math.log(2.0 * math.pi * math.e)  # of N(0, 1)


def normal(count, dim, scale=1.0, seed=123):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "betas",
    [LONG.betas[::50], SHORT.betas, [0.5], [0.1, 0.9], cosine_betas(20)],
    ids=lambda betas: f"T={len(betas)}",
)
def test_for_standard_normal_data_the_bound_is_their_entropy_however_few_the_steps(gaussian_denoiser, betas):
    """With variance beta every p(x_{t-1} | x_t) equals q(x_{t-1} | x_t) (DDPM, Section 3.2), the decoder's
    beta_0 is the variance of x_0 given x_1, and x_T ~ N(0, I), so the bound is tight."""
    schedule = NoiseSchedule(betas)
    x_0 = normal(4000, 4)
    bound = variational_bound(gaussian_denoiser(schedule), schedule, x_0, variance="beta")
    per_example = -Normal(0.0, 1.0).log_prob(x_0).mean(dim=1).numpy()
    paired = bound.per_example - per_example
    assert abs(paired.mean()) < 4.5 * paired.std() / len(paired) ** 0.5
    assert bound.value == pytest.approx(ENTROPY, abs=4.5 * bound.standard_error)
    assert bound.standard_error < 0.02


GAUSSIAN = {"weights": [1.0], "means": [[0.4, -0.2]], "covariance": [[1.3, 0.5], [0.5, 0.5]]}


def even_in_log_snr(num_train_timesteps):
    alphas_cumprod = 1.0 / (1.0 + np.exp(-np.linspace(10.0, -10.0, num_train_timesteps)))
    return NoiseSchedule(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


def gap_to(distribution, bound, x_0):
    """Difference of the bound and the mean of -ln p / d on the same examples, and its standard error."""
    paired = bound.per_example + distribution.log_prob(x_0).numpy() / x_0.shape[1]
    return paired.mean(), paired.std() / len(paired) ** 0.5


def correlated_gaussian(mixture, schedule, count):
    denoiser, x_0 = mixture(schedule, **GAUSSIAN, count=count)
    means, covariance = (torch.tensor(GAUSSIAN[name]).double() for name in ("means", "covariance"))
    return denoiser, x_0, MultivariateNormal(means[0], covariance)


def test_for_correlated_gaussian_data_the_bound_is_close_to_their_entropy(mixture):
    """With 200 steps it is above by 0.004 nats with variance beta."""
    schedule = even_in_log_snr(200)
    denoiser, x_0, distribution = correlated_gaussian(mixture, schedule, 6000)
    bound = variational_bound(denoiser, schedule, x_0, variance="beta")
    gap, standard_error = gap_to(distribution, bound, x_0)
    assert -4.5 * standard_error < gap < 0.005 + 4.5 * standard_error
    assert standard_error < 0.01
    entropy = float(distribution.entropy()) / 2.0
    assert bound.value == pytest.approx(entropy, abs=0.005 + 4.5 * bound.standard_error)


def test_with_beta_tilde_twice_the_steps_halve_the_gap_to_the_entropy(mixture):
    gaps = []
    for num_train_timesteps in (50, 100, 200):
        schedule = even_in_log_snr(num_train_timesteps)
        denoiser, x_0, distribution = correlated_gaussian(mixture, schedule, 4000)
        gaps.append(gap_to(distribution, variational_bound(denoiser, schedule, x_0), x_0))
    for (gap, standard_error), (half, half_standard_error) in itertools.pairwise(gaps):
        assert standard_error < 0.02
        assert gap / half == pytest.approx(
            2.0, abs=0.15 + 4.5 * math.hypot(standard_error, 2.0 * half_standard_error) / half
        )
    assert gaps[-1][0] > 10.0 * gaps[-1][1]


def test_it_is_a_bound_on_the_likelihood_of_a_mixture(mixture):
    weights, means, covariance = (
        [0.5, 0.3, 0.2],
        [[1.2, 0.0], [-1.0, 0.8], [-0.6, -1.4]],
        [[0.05, 0.02], [0.02, 0.03]],
    )
    schedule = even_in_log_snr(300)
    denoiser, x_0 = mixture(schedule, weights, means, covariance, count=4000)
    distribution = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor(weights).double()),
        MultivariateNormal(torch.tensor(means).double(), torch.tensor(covariance).double()),
    )
    gap, standard_error = gap_to(
        distribution, variational_bound(denoiser, schedule, x_0, variance="beta"), x_0
    )
    assert -4.5 * standard_error < gap < 0.03 + 4.5 * standard_error
    assert standard_error < 0.015


def coin_denoiser(schedule):
    """The exact denoiser of x_0 = +-1, equally likely: E[x_0 | x_t] = tanh(sqrt(a) x_t / (1 - a))."""

    class Coin(nn.Module):
        def forward(self, x, t):
            a = torch.tensor(schedule.alphas_cumprod)[t].unsqueeze(1)
            return torch.tanh(a.sqrt() * x / (1.0 - a))

    return Coin()


def test_a_fair_coin_takes_one_bit():
    """Levels 0 and 1 with mean 1/2 and standard deviation 1/2 are normalised to -1 and +1."""
    x_0 = (torch.arange(2000) % 2 * 2.0 - 1.0).double().unsqueeze(1)
    bound = variational_bound(
        coin_denoiser(LONG),
        LONG,
        x_0,
        decoder=DiscretisedGaussian([0.5], [0.5], (0.0, 1.0)),
        prediction_type="sample",
    )
    standard_error = bound.standard_error / math.log(2.0)
    assert 1.0 - 4.5 * standard_error < bound.bits_per_dim < 1.02 + 4.5 * standard_error
    assert standard_error < 0.01
    assert bound.reconstruction == pytest.approx(0.0, abs=1e-9)


def test_bits_per_dim_is_the_value_over_ln_2(gaussian_denoiser):
    bound = variational_bound(gaussian_denoiser(SHORT), SHORT, normal(10, 2))
    assert bound.bits_per_dim == pytest.approx(bound.value / math.log(2.0), rel=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_terms_are_those_of_the_definition_and_add_up(gaussian_denoiser, prediction_type):
    """L_T as a KL divergence of torch.distributions, and the other terms from the closed form of x_0's
    error: that of the denoiser of N(0, v) is Var(x_0 | x_t) = v (1 - a) / (a v + 1 - a)."""
    v = 0.6
    x_0 = normal(20_000, 2, v**0.5)
    network = gaussian_denoiser(SHORT, v, prediction_type=prediction_type)
    bound = variational_bound(network, SHORT, x_0, prediction_type=prediction_type)
    assert bound.terms.shape == (SHORT.num_train_timesteps + 1,)
    assert bound.terms.sum() == pytest.approx(bound.value, rel=1e-9)
    assert (bound.terms[0], bound.terms[-1]) == pytest.approx((bound.reconstruction, bound.prior), rel=1e-12)
    a = SHORT.alphas_cumprod
    error = v * (1.0 - a) / (a * v + 1.0 - a)
    weights = bound_terms(SHORT).weights
    np.testing.assert_allclose(bound.terms[1:-1], (weights * error)[1:], rtol=0.05)
    decoder = 0.5 * (math.log(2.0 * math.pi * SHORT.betas[0]) + error[0] / SHORT.betas[0])
    assert bound.reconstruction == pytest.approx(decoder, abs=0.05)
    last = torch.tensor(a[-1])
    prior = kl_divergence(Normal(last.sqrt() * x_0, (1.0 - last).sqrt()), Normal(0.0, 1.0)).mean()
    assert bound.prior == pytest.approx(float(prior), rel=1e-9)


@pytest.mark.parametrize("second_moment", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("log_snr", [-40.0, -3.0, 0.0, 8.0])
def test_kl_to_the_prior_matches_torch_distributions(second_moment, log_snr):
    a = torch.tensor(1.0 / (1.0 + math.exp(-log_snr)), dtype=torch.float64)
    x_0 = torch.tensor(second_moment, dtype=torch.float64).sqrt()
    expected = kl_divergence(Normal(a.sqrt() * x_0, (1.0 - a).sqrt()), Normal(0.0, 1.0))
    assert kl_to_prior(np.array(second_moment), log_snr) == pytest.approx(float(expected), abs=1e-9)


def test_without_signal_the_kl_to_the_prior_is_0():
    assert kl_to_prior(np.array([0.5, 3.0]), -math.inf).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "schedule", [SHORT, NoiseSchedule([0.3]), NoiseSchedule(linear_betas(50, 1e-3, 0.05))]
)
def test_l_t_is_the_part_of_the_windowed_bound_below_the_schedule(gaussian_denoiser, schedule, scale):
    """As the window's lower end tends to -infinity, the part below becomes (m a - a - ln(1 - a)) / 2 with
    m = E|x_0|^2 / d."""
    x_0 = normal(500, 4, scale)
    network = gaussian_denoiser(schedule)
    window = elbo_window(network, schedule, x_0, (-60.0, 5.0))
    bound = variational_bound(network, schedule, x_0)
    assert window.below == pytest.approx(bound.prior, abs=1e-6)
    a, m = schedule.alphas_cumprod[-1], x_0.square().mean().item()
    assert bound.prior == pytest.approx((m * a - a - math.log1p(-a)) / 2.0, abs=1e-12)


def test_between_first_and_last_step_a_fine_chain_has_the_windowed_bound(gaussian_denoiser):
    """As T grows the sum of L_1 to L_{T-1} becomes the integral over log-SNR (VDM, Eqs. 14 and 15)."""
    schedule = even_in_log_snr(500)
    x_0 = normal(2000, 4, 0.7)
    network = gaussian_denoiser(schedule, 0.49)
    bound = variational_bound(network, schedule, x_0)
    window = elbo_window(network, schedule, x_0, (-10.0, 10.0), max_points=200)
    inside, standard_error = bound.terms[1:-1].sum(), math.hypot(bound.standard_error, window.standard_error)
    # A step of h in log-SNR has weight (exp(h) - 1) / 2, in the integral h / 2: a difference of 2%.
    assert inside == pytest.approx(1.02 * window.value, rel=0.005, abs=4.5 * standard_error)
    assert standard_error < 0.02 * inside


@pytest.mark.parametrize("num_terms", [1, 4, 32])
def test_the_estimate_agrees_with_the_exact_sum_within_its_standard_error(gaussian_denoiser, num_terms):
    x_0 = normal(2000, 2, 0.7)
    network = gaussian_denoiser(LONG, 0.49)
    exact = variational_bound(network, LONG, x_0)
    bound = variational_bound(network, LONG, x_0, num_terms=num_terms, seed=5)
    assert abs(bound.value - exact.value) < 4.5 * math.hypot(bound.standard_error, exact.standard_error)
    assert bound.terms is None
    assert (bound.prior, exact.prior) == (exact.prior, bound.prior)
    assert bound.standard_error < {1: 0.2, 4: 0.1, 32: 0.05}[num_terms]


def test_the_standard_error_of_the_estimate_matches_repeated_estimates(gaussian_denoiser):
    network, x_0 = gaussian_denoiser(LONG, 0.49), normal(100, 2, 0.7)
    bounds = [variational_bound(network, LONG, x_0, num_terms=4, seed=seed) for seed in range(200)]
    # The examples are the same each time, so the repeats do not vary by the differences between examples.
    per_example = np.stack([bound.per_example for bound in bounds])
    expected = per_example.std(axis=0, ddof=1).mean() / 10.0
    assert np.std([bound.value for bound in bounds], ddof=1) == pytest.approx(expected, rel=0.2)
    assert all(bound.standard_error >= 0.7 * expected for bound in bounds)


def test_with_as_many_terms_as_timesteps_the_bound_is_exact(gaussian_denoiser):
    x_0 = normal(20, 2)
    exact = variational_bound(gaussian_denoiser(SHORT), SHORT, x_0)
    for num_terms in (11, 500):
        bound = variational_bound(gaussian_denoiser(SHORT), SHORT, x_0, num_terms=num_terms)
        np.testing.assert_array_equal(bound.per_example, exact.per_example)


def test_the_network_is_called_once_per_term_and_once_for_the_decoder():
    calls = []

    def network(x, t):
        calls.append(t)
        return 0.1 * x

    variational_bound(network, LONG, normal(50, 2), num_terms=8)
    assert len(calls) == 9
    assert not calls[0].any()
    drawn = torch.stack(calls[1:])
    assert drawn.min() >= 1 and drawn.max() <= 999
    assert (drawn.diff(dim=0) >= 0).all(), "each stratum is above the one before"
    assert len(drawn.unique()) > 50


def test_x0_is_clipped(gaussian_denoiser):
    x_0 = normal(200, 2).clip(-1.0, 1.0)
    network = gaussian_denoiser(SHORT, 4.0)
    unclipped, clipped = (
        variational_bound(network, SHORT, x_0, clip=clip).value for clip in (None, (-1.0, 1.0))
    )
    assert clipped < unclipped


def test_labels_reach_the_network(gaussian_denoiser):
    seen = []
    labels = torch.arange(7)
    variational_bound(lambda x, t, y: seen.append(y) or 0.1 * x, SHORT, normal(7, 2), inputs=[labels])
    assert len(seen) == 12
    assert all(torch.equal(each, labels) for each in seen)


def test_the_result_does_not_depend_on_the_global_random_state(gaussian_denoiser):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(variational_bound(gaussian_denoiser(LONG), LONG, normal(20, 2), num_terms=3, seed=7))
        assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(results[0].per_example, results[1].per_example)


@pytest.mark.parametrize("num_terms", [None, 5])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_the_bound_is_finite_without_signal_at_the_last_step(gaussian_denoiser, prediction_type, num_terms):
    schedule = NoiseSchedule(zero_terminal_snr(linear_betas(40, 1e-3, 0.2)))
    network = gaussian_denoiser(schedule, 0.5, prediction_type=prediction_type)
    x_0 = normal(500, 2, 0.5**0.5)
    bound = variational_bound(network, schedule, x_0, prediction_type=prediction_type, num_terms=num_terms)
    assert bound.prior == 0.0
    assert np.isfinite(bound.per_example).all()
    assert bound.value > ENTROPY + 0.5 * math.log(0.5) - 4.5 * bound.standard_error


def test_too_few_terms_are_refused_with_their_number(gaussian_denoiser):
    with pytest.raises(ValueError, match="num_terms 0"):
        variational_bound(gaussian_denoiser(SHORT), SHORT, normal(3, 2), num_terms=0)


def test_the_gaussian_decoder_is_a_density():
    x, mean = torch.tensor([0.3, -2.0]).double(), torch.tensor([0.1, 0.4]).double()
    expected = -Normal(mean, 0.2**0.5).log_prob(x)
    torch.testing.assert_close(gaussian_decoder(x, mean, 0.2), expected)


LEVELS = {"digits": (4.9, 6.0, 0, 16), "8 bits": (120.0, 70.0, 0, 255), "two": (0.5, 0.5, 0, 1)}


@given(st.sampled_from(sorted(LEVELS)), st.floats(-8.0, 8.0), st.floats(1e-8, 4.0))
@settings(max_examples=200)
def test_the_probabilities_of_the_levels_add_up_to_one(name, mean, variance):
    centre, scale, lowest, highest = LEVELS[name]
    decoder = DiscretisedGaussian([centre], [scale], (lowest, highest))
    x_0 = (torch.arange(lowest, highest + 1).double().unsqueeze(1) - centre) / scale
    nats = decoder(x_0, torch.full_like(x_0, mean), variance)
    assert torch.isfinite(nats).all()
    assert (nats >= 0.0).all()
    assert torch.exp(-nats).sum().item() == pytest.approx(1.0, rel=1e-9)


def test_the_probability_of_a_level_is_the_integral_of_the_density_over_it():
    centre, scale, lowest, highest = LEVELS["digits"]
    decoder = DiscretisedGaussian([centre], [scale], (lowest, highest))
    for level, mean, variance in itertools.product((1, 7, 15), (-1.0, 0.2, 1.9), (0.01, 0.3)):
        distribution = Normal(mean, variance**0.5)
        edges = torch.tensor([level - 0.5, level + 0.5], dtype=torch.float64)
        grid = torch.linspace(*((edges - centre) / scale), 4001, dtype=torch.float64)
        expected = torch.trapezoid(distribution.log_prob(grid).exp(), grid).log()
        x_0 = torch.tensor([(level - centre) / scale], dtype=torch.float64)
        nats = decoder(x_0, torch.tensor([mean], dtype=torch.float64), variance)
        torch.testing.assert_close(nats, -expected.reshape(1), rtol=1e-5, atol=1e-9)


def test_probabilities_of_far_levels_are_precise():
    """10 standard deviations away on either side the probability is 1e-23, which 1 - Phi would round to 0."""
    decoder = DiscretisedGaussian([0.0], [1.0], (-100, 100))
    x_0 = torch.tensor([[10.0], [-10.0]], dtype=torch.float64)
    above, below = decoder(x_0, torch.zeros_like(x_0), 1.0).flatten()
    assert above.item() == pytest.approx(below.item(), rel=1e-12)
    edges = Normal(0.0, 1.0).log_prob(torch.tensor(9.5)).item()
    assert above.item() == pytest.approx(-edges + math.log(9.5), abs=0.05)


def test_rounded_storage_does_not_move_a_level():
    """float32 rounds normalised levels; the edges between levels must not move with them."""
    centre, scale, lowest, highest = LEVELS["8 bits"]
    decoder = DiscretisedGaussian([centre], [scale], (lowest, highest))
    exact = (torch.arange(256).double().unsqueeze(1) - centre) / scale
    stored = ((torch.arange(256).float().unsqueeze(1) - centre) / scale).double()
    mean = torch.zeros_like(exact)
    torch.testing.assert_close(decoder(stored, mean, 1e-6), decoder(exact, mean, 1e-6), rtol=0.0, atol=0.0)


def test_moments_of_channels_broadcast():
    mean, std = [[[1.0]], [[3.0]]], [[[2.0]], [[0.5]]]
    decoder = DiscretisedGaussian(mean, std, (0, 4))
    levels = torch.tensor([[[[0.0, 4.0]], [[2.0, 3.0]]]]).double()
    x_0 = (levels - torch.tensor(mean)) / torch.tensor(std)
    nats = decoder(x_0, x_0, 0.04)
    assert nats.shape == (1, 2, 1, 2)
    inner = -math.log(math.erf(0.5 / 0.5 / (0.2 * 2.0**0.5)))  # half a step is 1 std of the second channel
    assert nats[0, 1, 0].tolist() == pytest.approx([inner] * 2, rel=1e-9)
    one_sided = -math.log(0.5 + 0.5 * math.erf(0.25 / (0.2 * 2.0**0.5)))
    assert nats[0, 0, 0].tolist() == pytest.approx([one_sided] * 2, rel=1e-9)
