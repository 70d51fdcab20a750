import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from diffusion.likelihood import _integration_weights, elbo_window, log_snr_window
from diffusion.schedules import NoiseSchedule, cosine_betas, linear_betas

LONG = linear_betas(1000, 1e-4, 0.02)  # log-SNR from 9.2 down to -10.1: beyond both ends of the window


def normal(count, dim, scale=1.0, seed=123):
    # Not seed 0, from which the bound's own noise starts.
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def sigmoid(log_snr):
    return 1.0 / (1.0 + math.exp(-log_snr))


def exact_error(log_snr, variance, second_moment):
    """E|epsilon - epsilon_hat|^2 / d of N(0, variance)'s denoiser on data of a given second moment.

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
    found = elbo_window(gaussian_denoiser(schedule, scale**2), schedule, x_0, (-8.0, 5.0))
    expected = exact_value(-8.0, 5.0, scale**2, x_0.double().square().mean().item())
    assert found.above == 0.0
    assert found.below == 0.0
    # Interpolating 64 points costs below 2e-3; the rest is the noise's own spread.
    assert abs(found.value - expected) < 2e-3 + 4.5 * found.standard_error
    assert found.standard_error < 0.01


def test_measured_errors_lie_on_the_exact_curve(gaussian_denoiser):
    schedule = NoiseSchedule(LONG)
    x_0 = normal(4096, 8, 2.0)
    found = elbo_window(gaussian_denoiser(schedule, 4.0), schedule, x_0, (-8.0, 5.0))
    moment = x_0.double().square().mean().item()
    expected = np.array([exact_error(value, 4.0, moment) for value in found.log_snr])
    assert np.abs(found.errors / expected - 1.0).max() < 6.0 * math.sqrt(2.0 / x_0.numel())


def test_a_denoiser_of_the_wrong_variance_is_judged_worse_by_as_much_as_theory_says(gaussian_denoiser):
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
def test_from_minus_infinity_the_part_below_is_the_kl_of_the_last_step_to_the_prior(
    gaussian_denoiser, betas, scale
):
    schedule = NoiseSchedule(betas)
    x_0 = normal(500, 4, scale)
    found = elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-60.0, 5.0))
    expected = kl_to_prior(float(schedule.alphas_cumprod[-1]), x_0.double().square().mean().item())
    assert found.below == pytest.approx(expected, abs=1e-6)


def test_kl_to_the_prior_is_that_of_torch_distributions():
    a, x_0 = 0.3, normal(200, 3, 2.0).double()
    normals = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normals(a**0.5 * x_0, (1.0 - a) ** 0.5), normals(0.0, 1.0)).mean()
    assert kl_to_prior(a, x_0.square().mean().item()) == pytest.approx(kl.item(), abs=1e-6)


def test_the_part_below_starts_at_the_windows_lower_end(gaussian_denoiser):
    """It is the integral of N(0, I)'s error a^2 + a (1 - a) m from there to the last timestep."""
    schedule = NoiseSchedule(linear_betas(50, 1e-3, 0.05))
    x_0 = normal(500, 4, 2.0)
    found = elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-3.0, 5.0))
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
    assert found.below == pytest.approx(by_quadrature, abs=1e-8)


def test_above_the_first_timestep_every_nat_counts_one_half(gaussian_denoiser):
    schedule = NoiseSchedule(linear_betas(30, 0.1, 0.5))
    x_0 = normal(64, 2)
    found = elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-8.0, 5.0))
    assert schedule.log_snr[0] == pytest.approx(math.log(9.0), abs=1e-9)
    assert found.above == pytest.approx(0.5 * (5.0 - math.log(9.0)), abs=1e-9)


def test_a_schedule_entirely_less_noisy_than_the_window_is_judged_by_the_prior_alone(gaussian_denoiser):
    schedule = NoiseSchedule([1e-4, 1e-4])
    x_0 = normal(64, 2)
    found = elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-8.0, 5.0))
    expected = (
        0.5 * quad(lambda value: exact_error(value, 1.0, x_0.double().square().mean().item()), -8.0, 5.0)[0]
    )
    assert found.above == 0.0
    assert found.value == pytest.approx(expected, abs=1e-7)
    assert found.value == pytest.approx(found.below, abs=1e-12)


def test_a_schedule_entirely_noisier_than_the_window_counts_as_no_denoising_at_all(gaussian_denoiser):
    schedule = NoiseSchedule([0.9999, 0.9999])
    found = elbo_window(gaussian_denoiser(schedule), schedule, normal(64, 2), (-8.0, 5.0))
    assert found.below == 0.0
    assert found.value == pytest.approx(0.5 * 13.0, abs=1e-12)


@pytest.mark.parametrize("beta", [0.5, 1e-6, 0.99999])
def test_a_schedule_of_one_timestep_has_no_more_than_both_ends(gaussian_denoiser, beta):
    schedule = NoiseSchedule([beta])
    found = elbo_window(gaussian_denoiser(schedule), schedule, normal(64, 2), (-8.0, 5.0))
    assert found.value == pytest.approx(found.above + found.below, abs=1e-12)


@pytest.mark.parametrize(
    "betas",
    [LONG, linear_betas(20, 0.02, 0.5), cosine_betas(100), [0.5], [0.2, 0.6]],
    ids=lambda b: f"T={len(b)}",
)
def test_parts_and_examples_add_up_to_the_value(gaussian_denoiser, betas):
    """value = above + below + half the integral of the piecewise linear errors inside the window."""
    schedule = NoiseSchedule(betas)
    low, high = -8.0, 5.0
    found = elbo_window(gaussian_denoiser(schedule), schedule, normal(256, 2), (low, high))
    assert found.per_example.shape == (256,)
    assert found.value == pytest.approx(found.per_example.mean(), abs=1e-12)
    assert np.all(np.diff(found.log_snr) > 0.0)
    fine = np.unique(np.concatenate([found.log_snr, [low, high]]))
    fine = fine[(fine >= max(low, found.log_snr[0])) & (fine <= min(high, found.log_snr[-1]))]
    inside = 0.5 * np.trapezoid(np.interp(fine, found.log_snr, found.errors), fine) if len(fine) > 1 else 0.0
    assert found.value == pytest.approx(found.above + found.below + inside, abs=1e-9)


def test_the_network_is_measured_at_the_schedules_own_timesteps_at_most_max_points_and_both_neighbours(
    gaussian_denoiser,
):
    for betas, max_points in ((LONG, 64), (LONG, 10), (linear_betas(12, 0.05, 0.6), 64)):
        schedule = NoiseSchedule(betas)
        found = elbo_window(
            gaussian_denoiser(schedule), schedule, normal(8, 2), (-8.0, 5.0), max_points=max_points
        )
        assert set(found.log_snr) <= set(schedule.log_snr)
        assert len(found.log_snr) <= min(max_points + 2, len(betas))
        inside = (found.log_snr >= -8.0) & (found.log_snr <= 5.0)
        assert inside.sum() <= max_points
        assert (found.log_snr < -8.0).sum() <= 1
        assert (found.log_snr > 5.0).sum() <= 1


def test_a_short_schedule_is_measured_at_every_timestep_in_the_window(gaussian_denoiser):
    schedule = NoiseSchedule(linear_betas(12, 0.05, 0.6))
    found = elbo_window(gaussian_denoiser(schedule), schedule, normal(8, 2), (-8.0, 5.0))
    np.testing.assert_array_equal(found.log_snr, schedule.log_snr[::-1])


@pytest.mark.parametrize(("low", "high"), [(-2.0, 3.0), (-1.5, 0.25), (0.1, 0.2), (-2.0, -2.0)])
def test_integration_weights_integrate_linear_functions_exactly(low, high):
    nodes = np.array([-2.0, -1.4, 0.0, 0.3, 2.2, 3.0])
    weights = _integration_weights(nodes, low, high)
    assert weights @ np.ones(6) == pytest.approx(high - low, abs=1e-12)
    assert weights @ (3.0 * nodes - 1.0) == pytest.approx(1.5 * (high**2 - low**2) - (high - low), abs=1e-12)


def test_integration_weights_integrate_every_interpolant_of_the_nodes(rng):
    nodes = np.sort(rng.uniform(-3.0, 3.0, 9))
    values = rng.standard_normal(9)
    low, high = nodes[0] + 0.1, nodes[-1] - 0.1
    exact = quad(np.interp, low, high, args=(nodes, values), points=nodes[1:-1], limit=100)[0]
    assert _integration_weights(nodes, low, high) @ values == pytest.approx(exact, abs=1e-9)


def test_result_does_not_depend_on_the_state_of_the_process(gaussian_denoiser):
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


def test_noise_depends_on_the_place_in_the_window_and_not_on_the_schedule(gaussian_denoiser):
    """Every second timestep of a schedule is a schedule: where both are measured, they see the same noise."""
    fine = NoiseSchedule(linear_betas(24, 0.02, 0.5))
    kept = fine.alphas_cumprod[1::2]
    coarse = NoiseSchedule(1.0 - kept / np.concatenate([[1.0], kept[:-1]]))
    x_0 = normal(16, 2)
    errors = {}
    for schedule in (fine, coarse):
        found = elbo_window(gaussian_denoiser(schedule), schedule, x_0, (-8.0, 5.0))
        for log_snr, error in zip(found.log_snr, found.errors, strict=True):
            errors.setdefault(round(log_snr, 6), []).append(error)
    pairs = [pair for pair in errors.values() if len(pair) == 2]
    assert len(pairs) == 12
    for one, other in pairs:
        assert one == pytest.approx(other, rel=1e-4)


def test_prediction_types_of_the_same_denoiser_are_judged_alike(gaussian_denoiser):
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


def test_x0_is_clipped_before_it_is_judged(gaussian_denoiser):
    """A network whose x_0 lies far outside is measured as if it had answered the interval's end."""
    schedule = NoiseSchedule(linear_betas(40, 1e-3, 0.3))
    x_0 = normal(64, 2)
    found = elbo_window(
        Constant(100.0), schedule, x_0, (-8.0, 5.0), prediction_type="sample", clip=(-1.0, 1.5)
    )
    expected = np.exp(found.log_snr) * (x_0.double() - 1.5).square().mean().item()
    np.testing.assert_allclose(found.errors, expected, rtol=1e-6)


def test_zero_terminal_snr_gives_a_finite_value(gaussian_denoiser):
    """A last timestep at log-SNR -inf lies below every window: it may not spoil the integral."""
    schedule = NoiseSchedule([*linear_betas(20, 1e-3, 0.2), 1.0])
    assert schedule.log_snr[-2] > -8.0
    network = gaussian_denoiser(schedule, prediction_type="sample")
    with np.errstate(all="ignore"):
        found = elbo_window(network, schedule, normal(64, 2), (-8.0, 5.0), prediction_type="sample")
    assert np.isfinite(found.per_example).all()


def test_standard_error_is_the_deviation_of_the_mean(gaussian_denoiser):
    schedule = NoiseSchedule(linear_betas(40, 1e-3, 0.3))
    found = elbo_window(gaussian_denoiser(schedule), schedule, normal(400, 2), (-8.0, 5.0))
    assert found.standard_error == pytest.approx(np.std(found.per_example, ddof=1) / 20.0, rel=1e-12)


def test_window_ends_at_the_rounding_of_the_data_and_starts_below_the_strongest_direction():
    corners = torch.tensor([[20.0, 0.0], [-20.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # eigenvalues 200 and 0.5
    low, high = log_snr_window(corners, value_step=1.0)
    assert low == pytest.approx(math.log(0.05 / 200.0), abs=1e-9)
    assert high == pytest.approx(math.log(12.0), abs=1e-9)


def test_window_is_at_least_from_minus_8_and_at_most_to_3():
    assert log_snr_window(normal(100, 2), value_step=1e-6) == (-8.0, 3.0)


def test_window_takes_images_as_flat_vectors():
    images = normal(50, 12, 30.0).reshape(50, 3, 2, 2)
    assert log_snr_window(images, 0.1) == log_snr_window(images.flatten(1), 0.1)
