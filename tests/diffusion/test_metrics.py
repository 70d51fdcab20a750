import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusion import metrics
from diffusion.metrics import (
    energy_distance,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_and_recall,
    sliced_wasserstein_distance,
)


def minus_distance(p, q):
    return -np.sqrt(((p - q) ** 2).sum(-1))


def cubic(p, q):
    return ((p * q).sum(-1) / p.shape[-1] + 1.0) ** 3


BY_PAIRS = [(energy_distance, minus_distance), (kernel_distance, cubic)]


def double_loop(kernel, x, y):
    between = np.mean([[kernel(p, q) for q in y] for p in x])
    within = [
        np.mean([kernel(p, q) for i, p in enumerate(z) for j, q in enumerate(z) if i != j]) for z in (x, y)
    ]
    return sum(within) - 2.0 * between


def normals(count, dim, generator, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(count, dim, generator=generator)


@pytest.mark.parametrize(("distance", "kernel"), BY_PAIRS)
@pytest.mark.parametrize(("n", "m", "dim"), [(2, 2, 1), (13, 20, 2), (25, 7, 64)])
def test_distances_by_pairs_are_the_double_loop(rng, distance, kernel, n, m, dim):
    x, y = rng.standard_normal((n, dim)), rng.standard_normal((m, dim)) + 0.3
    found = distance(torch.tensor(x), torch.tensor(y)).value
    assert found == pytest.approx(double_loop(kernel, x, y), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize(("distance", "kernel"), BY_PAIRS)
def test_distances_by_pairs_of_more_rows_than_one_block_are_those_of_numpy(rng, distance, kernel):
    x, y = rng.standard_normal((1500, 2)), rng.standard_normal((1100, 2))

    def within(z):
        count = len(z)
        return (kernel(z[:, None], z[None]).sum() - kernel(z, z).sum()) / (count * (count - 1))

    expected = within(x) + within(y) - 2.0 * kernel(x[:, None], y[None]).mean()
    assert distance(torch.tensor(x), torch.tensor(y)).value == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("distance", [energy_distance, kernel_distance, precision_and_recall])
def test_the_size_of_a_block_does_not_matter(monkeypatch, distance):
    generator = torch.Generator().manual_seed(0)
    x, y = normals(60, 3, generator).double(), normals(43, 3, generator, shift=0.5).double()
    whole = distance(x, y)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    parts = distance(x, y)
    if distance is precision_and_recall:
        assert parts == whole
    else:
        assert parts.value == pytest.approx(whole.value, rel=1e-11)
        assert parts.standard_error == pytest.approx(whole.standard_error, rel=1e-9)


@pytest.mark.parametrize(("distance", "bias"), [(energy_distance, 0.37), (kernel_distance, 2.8)])
def test_distances_by_pairs_are_unbiased_where_both_sets_have_one_law(distance, bias):
    """Their mean over repeats is 0 within error; a V-statistic of such small sets has the bias given:
    (E k(X, X) - E k(X, X')) (1/12 + 1/8)."""
    generator = torch.Generator().manual_seed(0)
    values = [distance(normals(12, 2, generator), normals(8, 2, generator)).value for _ in range(1500)]
    spread = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4.0 * spread
    assert spread < bias / 20.0
    assert min(values) < 0.0


def error_over_spread(distance, dim, shift, scale):
    """Root mean square of the standard errors, over the deviation of the figure in 400 repeats."""
    generator = torch.Generator().manual_seed(0)
    found = [
        distance(normals(100, dim, generator), normals(80, dim, generator, shift, scale)) for _ in range(400)
    ]
    errors, values = ([getattr(each, name) for each in found] for name in ("standard_error", "value"))
    return np.sqrt(np.mean(np.square(errors))) / np.std(values)


DISTANCES = [energy_distance, kernel_distance, frechet_distance]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("dim", "shift", "scale"), [(2, 0.5, 1.0), (8, 0.5, 1.0), (8, 0.0, 1.5)])
def test_standard_errors_are_the_spread_over_repeats_where_the_laws_differ(distance, dim, shift, scale):
    """Within a fifth, of which the repeats' own chance is a third."""
    assert error_over_spread(distance, dim, shift, scale) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dim", [1, 2, 8])
def test_standard_errors_cover_the_spread_over_repeats_where_the_laws_are_equal(distance, dim):
    """There only the second order is left, of which a jackknife finds the double variance, as does in the
    worst case a first order that is cut off below 0: between 1 and sqrt(2), give or take the repeats'
    own chance of a twentieth."""
    assert 0.9 < error_over_spread(distance, dim, shift=0.0, scale=1.0) < 1.1 * np.sqrt(2.0)


@pytest.mark.parametrize("distance", [energy_distance, kernel_distance])
def test_in_many_dimensions_little_of_the_first_order_is_cut_off(distance):
    """Between 1 and 1.1, give or take the same."""
    assert 0.9 < error_over_spread(distance, dim=64, shift=0.0, scale=1.0) < 1.2


def test_kernel_distance_of_one_feature_is_its_closed_form():
    """3 (difference of means)^2 + 3 (of second moments)^2 + (of third moments)^2: of N(0, 1) and N(1, 1)
    those are 1, 1 and 4."""
    generator = torch.Generator().manual_seed(0)
    found = kernel_distance(normals(3000, 1, generator), normals(3000, 1, generator, shift=1.0))
    assert found.standard_error < 2.0
    assert found.value == pytest.approx(3.0 + 3.0 + 16.0, abs=4.0 * found.standard_error)


def test_energy_distance_of_two_constants_is_twice_their_distance():
    x, y = torch.zeros(5, 2), torch.tensor([[3.0, 4.0]]).repeat(4, 1)
    assert energy_distance(x, y).value == pytest.approx(10.0, abs=1e-12)


def test_energy_distance_of_shifted_normals_is_its_closed_form():
    """In one dimension E|N(mu, 2)| = 2 exp(-mu^2/4)/sqrt(pi) + mu erf(mu/2)."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3000, 1, generator=generator), 1.0 + torch.randn(3000, 1, generator=generator)
    mu = torch.tensor(1.0)

    def mean_absolute(m):
        return (2.0 * torch.exp(-(m**2) / 4.0) / torch.pi**0.5 + m * torch.erf(m / 2.0)).item()

    expected = 2.0 * mean_absolute(mu) - 2.0 * mean_absolute(0.0 * mu)
    found = energy_distance(x, y)
    assert found.standard_error < 0.03
    assert found.value == pytest.approx(expected, abs=4.0 * found.standard_error)


def test_energy_distance_of_far_away_points_keeps_its_digits():
    """Distances through matrix products would lose them beside coordinates of a million."""
    x = torch.tensor([[0.0], [1e-3], [3e-3]]).double() + 1e6
    y = torch.tensor([[2e-3], [5e-3]]).double() + 1e6
    expected = double_loop(minus_distance, x.numpy(), y.numpy())
    assert energy_distance(x, y).value == pytest.approx(expected, abs=1e-8)


def test_frechet_distance_is_that_of_scipys_matrix_root(rng):
    mixing = rng.standard_normal((6, 6))
    x, y = rng.standard_normal((80, 6)) @ mixing, 0.5 + 2.0 * rng.standard_normal((50, 6))
    covariance_x, covariance_y = np.cov(x.T), np.cov(y.T)
    root = np.real(sqrtm(covariance_x @ covariance_y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariance_x + covariance_y - 2.0 * root)
    assert frechet_distance(torch.tensor(x), torch.tensor(y)).value == pytest.approx(expected, rel=1e-8)


def with_moments(rng, count, mean, covariance):
    """Points whose sample mean and sample covariance are exactly the given ones."""
    x = rng.standard_normal((count, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x.T)))).T
    return torch.tensor(x @ np.linalg.cholesky(covariance).T + mean)


def test_frechet_distance_of_commuting_gaussians_is_its_closed_form(rng):
    """|mu|^2 + sum (sigma_x - sigma_y)^2 where the covariances share their axes."""
    angle = 0.4
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    x = with_moments(rng, 60, np.array([1.0, -2.0]), axes @ np.diag([4.0, 0.25]) @ axes.T)
    y = with_moments(rng, 40, np.array([0.0, 1.0]), axes @ np.diag([1.0, 9.0]) @ axes.T)
    assert frechet_distance(x, y).value == pytest.approx(1.0 + 9.0 + 1.0 + 6.25, rel=1e-9)


def test_frechet_distance_of_one_feature_is_its_closed_form(rng):
    x, y = (
        with_moments(rng, 30, np.array([mean]), np.array([[variance]]))
        for mean, variance in ((1, 4.0), (3, 9.0))
    )
    assert frechet_distance(x, y).value == pytest.approx(4.0 + 1.0, rel=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_are_symmetric_and_take_images_as_flat_vectors(distance):
    x, y = torch.randn(2, 30, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    found = distance(x, y)
    for other in (distance(y, x), distance(x.flatten(1), y.flatten(1))):
        assert found.value == pytest.approx(other.value, rel=1e-6)
        assert found.standard_error == pytest.approx(other.standard_error, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_0_even_with_fewer_examples_than_features():
    x = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x).value == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("n", "m", "known"), [(4, 4, True), (3, 20, False), (20, 3, False), (2, 2, False)])
def test_frechet_distance_has_a_standard_error_from_4_examples_on(n, m, known):
    generator = torch.Generator().manual_seed(0)
    found = frechet_distance(normals(n, 2, generator), normals(m, 2, generator))
    assert np.isfinite(found.value)
    assert np.isfinite(found.standard_error) == known


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_sliced_wasserstein_distance_of_shifted_normals_is_its_closed_form(dim):
    """|shift| / sqrt(dim): the mean square of the shift's projections, which over 200 lines have a
    relative variance of 2 (dim - 1) / (dim + 2)."""
    generator = torch.Generator().manual_seed(0)
    shift = normals(1, dim, generator)
    shift *= 3.0 / shift.norm()
    x, y = normals(2000, dim, generator), normals(1500, dim, generator, shift)
    tolerance = 2.0 * np.sqrt(2.0 * (dim - 1) / (dim + 2) / 200) + 0.03
    assert sliced_wasserstein_distance(x, y) == pytest.approx(3.0 / np.sqrt(dim), rel=tolerance)


def test_sliced_wasserstein_distance_is_told_its_lines_by_the_seed():
    generator = torch.Generator().manual_seed(0)
    x, y = normals(50, 3, generator), normals(40, 3, generator, shift=1.0)
    one, again, other = (sliced_wasserstein_distance(x, y, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert one == pytest.approx(other, rel=0.2)


@pytest.fixture
def halves():
    """Two clouds of 200 points, far from each other."""
    generator = torch.Generator().manual_seed(0)
    return normals(200, 2, generator), normals(200, 2, generator, shift=100.0)


def test_samples_of_half_the_data_are_precise_and_recall_half(halves):
    data = torch.cat(halves)
    assert precision_and_recall(halves[0], data) == (1.0, 0.5)
    fresh = normals(200, 2, torch.Generator().manual_seed(1))
    precision, recall = precision_and_recall(fresh, data)
    assert 0.9 < precision <= 1.0 and 0.45 < recall <= 0.5


def test_samples_half_of_which_are_nothing_like_the_data_recall_all_of_them(halves):
    samples = torch.cat(halves)
    assert precision_and_recall(samples, halves[0]) == (0.5, 1.0)
    fresh = normals(200, 2, torch.Generator().manual_seed(1))
    precision, recall = precision_and_recall(samples, fresh)
    assert 0.45 < precision <= 0.5 and 0.9 < recall <= 1.0


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_the_shares_within_balls_found_one_by_one(rng, neighbours):
    x, y = rng.standard_normal((40, 2)), 0.7 + 1.3 * rng.standard_normal((60, 2))

    def share(inner, outer):
        reach = [np.sort(-minus_distance(q, outer))[neighbours] for q in outer]
        inside = [any(-minus_distance(p, q) <= r for q, r in zip(outer, reach, strict=True)) for p in inner]
        return np.mean(inside)

    found = precision_and_recall(torch.tensor(x), torch.tensor(y), neighbours)
    assert found == (share(x, y), share(y, x))


def test_precision_and_recall_look_at_the_first_of_many(monkeypatch, halves):
    monkeypatch.setattr(metrics, "_MOST_FOR_NEIGHBOURS", 200)
    assert precision_and_recall(torch.cat(halves), torch.cat(halves[::-1])) == (0.0, 0.0)
    assert precision_and_recall(torch.cat(halves), halves[0]) == (1.0, 1.0)


@pytest.mark.parametrize(("n", "m", "count"), [(7, 5, 5), (1100, 30, 1), (1100, 1030, 4)])
def test_the_nearest_are_those_of_all_distances_sorted(rng, n, m, count):
    x, y = rng.standard_normal((n, 1, 1, 3)), rng.standard_normal((m, 1, 1, 3))
    every = -minus_distance(x.reshape(n, 1, 3), y.reshape(1, m, 3))
    found = nearest(torch.tensor(x), torch.tensor(y), count)
    np.testing.assert_allclose(found, np.sort(every, axis=1)[:, :count], atol=1e-7)
