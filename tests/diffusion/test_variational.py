"""The bound against entropies that are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from diffusion import likelihood
from diffusion.reverse import ErrorCurve, bound_terms
from diffusion.schedules import NoiseSchedule, cosine_betas, linear_betas, zero_terminal_snr
from diffusion.variational import DiscretisedGaussian, gaussian_decoder, kl_to_prior, variational_bound

LONG = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))
SHORT = NoiseSchedule(linear_betas(12, 0.02, 0.6))
ENTROPY = 0.5 * math.log(2.0 * math.pi * math.e)  # of N(0, 1)


def normal(count, dim, scale=1.0, seed=123):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, dim, generator=generator, dtype=torch.float64)


def test_it_is_found_beside_the_windowed_bound():
    assert likelihood.variational_bound is variational_bound


@pytest.mark.parametrize(
    "betas",
    [LONG.betas[::50], SHORT.betas, [0.5], [0.1, 0.9], cosine_betas(20)],
    ids=lambda betas: f"T={len(betas)}",
)
def test_for_standard_normal_data_the_bound_is_their_entropy_however_few_the_steps(gaussian_denoiser, betas):
    """With the variance beta every p(x_{t-1} | x_t) is q(x_{t-1} | x_t) itself (DDPM, Section 3.2), the
    decoder's beta_0 is the variance of x_0 given x_1, and x_T ~ N(0, I): nothing is lost."""
    schedule = NoiseSchedule(betas)
    x_0 = normal(4000, 4)
    found = variational_bound(gaussian_denoiser(schedule), schedule, x_0, variance="beta")
    per_example = -Normal(0.0, 1.0).log_prob(x_0).mean(dim=1).numpy()
    paired = found.per_example - per_example
    assert abs(paired.mean()) < 4.5 * paired.std() / len(paired) ** 0.5
    assert found.value == pytest.approx(ENTROPY, abs=4.5 * found.standard_error)
    assert found.standard_error < 0.02


GAUSSIAN = {"weights": [1.0], "means": [[0.4, -0.2]], "covariance": [[1.3, 0.5], [0.5, 0.5]]}


def even_in_log_snr(total):
    alphas_cumprod = 1.0 / (1.0 + np.exp(-np.linspace(10.0, -10.0, total)))
    return NoiseSchedule(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


def gap_to(law, bound, x_0):
    """What the bound lies above the mean of -ln p / d on the same examples, and its standard error."""
    paired = bound.per_example + law.log_prob(x_0).numpy() / x_0.shape[1]
    return paired.mean(), paired.std() / len(paired) ** 0.5


def correlated_gaussian(mixture, schedule, count):
    denoiser, x_0 = mixture(schedule, **GAUSSIAN, count=count)
    means, covariance = (torch.tensor(GAUSSIAN[name]).double() for name in ("means", "covariance"))
    return denoiser, x_0, MultivariateNormal(means[0], covariance)


@pytest.mark.parametrize("variance", ["beta", "optimal"])
def test_for_correlated_gaussian_data_the_bound_meets_their_entropy(mixture, variance):
    """200 steps of variance beta lose 0.004 nats, of the optimal one 0.003."""
    schedule, curve = even_in_log_snr(200), None
    denoiser, x_0, law = correlated_gaussian(mixture, schedule, 6000)
    if variance == "optimal":
        window = likelihood.elbo_window(denoiser, schedule, x_0[:1000], (-10.0, 10.0))
        curve = ErrorCurve(window.log_snr, window.errors)
    bound = variational_bound(denoiser, schedule, x_0, variance=variance, error_curve=curve)
    gap, spread = gap_to(law, bound, x_0)
    assert -4.5 * spread < gap < 0.005 + 4.5 * spread
    assert spread < 0.01
    entropy = float(law.entropy()) / 2.0
    assert bound.value == pytest.approx(entropy, abs=0.005 + 4.5 * bound.standard_error)


def test_with_beta_tilde_twice_the_steps_halve_what_is_lost(mixture):
    gaps = []
    for total in (50, 100, 200):
        schedule = even_in_log_snr(total)
        denoiser, x_0, law = correlated_gaussian(mixture, schedule, 4000)
        gaps.append(gap_to(law, variational_bound(denoiser, schedule, x_0), x_0))
    for (gap, spread), (half, half_spread) in itertools.pairwise(gaps):
        assert spread < 0.02
        assert gap / half == pytest.approx(2.0, abs=0.15 + 4.5 * math.hypot(spread, 2.0 * half_spread) / half)
    assert gaps[-1][0] > 10.0 * gaps[-1][1]


def test_the_optimal_variance_is_the_best_of_the_three_where_steps_are_few(gaussian_denoiser):
    v = 0.3
    x_0 = normal(20_000, 4, v**0.5)
    law = MultivariateNormal(torch.zeros(4).double(), v * torch.eye(4).double())
    nodes = SHORT.log_snr[::-1]
    a = 1.0 / (1.0 + np.exp(-nodes))
    curve = ErrorCurve(nodes, a * v / (a * v + 1.0 - a))
    network = gaussian_denoiser(SHORT, v)
    gaps = {
        variance: gap_to(
            law,
            variational_bound(
                network,
                SHORT,
                x_0,
                variance=variance,
                error_curve=curve if variance == "optimal" else None,
            ),
            x_0,
        )
        for variance in ("beta_tilde", "beta", "optimal")
    }
    best, spread = gaps["optimal"]
    assert best > -4.5 * spread, "no variance makes less than the likelihood of it"
    for other in ("beta", "beta_tilde"):
        assert best < gaps[other][0] - 4.5 * math.hypot(spread, gaps[other][1])


def test_it_is_a_bound_on_the_likelihood_of_a_mixture(mixture):
    weights, means, covariance = (
        [0.5, 0.3, 0.2],
        [[1.2, 0.0], [-1.0, 0.8], [-0.6, -1.4]],
        [[0.05, 0.02], [0.02, 0.03]],
    )
    schedule = even_in_log_snr(300)
    denoiser, x_0 = mixture(schedule, weights, means, covariance, count=4000)
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor(weights).double()),
        MultivariateNormal(torch.tensor(means).double(), torch.tensor(covariance).double()),
    )
    gap, spread = gap_to(law, variational_bound(denoiser, schedule, x_0, variance="beta"), x_0)
    assert -4.5 * spread < gap < 0.03 + 4.5 * spread
    assert spread < 0.015


def coin_denoiser(schedule):
    """x_0 = +-1, equally likely: E[x_0 | x_t] = tanh(sqrt(a) x_t / (1 - a))."""

    class Coin(nn.Module):
        def forward(self, x, t):
            a = torch.tensor(schedule.alphas_cumprod)[t].unsqueeze(1)
            return torch.tanh(a.sqrt() * x / (1.0 - a))

    return Coin()


def test_a_fair_coin_takes_one_bit():
    """Levels 0 and 1 with mean 1/2 and deviation 1/2 are -1 and +1."""
    x_0 = (torch.arange(2000) % 2 * 2.0 - 1.0).double().unsqueeze(1)
    found = variational_bound(
        coin_denoiser(LONG),
        LONG,
        x_0,
        decoder=DiscretisedGaussian([0.5], [0.5], (0.0, 1.0)),
        prediction_type="sample",
    )
    spread = found.standard_error / math.log(2.0)
    assert 1.0 - 4.5 * spread < found.bits_per_dim < 1.02 + 4.5 * spread
    assert spread < 0.01
    assert found.reconstruction == pytest.approx(0.0, abs=1e-9)


def test_bits_per_dim_is_the_value_over_ln_2(gaussian_denoiser):
    found = variational_bound(gaussian_denoiser(SHORT), SHORT, normal(10, 2))
    assert found.bits_per_dim == pytest.approx(found.value / math.log(2.0), rel=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_terms_are_those_of_the_definition_and_add_up(gaussian_denoiser, prediction_type):
    """L_T and every L_{t-1} as KLs of torch.distributions, from the closed form of x_0's error: with
    x0 = k x_t the squared error of N(m, v)'s denoiser is Var(x_0 | x_t) = v (1 - a) / (a v + 1 - a)."""
    v = 0.6
    x_0 = normal(20_000, 2, v**0.5)
    network = gaussian_denoiser(SHORT, v, prediction_type=prediction_type)
    found = variational_bound(network, SHORT, x_0, prediction_type=prediction_type)
    total = SHORT.num_train_timesteps
    assert found.terms.shape == (total + 1,)
    assert found.terms.sum() == pytest.approx(found.value, rel=1e-9)
    assert (found.terms[0], found.terms[-1]) == pytest.approx((found.reconstruction, found.prior), rel=1e-12)
    a = SHORT.alphas_cumprod
    error = v * (1.0 - a) / (a * v + 1.0 - a)
    weights = bound_terms(SHORT).weights
    np.testing.assert_allclose(found.terms[1:-1], (weights * error)[1:], rtol=0.05)
    decoder = 0.5 * (math.log(2.0 * math.pi * SHORT.betas[0]) + error[0] / SHORT.betas[0])
    assert found.reconstruction == pytest.approx(decoder, abs=0.05)
    last = torch.tensor(a[-1])
    prior = kl_divergence(Normal(last.sqrt() * x_0, (1.0 - last).sqrt()), Normal(0.0, 1.0)).mean()
    assert found.prior == pytest.approx(float(prior), rel=1e-9)


@pytest.mark.parametrize("second_moment", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("log_snr", [-40.0, -3.0, 0.0, 8.0])
def test_kl_to_the_prior_is_that_of_torch_distributions(second_moment, log_snr):
    a = torch.tensor(1.0 / (1.0 + math.exp(-log_snr)), dtype=torch.float64)
    x_0 = torch.tensor(second_moment, dtype=torch.float64).sqrt()
    expected = kl_divergence(Normal(a.sqrt() * x_0, (1.0 - a).sqrt()), Normal(0.0, 1.0))
    assert kl_to_prior(np.array(second_moment), log_snr) == pytest.approx(float(expected), abs=1e-9)


def test_without_signal_the_prior_costs_nothing():
    assert kl_to_prior(np.array([0.5, 3.0]), -math.inf).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "schedule", [SHORT, NoiseSchedule([0.3]), NoiseSchedule(linear_betas(50, 1e-3, 0.05))]
)
def test_l_t_is_the_windowed_bounds_part_below_the_schedule(gaussian_denoiser, schedule, scale):
    """Sent to -infinity its lower end leaves (m a - a - ln(1 - a)) / 2 with m = E|x_0|^2 / d."""
    x_0 = normal(500, 4, scale)
    network = gaussian_denoiser(schedule)
    window = likelihood.elbo_window(network, schedule, x_0, (-60.0, 5.0))
    bound = variational_bound(network, schedule, x_0)
    assert window.below == pytest.approx(bound.prior, abs=1e-6)
    a, m = schedule.alphas_cumprod[-1], x_0.square().mean().item()
    assert bound.prior == pytest.approx((m * a - a - math.log1p(-a)) / 2.0, abs=1e-12)


def test_between_first_and_last_step_a_fine_chain_costs_what_the_window_counts(gaussian_denoiser):
    """As T grows the sum of L_1 to L_{T-1} becomes the integral over log-SNR (VDM, Eqs. 14 and 15)."""
    schedule = even_in_log_snr(500)
    x_0 = normal(2000, 4, 0.7)
    network = gaussian_denoiser(schedule, 0.49)
    bound = variational_bound(network, schedule, x_0)
    window = likelihood.elbo_window(network, schedule, x_0, (-10.0, 10.0), max_points=200)
    inside, spread = bound.terms[1:-1].sum(), math.hypot(bound.standard_error, window.standard_error)
    # Each step counts (exp(h) - 1) / 2 where the integral counts h / 2: 2% more.
    assert inside == pytest.approx(1.02 * window.value, rel=0.005, abs=4.5 * spread)
    assert spread < 0.02 * inside


@pytest.mark.parametrize("num_terms", [1, 4, 32])
def test_the_estimate_agrees_with_the_exact_sum_within_its_standard_error(gaussian_denoiser, num_terms):
    x_0 = normal(2000, 2, 0.7)
    network = gaussian_denoiser(LONG, 0.49)
    exact = variational_bound(network, LONG, x_0)
    found = variational_bound(network, LONG, x_0, num_terms=num_terms, seed=5)
    assert abs(found.value - exact.value) < 4.5 * math.hypot(found.standard_error, exact.standard_error)
    assert found.terms is None
    assert (found.prior, exact.prior) == (exact.prior, found.prior)
    assert found.standard_error < {1: 0.2, 4: 0.1, 32: 0.05}[num_terms]


def test_the_estimates_standard_error_is_that_of_repeated_estimates(gaussian_denoiser):
    network, x_0 = gaussian_denoiser(LONG, 0.49), normal(100, 2, 0.7)
    found = [variational_bound(network, LONG, x_0, num_terms=4, seed=seed) for seed in range(200)]
    # The examples stay: what they differ by is not among the repetitions' differences.
    differences = np.stack([bound.per_example for bound in found])
    own = differences.std(axis=0, ddof=1).mean() / 10.0
    assert np.std([bound.value for bound in found], ddof=1) == pytest.approx(own, rel=0.2)
    assert all(bound.standard_error >= 0.7 * own for bound in found)


def test_more_terms_than_timesteps_are_all_of_them(gaussian_denoiser):
    x_0 = normal(20, 2)
    exact = variational_bound(gaussian_denoiser(SHORT), SHORT, x_0)
    for num_terms in (11, 500):
        found = variational_bound(gaussian_denoiser(SHORT), SHORT, x_0, num_terms=num_terms)
        np.testing.assert_array_equal(found.per_example, exact.per_example)


def test_the_network_is_called_once_a_term_and_once_for_the_decoder():
    calls = []

    def network(x, t):
        calls.append(t)
        return 0.1 * x

    variational_bound(network, LONG, normal(50, 2), num_terms=8)
    assert len(calls) == 9
    assert not calls[0].any()
    drawn = torch.stack(calls[1:])
    assert drawn.min() >= 1 and drawn.max() <= 999
    assert (drawn.diff(dim=0) >= 0).all(), "each part lies above the one before"
    assert len(drawn.unique()) > 50


def test_x0_is_clipped_before_it_is_judged(gaussian_denoiser):
    x_0 = normal(200, 2).clip(-1.0, 1.0)
    network = gaussian_denoiser(SHORT, 4.0)
    free, clipped = (variational_bound(network, SHORT, x_0, clip=clip).value for clip in (None, (-1.0, 1.0)))
    assert clipped < free


def test_labels_reach_the_network(gaussian_denoiser):
    seen = []
    labels = torch.arange(7)
    variational_bound(lambda x, t, y: seen.append(y) or 0.1 * x, SHORT, normal(7, 2), labels=labels)
    assert len(seen) == 12
    assert all(torch.equal(each, labels) for each in seen)


def test_result_does_not_depend_on_the_state_of_the_process(gaussian_denoiser):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(variational_bound(gaussian_denoiser(LONG), LONG, normal(20, 2), num_terms=3, seed=7))
        assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(results[0].per_example, results[1].per_example)


@pytest.mark.parametrize("num_terms", [None, 5])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_without_signal_at_the_end_it_is_finite(gaussian_denoiser, prediction_type, num_terms):
    schedule = NoiseSchedule(zero_terminal_snr(linear_betas(40, 1e-3, 0.2)))
    network = gaussian_denoiser(schedule, 0.5, prediction_type=prediction_type)
    x_0 = normal(500, 2, 0.5**0.5)
    found = variational_bound(network, schedule, x_0, prediction_type=prediction_type, num_terms=num_terms)
    assert found.prior == 0.0
    assert np.isfinite(found.per_example).all()
    assert found.value > ENTROPY + 0.5 * math.log(0.5) - 4.5 * found.standard_error


def test_too_few_terms_are_refused_by_value(gaussian_denoiser):
    with pytest.raises(ValueError, match="num_terms 0"):
        variational_bound(gaussian_denoiser(SHORT), SHORT, normal(3, 2), num_terms=0)


def test_the_gaussian_decoder_is_a_density():
    x, mean = torch.tensor([0.3, -2.0]).double(), torch.tensor([0.1, 0.4]).double()
    expected = -Normal(mean, 0.2**0.5).log_prob(x)
    torch.testing.assert_close(gaussian_decoder(x, mean, 0.2), expected)


LEVELS = {"digits": (4.9, 6.0, 0, 16), "8 bits": (120.0, 70.0, 0, 255), "two": (0.5, 0.5, 0, 1)}


@given(st.sampled_from(sorted(LEVELS)), st.floats(-8.0, 8.0), st.floats(1e-8, 4.0))
@settings(deadline=None, derandomize=True, database=None, max_examples=200)
def test_the_levels_probabilities_add_up_to_one(name, mean, variance):
    centre, scale, lowest, highest = LEVELS[name]
    decoder = DiscretisedGaussian([centre], [scale], (lowest, highest))
    x_0 = (torch.arange(lowest, highest + 1).double().unsqueeze(1) - centre) / scale
    nats = decoder(x_0, torch.full_like(x_0, mean), variance)
    assert torch.isfinite(nats).all()
    assert (nats >= 0.0).all()
    assert torch.exp(-nats).sum().item() == pytest.approx(1.0, rel=1e-9)


def test_a_levels_probability_is_the_integral_of_the_density_over_it():
    centre, scale, lowest, highest = LEVELS["digits"]
    decoder = DiscretisedGaussian([centre], [scale], (lowest, highest))
    for level, mean, variance in itertools.product((1, 7, 15), (-1.0, 0.2, 1.9), (0.01, 0.3)):
        law = Normal(mean, variance**0.5)
        edges = torch.tensor([level - 0.5, level + 0.5], dtype=torch.float64)
        grid = torch.linspace(*((edges - centre) / scale), 4001, dtype=torch.float64)
        expected = torch.trapezoid(law.log_prob(grid).exp(), grid).log()
        x_0 = torch.tensor([(level - centre) / scale], dtype=torch.float64)
        found = decoder(x_0, torch.tensor([mean], dtype=torch.float64), variance)
        torch.testing.assert_close(found, -expected.reshape(1), rtol=1e-5, atol=1e-9)


def test_far_levels_keep_their_digits():
    """10 deviations off on either side the probability is 1e-23, which 1 - Phi would lose."""
    decoder = DiscretisedGaussian([0.0], [1.0], (-100, 100))
    x_0 = torch.tensor([[10.0], [-10.0]], dtype=torch.float64)
    above, below = decoder(x_0, torch.zeros_like(x_0), 1.0).flatten()
    assert above.item() == pytest.approx(below.item(), rel=1e-12)
    edges = Normal(0.0, 1.0).log_prob(torch.tensor(9.5)).item()
    assert above.item() == pytest.approx(-edges + math.log(9.5), abs=0.05)


def test_rounded_storage_does_not_move_a_level():
    """float32 puts normalised levels beside their exact places; the edges must not follow."""
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
    found = decoder(x_0, x_0, 0.04)
    assert found.shape == (1, 2, 1, 2)
    inner = -math.log(math.erf(0.5 / 0.5 / (0.2 * 2.0**0.5)))  # half a step is 1 deviation of the second
    assert found[0, 1, 0].tolist() == pytest.approx([inner] * 2, rel=1e-9)
    one_sided = -math.log(0.5 + 0.5 * math.erf(0.25 / (0.2 * 2.0**0.5)))
    assert found[0, 0, 0].tolist() == pytest.approx([one_sided] * 2, rel=1e-9)
