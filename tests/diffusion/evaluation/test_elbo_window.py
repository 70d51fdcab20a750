import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from diffusion.data.dataset import detail_log_snr, log_snr_window
from diffusion.evaluation.elbo_window import elbo_window, integration_weights
from diffusion.process.schedules import NoiseSchedule, cosine_betas, linear_betas

LONG = linear_betas(1000, 1e-4, 0.02)  # log-SNR from 9.2 down to -10.1, beyond both ends of the window


def normal(count, dim, scale=1.0, seed=123):
    # Not seed 0, which is the seed of the bound's own noise.
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def sigmoid(log_snr):
    return 1.0 / (1.0 + math.exp(-log_snr))


def exact_error(log_snr, variance, second_moment):
    """E|epsilon - epsilon_hat|^2 / d of the denoiser of N(0, variance) on data of a given second moment.

    epsilon_hat = k (sqrt(a) x_0 + s epsilon) with k = s / (a variance + s^2) and s^2 = 1 - a.
    """
    a = sigmoid(log_snr)
    sigma = math.sqrt(1.0 - a)
    k = sigma / (a * variance + 1.0 - a)
    return k**2 * a * second_moment + (k * sigma - 1.0) ** 2


def exact_value(low, high, variance, second_moment):
    return 0.5 * quad(exact_error, low, high, args=(variance, second_moment), epsabs=1e-10, limit=200)[0]


def kl_to_prior(a, second_moment):
    """KL(N(sqrt(a) x_0, (1 - a) I) || N(0, I)) / d, averaged over x_0."""
    return (second_moment * a - a - math.log1p(-a)) / 2.0


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, t):
        return torch.full_like(x, self.value)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_value_of_the_exact_denoiser_is_the_integral_of_its_error_curve(gaussian_denoiser, scale):
    schedule = NoiseSchedule(LONG)
    x_0 = normal(2048, 8, scale)
    bound = elbo_window(gaussian_denoiser(schedule, scale**2), schedule, x_0, (-8.0, 5.0))
    expected = exact_value(-8.0, 5.0, scale**2, x_0.double().square().mean().item())
    assert bound.above == 0.0
    assert bound.below == 0.0
    # Interpolation between 64 points adds less than 2e-3; the rest is the randomness of the noise.
    assert abs(bound.value - expected) < 2e-3 + 4.5 * bound.standard_error
    assert bound.standard_error < 0.01


def test_measured_errors_match_the_exact_curve(gaussian_denoiser):
    schedule = NoiseSchedule(LONG)
    x_0 = normal(4096, 8, 2.0)
    bound = elbo_window(gaussian_denoiser(schedule, 4.0), schedule, x_0, (-8.0, 5.0))
    moment = x_0.double().square().mean().item()
    expected = np.array([exact_error(value, 4.0, moment) for value in bound.log_snr])
    assert np.abs(bound.errors / expected - 1.0).max() < 6.0 * math.sqrt(2.0 / x_0.numel())


def test_a_denoiser_of_the_wrong_variance_is_worse_by_the_theoretical_amount(gaussian_denoiser):
    schedule = NoiseSchedule(LONG)
    x_0 = normal(2048, 8, 2.0)
    moment = x_0.double().square().mean().item()
    right, wrong = (
        elbo_window(gaussian_denoiser(schedule, v), schedule, x_0, (-8.0, 5.0)) for v in (4.0, 1.0)
    )
    excess = exact_value(-8.0, 5.0, 1.0, moment) - exact_value(-8.0, 5.0, 4.0, moment)
    paired = wrong.per_example - right.per_example
    assert excess > 0.2
    assert abs(paired.mean() - excess) < 2e-3 + 4.5 * paired.std() / math.sqrt(len(paired))


@pytest.mark.parametrize("betas", [linear_betas(50, 1e-3, 0.05), linear_betas(5, 0.1, 0.4), [0.3]])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_part_below_for_a_window_from_minus_infinity_is_the_kl_of_the_last_step_to_the_prior(
    gaussian_denoiser, betas, scale
):
    schedule = NoiseSchedule(betas)
    x_0 = normal(500, 4, scale)
    bound = elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-60.0, 5.0))
    expected = kl_to_prior(float(schedule.alphas_cumprod[-1]), x_0.double().square().mean().item())
    assert bound.below == pytest.approx(expected, abs=1e-6)


def test_kl_to_the_prior_matches_torch_distributions():
    a, x_0 = 0.3, normal(200, 3, 2.0).double()
    normals = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normals(a**0.5 * x_0, (1.0 - a) ** 0.5), normals(0.0, 1.0)).mean()
    assert kl_to_prior(a, x_0.square().mean().item()) == pytest.approx(kl.item(), abs=1e-6)


def test_the_part_below_starts_at_the_windows_lower_end(gaussian_denoiser):
    """It is the integral of the error a^2 + a (1 - a) m of N(0, I)'s denoiser up to the last timestep."""
    schedule = NoiseSchedule(linear_betas(50, 1e-3, 0.05))
    x_0 = normal(500, 4, 2.0)
    bound = elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-3.0, 5.0))
    moment = x_0.double().square().mean().item()
    last = float(schedule.log_snr[-1])
    assert last > -3.0
    by_quadrature = (
        0.5
        * quad(
            lambda log_snr: sigmoid(log_snr) ** 2 + sigmoid(log_snr) * (1 - sigmoid(log_snr)) * moment,
            -3.0,
            last,
        )[0]
    )
    assert bound.below == pytest.approx(by_quadrature, abs=1e-8)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_schedule_that_starts_late_is_worth_as_much_as_one_that_spans_the_window(gaussian_denoiser, scale):
    """For normal data what the first timestep leaves undone is exact: its x_0 is the mean of a normal law."""
    schedule = NoiseSchedule(linear_betas(1000, 0.05, 0.06))
    assert schedule.log_snr[0] < 3.0
    x_0 = normal(2048, 8, scale)
    bound = elbo_window(gaussian_denoiser(schedule, scale**2), schedule, x_0, (-8.0, 7.0), max_points=1000)
    expected = exact_value(-8.0, 7.0, scale**2, x_0.double().square().mean().item())
    assert bound.above > 0.5
    assert abs(bound.value - expected) < 2e-3 + 4.5 * bound.standard_error


def test_the_part_above_the_first_timestep_is_the_integral_of_its_error_curve(gaussian_denoiser):
    """Of any x0_hat with squared error r: (r / v^2 + p) / (1 / v + p)^2 exp(log_snr), for each example."""
    schedule = NoiseSchedule(linear_betas(30, 0.1, 0.5))
    first = float(schedule.log_snr[0])
    x_0 = normal(64, 2)
    bound = elbo_window(Constant(0.2), schedule, x_0, (first, 5.0), prediction_type="sample")
    r = (x_0.double() - 0.2).square().mean(dim=1).numpy()
    v = r.mean()

    def error(log_snr, squared):
        p = math.exp(log_snr) - math.exp(first)
        return math.exp(log_snr) * (squared / v**2 + p) / (1.0 / v + p) ** 2

    assert error(first, v) == pytest.approx(bound.errors[-1], rel=1e-6)
    expected = [0.5 * quad(error, first, 5.0, args=(each,))[0] for each in r]
    np.testing.assert_allclose(bound.per_example, expected, rtol=1e-5)
    assert bound.above == pytest.approx(bound.value, rel=1e-9)


def test_denoising_nothing_costs_one_half_per_unit_of_log_snr(gaussian_denoiser):
    """epsilon = 0 predicts x_0 with the variance of the noise itself, to which no law around it can add."""
    schedule = NoiseSchedule(linear_betas(30, 0.1, 0.5))
    bound = elbo_window(Constant(0.0), schedule, normal(4096, 4), (-8.0, 5.0))
    assert bound.above == pytest.approx(0.5 * (5.0 - math.log(9.0)), abs=0.03)


def test_a_schedule_entirely_less_noisy_than_the_window_is_evaluated_by_the_prior_alone(gaussian_denoiser):
    schedule = NoiseSchedule([1e-4, 1e-4])
    x_0 = normal(64, 2)
    bound = elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-8.0, 5.0))
    expected = (
        0.5 * quad(lambda value: exact_error(value, 1.0, x_0.double().square().mean().item()), -8.0, 5.0)[0]
    )
    assert bound.above == 0.0
    assert bound.value == pytest.approx(expected, abs=1e-7)
    assert bound.value == pytest.approx(bound.below, abs=1e-12)


def test_a_schedule_entirely_noisier_than_the_window_is_evaluated_by_the_law_around_its_x_0(
    gaussian_denoiser,
):
    schedule = NoiseSchedule([0.9999, 0.9999])
    x_0 = normal(4096, 2)
    bound = elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-8.0, 5.0))
    assert bound.below == 0.0
    assert bound.value == pytest.approx(bound.above, abs=1e-12)
    expected = exact_value(-8.0, 5.0, 1.0, x_0.double().square().mean().item())
    assert bound.value == pytest.approx(expected, abs=4.5 * bound.standard_error)


@pytest.mark.parametrize("beta", [0.5, 1e-6, 0.99999])
def test_the_value_of_a_schedule_of_one_timestep_is_the_sum_of_both_ends(gaussian_denoiser, beta):
    schedule = NoiseSchedule([beta])
    bound = elbo_window(gaussian_denoiser(schedule), schedule, normal(64, 2), (-8.0, 5.0))
    assert bound.value == pytest.approx(bound.above + bound.below, abs=1e-12)


@pytest.mark.parametrize(
    "betas",
    [LONG, linear_betas(20, 0.02, 0.5), cosine_betas(100), [0.5], [0.2, 0.6]],
    ids=lambda b: f"T={len(b)}",
)
def test_parts_and_examples_add_up_to_the_value(gaussian_denoiser, betas):
    """value = above + below + half the integral of the piecewise linear errors inside the window."""
    schedule = NoiseSchedule(betas)
    low, high = -8.0, 5.0
    bound = elbo_window(gaussian_denoiser(schedule), schedule, normal(256, 2), (low, high))
    assert bound.per_example.shape == (256,)
    assert bound.value == pytest.approx(bound.per_example.mean(), abs=1e-12)
    assert np.all(np.diff(bound.log_snr) > 0.0)
    fine = np.unique(np.concatenate([bound.log_snr, [low, high]]))
    fine = fine[(fine >= max(low, bound.log_snr[0])) & (fine <= min(high, bound.log_snr[-1]))]
    inside = 0.5 * np.trapezoid(np.interp(fine, bound.log_snr, bound.errors), fine) if len(fine) > 1 else 0.0
    assert bound.value == pytest.approx(bound.above + bound.below + inside, abs=1e-9)


def test_the_network_is_measured_at_up_to_max_points_of_the_schedules_timesteps_and_one_beyond_each_end(
    gaussian_denoiser,
):
    for betas, max_points in ((LONG, 64), (LONG, 10), (linear_betas(12, 0.05, 0.6), 64)):
        schedule = NoiseSchedule(betas)
        bound = elbo_window(
            gaussian_denoiser(schedule), schedule, normal(8, 2), (-8.0, 5.0), max_points=max_points
        )
        assert set(bound.log_snr) <= set(schedule.log_snr)
        assert len(bound.log_snr) <= min(max_points + 2, len(betas))
        inside = (bound.log_snr >= -8.0) & (bound.log_snr <= 5.0)
        assert inside.sum() <= max_points
        assert (bound.log_snr < -8.0).sum() <= 1
        assert (bound.log_snr > 5.0).sum() <= 1


def test_a_short_schedule_is_measured_at_every_timestep_in_the_window(gaussian_denoiser):
    schedule = NoiseSchedule(linear_betas(12, 0.05, 0.6))
    bound = elbo_window(gaussian_denoiser(schedule), schedule, normal(8, 2), (-8.0, 5.0))
    np.testing.assert_array_equal(bound.log_snr, schedule.log_snr[::-1])


@pytest.mark.parametrize(("low", "high"), [(-2.0, 3.0), (-1.5, 0.25), (0.1, 0.2), (-2.0, -2.0)])
def test_integration_weights_integrate_linear_functions_exactly(low, high):
    nodes = np.array([-2.0, -1.4, 0.0, 0.3, 2.2, 3.0])
    weights = integration_weights(nodes, low, high)
    assert weights @ np.ones(6) == pytest.approx(high - low, abs=1e-12)
    assert weights @ (3.0 * nodes - 1.0) == pytest.approx(1.5 * (high**2 - low**2) - (high - low), abs=1e-12)


def test_integration_weights_integrate_every_interpolant_of_the_nodes(rng):
    nodes = np.sort(rng.uniform(-3.0, 3.0, 9))
    values = rng.standard_normal(9)
    low, high = nodes[0] + 0.1, nodes[-1] - 0.1
    exact = quad(np.interp, low, high, args=(nodes, values), points=nodes[1:-1], limit=100)[0]
    assert integration_weights(nodes, low, high) @ values == pytest.approx(exact, abs=1e-9)


def test_the_result_does_not_depend_on_the_global_random_state(gaussian_denoiser):
    schedule = NoiseSchedule(linear_betas(40, 1e-3, 0.3))
    x_0 = normal(64, 2)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-8.0, 5.0), seed=7))
        assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(results[0].per_example, results[1].per_example)
    other = elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-8.0, 5.0), seed=8)
    assert np.abs(other.per_example - results[0].per_example).max() > 1e-3


def test_schedules_share_their_noise_and_a_coarse_one_is_measured_as_often(gaussian_denoiser):
    """The bounds of a schedule and of every fortieth timestep of it: most of their noise cancels."""
    fine = NoiseSchedule(LONG)
    kept = fine.alphas_cumprod[::40]
    coarse = NoiseSchedule(1.0 - kept / np.concatenate([[1.0], kept[:-1]]))
    bounds, calls = [], []
    for schedule in (fine, coarse):
        network, timesteps = gaussian_denoiser(schedule), []
        network.register_forward_pre_hook(lambda _, inputs, found=timesteps: found.append(int(inputs[1][0])))
        bounds.append(elbo_window(network, schedule, normal(256, 2), (-8.0, 5.0)).per_example)
        calls.append(timesteps)
    one, other = bounds
    assert (one - other).std(ddof=1) < 0.4 * np.hypot(one.std(ddof=1), other.std(ddof=1))
    assert 0.8 * len(calls[0]) < len(calls[1]) <= len(calls[0])
    assert len(set(calls[1])) < len(calls[1]) / 3


def test_all_prediction_types_of_the_same_denoiser_have_the_same_bound(gaussian_denoiser):
    schedule = NoiseSchedule(linear_betas(40, 1e-3, 0.3))
    x_0 = normal(256, 2, 2.0).double()
    values = [
        elbo_window(
            gaussian_denoiser(schedule, 4.0, prediction_type=prediction_type),
            schedule,
            x_0,
            (-8.0, 5.0),
            prediction_type=prediction_type,
        ).per_example
        for prediction_type in ("epsilon", "sample", "v_prediction")
    ]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-8)
    np.testing.assert_allclose(values[2], values[0], rtol=1e-8)


def test_x0_is_clipped(gaussian_denoiser):
    """A prediction far outside the interval is evaluated as if it were the end of the interval."""
    schedule = NoiseSchedule(linear_betas(40, 1e-3, 0.3))
    x_0 = normal(64, 2)
    bound = elbo_window(
        Constant(100.0), schedule, x_0, (-8.0, 5.0), prediction_type="sample", clip=(-1.0, 1.5)
    )
    expected = np.exp(bound.log_snr) * (x_0.double().clip(-1.0, 1.5) - 1.5).square().mean().item()
    np.testing.assert_allclose(bound.errors, expected, rtol=1e-6)


def test_an_example_far_outside_the_clip_interval_costs_what_one_at_its_end_does(gaussian_denoiser):
    """One row of heavy tails must not decide between models: it would cost the square of its distance."""
    schedule = NoiseSchedule(LONG)
    inside = normal(64, 2)
    inside[0] = 6.0
    outside = inside.clone()
    outside[0] = 1e4
    clipped, far, unclipped = (
        elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-8.0, 7.0), clip=clip)
        for x_0, clip in ((inside, (-6.0, 6.0)), (outside, (-6.0, 6.0)), (outside, None))
    )
    np.testing.assert_array_equal(far.per_example, clipped.per_example)
    assert far.per_example[0] < 100.0 < 1e6 < unclipped.per_example[0]


def test_zero_terminal_snr_gives_a_finite_value(gaussian_denoiser):
    """A last timestep at log-SNR -inf is below every window and must not affect the integral."""
    schedule = NoiseSchedule([*linear_betas(20, 1e-3, 0.2), 1.0])
    assert schedule.log_snr[-2] > -8.0
    network = gaussian_denoiser(schedule, prediction_type="sample")
    with np.errstate(all="ignore"):
        bound = elbo_window(network, schedule, normal(64, 2), (-8.0, 5.0), prediction_type="sample")
    assert np.isfinite(bound.per_example).all()


def test_standard_error_is_that_of_the_mean_over_examples(gaussian_denoiser):
    schedule = NoiseSchedule(linear_betas(40, 1e-3, 0.3))
    bound = elbo_window(gaussian_denoiser(schedule), schedule, normal(400, 2), (-8.0, 5.0))
    assert bound.standard_error == pytest.approx(np.std(bound.per_example, ddof=1) / 20.0, rel=1e-12)


def test_the_window_reaches_from_below_the_strongest_direction_to_the_rounding_of_the_data():
    corners = torch.tensor([[20.0, 0.0], [-20.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # eigenvalues 200 and 0.5
    pairs = torch.cat([corners, corners + 1e-3])
    low, high = log_snr_window(pairs, value_step=1.0)
    assert low == pytest.approx(math.log(0.05 / 200.0), abs=1e-3)
    assert high == pytest.approx(math.log(12.0), abs=1e-9)
    assert log_snr_window(normal(100, 2), value_step=1e-6)[0] == -8.0


@pytest.mark.parametrize("dim", [1, 2, 100])
@pytest.mark.parametrize("distance", [0.05, 1.0, 7.0])
def test_the_best_kernel_for_two_points_has_the_variance_of_their_distance(dim, distance):
    """The likelihood of a normal law of variance s^2 at distance r in d dimensions is highest at r^2 / d."""
    pair = torch.zeros(2, dim)
    pair[1, 0] = distance
    assert detail_log_snr(pair) == pytest.approx(math.log(dim / distance**2), abs=0.126)


def ring(count, thickness):
    generator = torch.Generator().manual_seed(0)
    angle = 2.0 * math.pi * torch.rand(count, generator=generator)
    radius = 1.0 + thickness * torch.randn(count, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def test_finer_data_and_more_of_them_move_the_upper_end_up():
    ends = [detail_log_snr(ring(2000, thickness)) for thickness in (0.3, 0.1, 0.03, 0.01)]
    assert ends == sorted(ends) and ends[-1] - ends[0] > 3.0
    assert detail_log_snr(ring(500, 0.1)) < detail_log_snr(ring(8000, 0.1))
    # Noise of the ring's own thickness, at 2 ln(1 / thickness), is resolved.
    assert ends[-2] > 2.0 * math.log(1.0 / 0.03)


def test_the_upper_end_follows_the_scale_of_the_data():
    assert detail_log_snr(ring(1000, 0.1) * math.exp(2.0)) == detail_log_snr(ring(1000, 0.1)) - 4.0


def test_outliers_and_repeated_examples_do_not_move_the_upper_end():
    data = ring(400, 0.1)
    expected = detail_log_snr(data)
    outliers = torch.tensor([[1e3, 0.0], [0.0, -1e4], [1e5, 1e5]])
    assert detail_log_snr(torch.cat([data, outliers])) == pytest.approx(expected, abs=0.5)
    assert detail_log_snr(torch.cat([data, data])) == pytest.approx(expected, abs=0.25)


def test_examples_that_are_all_equal_determine_no_detail():
    assert detail_log_snr(torch.ones(5, 2)) == math.inf
    assert detail_log_snr(torch.ones(1, 2)) == math.inf
    assert log_snr_window(torch.ones(5, 2), value_step=0.1)[1] == pytest.approx(-math.log(0.1**2 / 12.0))


def test_the_window_of_large_images_starts_where_that_of_small_ones_does():
    """Above 1,024 values the largest singular value is not that of a full decomposition."""
    few = normal(60, 12, 30.0)
    many = torch.nn.functional.pad(few, (0, 1200))
    assert log_snr_window(many, 0.1)[0] == pytest.approx(log_snr_window(few, 0.1)[0], rel=1e-4)
    assert log_snr_window(few, 0.1)[0] < -8.0, "it depends on the singular value"


def test_images_are_flattened_for_the_window():
    images = normal(50, 12, 30.0).reshape(50, 3, 2, 2)
    assert log_snr_window(images, 0.1) == log_snr_window(images.flatten(1), 0.1)
