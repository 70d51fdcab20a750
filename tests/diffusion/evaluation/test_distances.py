import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusion.evaluation import distances
from diffusion.evaluation.distances import (
    Estimate,
    MultiscaleKernel,
    energy_distance,
    frechet_distance,
    jackknife_variance,
    kernel_distance,
    kernel_distance_difference,
    kernel_inception_distance,
    sliced_wasserstein_distance,
)


def minus_distance(p, q):
    return -np.sqrt(((p - q) ** 2).sum(-1))


def cubic(p, q):
    return ((p * q).sum(-1) / p.shape[-1] + 1.0) ** 3


PAIRWISE = [(energy_distance, minus_distance), (kernel_inception_distance, cubic)]


def double_loop(kernel, x, y):
    between = np.mean([[kernel(p, q) for q in y] for p in x])
    within = [
        np.mean([kernel(p, q) for i, p in enumerate(z) for j, q in enumerate(z) if i != j]) for z in (x, y)
    ]
    return sum(within) - 2.0 * between


def normals(count, dim, generator, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(count, dim, generator=generator)


@pytest.mark.parametrize(("distance", "kernel"), PAIRWISE)
@pytest.mark.parametrize(("n", "m", "dim"), [(2, 2, 1), (13, 20, 2), (25, 7, 64)])
def test_pairwise_distances_match_a_double_loop(rng, distance, kernel, n, m, dim):
    x, y = rng.standard_normal((n, dim)), rng.standard_normal((m, dim)) + 0.3
    value = distance(torch.tensor(x), torch.tensor(y)).value
    assert value == pytest.approx(double_loop(kernel, x, y), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize(("distance", "kernel"), PAIRWISE)
def test_pairwise_distances_of_several_blocks_match_numpy(rng, distance, kernel):
    x, y = rng.standard_normal((1500, 2)), rng.standard_normal((1100, 2))

    def within(z):
        count = len(z)
        return (kernel(z[:, None], z[None]).sum() - kernel(z, z).sum()) / (count * (count - 1))

    expected = within(x) + within(y) - 2.0 * kernel(x[:, None], y[None]).mean()
    assert distance(torch.tensor(x), torch.tensor(y)).value == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("distance", [energy_distance, kernel_inception_distance, kernel_distance])
def test_the_block_size_does_not_matter(monkeypatch, distance):
    generator = torch.Generator().manual_seed(0)
    x, y = normals(60, 3, generator).double(), normals(43, 3, generator, shift=0.5).double()
    whole = distance(x, y)
    monkeypatch.setattr(distances, "BLOCK_ROWS", 7)
    in_blocks = distance(x, y)
    precision = 1e-5 if distance is kernel_distance else 1e-11  # its exponentials are float32
    assert in_blocks.value == pytest.approx(whole.value, rel=precision)
    assert in_blocks.standard_error == pytest.approx(whole.standard_error, rel=100 * precision)


@pytest.mark.parametrize(("distance", "bias"), [(energy_distance, 0.37), (kernel_inception_distance, 2.8)])
def test_pairwise_distances_are_unbiased_for_equal_distributions(distance, bias):
    """The mean over repeats is 0 within its error. A V-statistic of such small sets would have the given
    bias, (E k(X, X) - E k(X, X')) (1/12 + 1/8)."""
    generator = torch.Generator().manual_seed(0)
    values = [distance(normals(12, 2, generator), normals(8, 2, generator)).value for _ in range(1500)]
    standard_error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4.0 * standard_error
    assert standard_error < bias / 20.0
    assert min(values) < 0.0


def error_over_spread(distance, dim, shift, scale, n=100, m=80):
    """Ratio of the root mean square standard error to the standard deviation of the value in 200 repeats."""
    generator = torch.Generator().manual_seed(0)
    estimates = [
        distance(normals(n, dim, generator), normals(m, dim, generator, shift, scale)) for _ in range(200)
    ]
    errors, values = ([getattr(each, name) for each in estimates] for name in ("standard_error", "value"))
    return np.sqrt(np.mean(np.square(errors))) / np.std(values)


@pytest.mark.parametrize(("n", "m"), [(160, 20), (20, 160)])
def test_standard_errors_follow_the_smaller_set(n, m):
    assert error_over_spread(energy_distance, 2, 0.5, 1.0, n, m) == pytest.approx(1.0, abs=0.2)


def test_the_jackknife_variance_of_a_mean_is_its_closed_form():
    """With groups of one: the sample variance divided by the number of examples."""
    x = normals(12, 1, torch.Generator().manual_seed(0)).double().flatten()
    without = [(x.sum() - each).item() / 11 for each in x]
    assert jackknife_variance(without) == pytest.approx((x.var() / 12).item(), rel=1e-12)


DISTANCES = [energy_distance, kernel_distance, kernel_inception_distance, frechet_distance]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("dim", "shift", "scale"), [(2, 0.5, 1.0), (8, 0.5, 1.0), (8, 0.0, 1.5)])
def test_standard_errors_match_the_spread_for_different_distributions(distance, dim, shift, scale):
    """Within a fifth, half of which is the randomness of the repeats."""
    assert error_over_spread(distance, dim, shift, scale) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dim", [1, 2, 8])
def test_standard_errors_cover_the_spread_for_equal_distributions(distance, dim):
    """Only the second-order terms are left. A jackknife doubles their variance, and so does, at worst,
    clipping the first-order terms at 0: the ratio is between 1 and sqrt(2), within the repeats' own error
    of a twentieth."""
    assert 0.9 < error_over_spread(distance, dim, shift=0.0, scale=1.0) < 1.1 * np.sqrt(2.0)


@pytest.mark.parametrize("distance", [energy_distance, kernel_inception_distance])
def test_in_many_dimensions_clipping_the_first_order_terms_matters_little(distance):
    """The ratio is between 1 and 1.1, within the repeats' own error of a twentieth."""
    assert 0.9 < error_over_spread(distance, dim=64, shift=0.0, scale=1.0) < 1.2


def test_kernel_inception_distance_of_one_feature_is_its_closed_form():
    """3 (difference of means)^2 + 3 (difference of second moments)^2 + (difference of third moments)^2; for
    N(0, 1) and N(1, 1) the differences are 1, 1 and 4."""
    generator = torch.Generator().manual_seed(0)
    actual = kernel_inception_distance(normals(3000, 1, generator), normals(3000, 1, generator, shift=1.0))
    assert actual.standard_error < 2.0
    assert actual.value == pytest.approx(3.0 + 3.0 + 16.0, abs=4.0 * actual.standard_error)


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
    actual = energy_distance(x, y)
    assert actual.standard_error < 0.03
    assert actual.value == pytest.approx(expected, abs=4.0 * actual.standard_error)


def test_energy_distance_of_far_away_points_is_precise():
    """Distances by matrix products would lose precision, since coordinates are about a million."""
    x = torch.tensor([[0.0], [1e-3], [3e-3]]).double() + 1e6
    y = torch.tensor([[2e-3], [5e-3]]).double() + 1e6
    expected = double_loop(minus_distance, x.numpy(), y.numpy())
    assert energy_distance(x, y).value == pytest.approx(expected, abs=1e-8)


def test_frechet_distance_matches_scipys_matrix_root(rng):
    mixing = rng.standard_normal((6, 6))
    x, y = rng.standard_normal((80, 6)) @ mixing, 0.5 + 2.0 * rng.standard_normal((50, 6))
    covariance_x, covariance_y = np.cov(x.T), np.cov(y.T)
    root = np.real(sqrtm(covariance_x @ covariance_y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariance_x + covariance_y - 2.0 * root)
    assert frechet_distance(torch.tensor(x), torch.tensor(y)).value == pytest.approx(expected, rel=1e-8)


def with_moments(rng, count, mean, covariance):
    """Points with exactly the given sample mean and sample covariance."""
    x = rng.standard_normal((count, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x.T)))).T
    return torch.tensor(x @ np.linalg.cholesky(covariance).T + mean)


def test_frechet_distance_of_commuting_gaussians_is_its_closed_form(rng):
    """|mu|^2 + sum (sigma_x - sigma_y)^2 if the covariances have the same axes."""
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


@pytest.mark.parametrize("distance", [energy_distance, kernel_inception_distance, frechet_distance])
def test_distances_are_symmetric_and_take_images_as_flat_vectors(distance):
    x, y = torch.randn(2, 30, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    actual = distance(x, y)
    for other in (distance(y, x), distance(x.flatten(1), y.flatten(1))):
        assert actual.value == pytest.approx(other.value, rel=1e-6)
        assert actual.standard_error == pytest.approx(other.standard_error, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_0_even_with_fewer_examples_than_features():
    x = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x).value == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("n", "m", "finite"), [(4, 4, True), (3, 20, False), (20, 3, False), (2, 2, False)])
def test_frechet_distance_has_a_standard_error_from_4_examples_on(n, m, finite):
    generator = torch.Generator().manual_seed(0)
    actual = frechet_distance(normals(n, 2, generator), normals(m, 2, generator))
    assert np.isfinite(actual.value)
    assert np.isfinite(actual.standard_error) == finite


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_sliced_wasserstein_distance_of_shifted_normals_is_its_closed_form(dim):
    """|shift| / sqrt(dim), the root mean square of the shift's projections. The squared projections have a
    relative variance of 2 (dim - 1) / (dim + 2), averaged over 200 lines."""
    generator = torch.Generator().manual_seed(0)
    shift = normals(1, dim, generator)
    shift *= 3.0 / shift.norm()
    x, y = normals(2000, dim, generator), normals(1500, dim, generator, shift)
    tolerance = 2.0 * np.sqrt(2.0 * (dim - 1) / (dim + 2) / 200) + 0.03
    assert sliced_wasserstein_distance(x, y) == pytest.approx(3.0 / np.sqrt(dim), rel=tolerance)


def test_the_lines_of_the_sliced_wasserstein_distance_depend_on_the_seed_only():
    generator = torch.Generator().manual_seed(0)
    x, y = normals(50, 3, generator), normals(40, 3, generator, shift=1.0)
    one, again, other = (sliced_wasserstein_distance(x, y, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert one == pytest.approx(other, rel=0.2)


def laplace_distance(x, y, lengths):
    """The multi-scale kernel distance by its definition, one kernel after another."""

    def table(p, q, length):
        return np.exp(minus_distance(p[:, None], q[None]) / length)

    parts = []
    for length in lengths:
        within_x, within_y = ((table(z, z, length).sum() - len(z)) / (len(z) * (len(z) - 1)) for z in (x, y))
        parts.append((within_x + within_y - 2.0 * table(x, y, length).mean()) / within_y)
    return np.mean(parts)


def lengths_of(y):
    """From twice the median distance to the nearest other row to the median distance of all pairs."""
    gaps = -minus_distance(y[:, None], y[None])
    nearest = [min(gap for gap in row if gap > 0.0) for row in gaps]
    pairs = gaps[np.triu_indices(len(y), 1)]
    return np.geomspace(2.0 * np.median(nearest), np.median(pairs), 5)


@pytest.mark.parametrize(("n", "m", "dim"), [(41, 51, 2), (301, 301, 3), (20, 33, 64)])
def test_the_multiscale_kernel_distance_matches_its_definition(rng, n, m, dim):
    """Odd numbers have one median; an even number of pairs' lower median differs a little."""
    x, y = 1.2 * rng.standard_normal((n, dim)), rng.standard_normal((m, dim))
    kernel = MultiscaleKernel.of(torch.tensor(y))
    np.testing.assert_allclose(kernel.lengths.numpy(), lengths_of(y), rtol=0.02)
    expected = laplace_distance(x, y, kernel.lengths.numpy())
    assert kernel_distance(torch.tensor(x), torch.tensor(y)).value == pytest.approx(expected, abs=1e-6)


def test_the_kernels_lengths_ignore_repeated_rows(rng):
    """Where most rows have an equal one, the nearest row that differs is their neighbour."""
    y = torch.tensor(rng.standard_normal((101, 2)))
    twice = MultiscaleKernel.of(torch.cat([y, y]))
    assert twice.lengths[0] == MultiscaleKernel.of(y).lengths[0]
    same = torch.ones(10, 2)
    assert kernel_distance(same, same).value == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(kernel_distance(y, same).value)


def paired_normals(count, generator, correlation, dim=2, scales=(1.1, 1.2)):
    """Samples of two models, whose noise has a correlation."""
    shared, own = normals(count, dim, generator), normals(count, dim, generator)
    other = correlation * shared + (1.0 - correlation**2) ** 0.5 * own
    return scales[0] * shared, scales[1] * other


@pytest.mark.parametrize(
    ("correlation", "scales"), [(0.0, (1.1, 1.3)), (0.95, (1.1, 1.3)), (0.95, (1.2, 1.2))]
)
def test_the_error_of_a_paired_difference_of_kernel_distances_matches_its_spread(correlation, scales):
    generator = torch.Generator().manual_seed(0)
    differences, unpaired = [], []
    for _ in range(100):
        a, b = paired_normals(100, generator, correlation, scales=scales)
        y = normals(120, 2, generator)
        differences.append(kernel_distance_difference(a, b, y))
        one, other = kernel_distance(a, y), kernel_distance(b, y)
        assert differences[-1].value == pytest.approx(one.value - other.value, abs=1e-6)
        unpaired.append(one.standard_error**2 + other.standard_error**2)
    error = np.sqrt(np.mean([each.standard_error**2 for each in differences]))
    assert error == pytest.approx(np.std([each.value for each in differences]), rel=0.25)
    if correlation:
        assert error < 0.7 * np.sqrt(np.mean(unpaired))


def exact_difference_error(a, b, y, kernel):
    """Hoeffding's decomposition of a difference, from the tables of all pairs of the differences."""
    n, m = len(a), len(y)
    xx = (kernel(a, a) - kernel(b, b)).double().fill_diagonal_(0.0)
    xy = (kernel(a, y) - kernel(b, y)).double()
    rows = xx.sum(1) / (n - 1)
    left = (xx - rows[:, None] - rows[None] + rows.mean()).fill_diagonal_(0.0)
    within = float(left.square().sum()) / (n * (n - 1))
    between = float((xy - xy.mean(1, keepdim=True) - xy.mean(0, keepdim=True) + xy.mean()).square().mean())
    first_x = float((rows - xy.mean(1)).var()) - within / (n - 1) - between / m
    first_y = float(xy.mean(0).var()) - between / n
    second = 2.0 * within / (n * (n - 1)) + 4.0 * between / (n * m)
    return (4.0 * max(first_x, 0.0) / n + 4.0 * max(first_y, 0.0) / m + second) ** 0.5


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.1, 1.3)], ids=["equal laws", "different laws"])
def test_the_interaction_of_a_difference_is_that_of_all_rows(scales):
    """1,000 of the 1,500 rows are used."""
    generator = torch.Generator().manual_seed(0)
    a, b = (each.double() for each in paired_normals(1500, generator, 0.5, scales=scales))
    y = normals(1200, 2, generator).double()
    found = kernel_distance_difference(a, b, y).standard_error
    assert found == pytest.approx(exact_difference_error(a, b, y, MultiscaleKernel.of(y)), rel=0.02)


def test_the_pairs_of_a_model_are_computed_once_for_all_that_it_is_compared_with():
    generator = torch.Generator().manual_seed(0)
    models, y = [normals(1500, 2, generator) for _ in range(4)], normals(1600, 2, generator)
    num_pairs = 0

    class Counted(MultiscaleKernel):
        def __call__(self, p, q):
            nonlocal num_pairs
            num_pairs += len(p) * len(q)
            return super().__call__(p, q)

    fitted = MultiscaleKernel.of(y)
    kernel = Counted(fitted.lengths, fitted.weights)
    for first, second in itertools.combinations(models, 2):
        kernel_distance_difference(first, second, y, kernel)
    tables = len(models) * (1500 * 1600 + 1500 * 1500)
    assert num_pairs <= tables + 6 * 4 * 1000**2, "and 1,000 rows of each of four tables a comparison"
    before = num_pairs
    models[0].mul_(2.0)
    kernel_distance_difference(models[0], models[1], y, kernel)
    assert num_pairs - before > 1500 * 1600, "samples that have changed are measured anew"


def test_a_model_does_not_differ_from_itself(rng):
    a, y = torch.tensor(rng.standard_normal((30, 2))), torch.tensor(rng.standard_normal((40, 2)))
    difference = kernel_distance_difference(a, a, y)
    assert (difference.value, difference.standard_error) == (0.0, 0.0)
    with pytest.raises(ValueError, match="equally many, not 30 and 29"):
        kernel_distance_difference(a, a[:29], y)


@pytest.mark.parametrize("distance", [energy_distance, kernel_distance, kernel_inception_distance])
def test_a_reference_whose_numbers_change_in_place_is_measured_anew(distance):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(600, 2, generator=generator) for _ in range(2))
    before = distance(x, y)
    assert distance(x, y) == before
    y += 1.0
    after = distance(x, y)
    assert after == distance(x, y.clone()) and after.value > before.value + 0.01


@pytest.mark.parametrize(
    ("value", "error", "sign"),
    [(2.1, 1.0, 1), (-2.1, 1.0, -1), (2.0, 1.0, 0), (np.nan, 1.0, 0), (3.0, np.nan, 0), (0.0, 0.0, 0)],
)
def test_the_sign_of_an_estimate_is_0_unless_it_exceeds_its_error(value, error, sign):
    assert Estimate(value, error).sign(2.0) == sign
