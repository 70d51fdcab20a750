import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusion.metrics import energy_distance, frechet_distance


def brute_force_energy_distance(x, y):
    def distance(p, q):
        return np.sqrt(((p - q) ** 2).sum())

    between = np.mean([[distance(p, q) for q in y] for p in x])
    within = [
        np.mean([distance(p, q) for i, p in enumerate(z) for j, q in enumerate(z) if i != j]) for z in (x, y)
    ]
    return 2.0 * between - sum(within)


@pytest.mark.parametrize(("n", "m", "dim"), [(2, 2, 1), (13, 20, 2), (25, 7, 64)])
def test_energy_distance_is_the_double_loop(rng, n, m, dim):
    x, y = rng.standard_normal((n, dim)), rng.standard_normal((m, dim)) + 0.3
    found = energy_distance(torch.tensor(x), torch.tensor(y))
    assert found == pytest.approx(brute_force_energy_distance(x, y), abs=1e-12)


def test_energy_distance_of_more_rows_than_one_block_is_that_of_numpy(rng):
    x, y = rng.standard_normal((1500, 2)), rng.standard_normal((1100, 2))

    def total(p, q):
        return np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1)).sum()

    expected = 2 * total(x, y) / (1500 * 1100) - total(x, x) / (1500 * 1499) - total(y, y) / (1100 * 1099)
    assert energy_distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, abs=1e-11)


def test_energy_distance_is_unbiased_where_both_sets_have_one_law():
    """Its mean over repeats is 0 within error, while small sets would bias a V-statistic by far more."""
    generator = torch.Generator().manual_seed(0)
    values = [
        energy_distance(torch.randn(12, 2, generator=generator), torch.randn(8, 2, generator=generator))
        for _ in range(1500)
    ]
    assert abs(np.mean(values)) < 4.0 * np.std(values) / np.sqrt(len(values))
    assert np.std(values) / np.sqrt(len(values)) < 0.01
    assert min(values) < 0.0


def test_energy_distance_of_two_constants_is_twice_their_distance():
    x, y = torch.zeros(5, 2), torch.tensor([[3.0, 4.0]]).repeat(4, 1)
    assert energy_distance(x, y) == pytest.approx(10.0, abs=1e-12)


def test_energy_distance_of_shifted_normals_is_its_closed_form():
    """In one dimension E|N(mu, 2)| = 2 exp(-mu^2/4)/sqrt(pi) + mu erf(mu/2)."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3000, 1, generator=generator), 1.0 + torch.randn(3000, 1, generator=generator)
    mu = torch.tensor(1.0)

    def mean_absolute(m):
        return (2.0 * torch.exp(-(m**2) / 4.0) / torch.pi**0.5 + m * torch.erf(m / 2.0)).item()

    expected = 2.0 * mean_absolute(mu) - 2.0 * mean_absolute(0.0 * mu)
    assert energy_distance(x, y) == pytest.approx(expected, abs=0.08)


def test_energy_distance_of_far_away_points_keeps_its_digits():
    """Distances through matrix products would lose them beside coordinates of a million."""
    x = torch.tensor([[0.0], [1e-3], [3e-3]]).double() + 1e6
    y = torch.tensor([[2e-3], [5e-3]]).double() + 1e6
    assert energy_distance(x, y) == pytest.approx(brute_force_energy_distance(x.numpy(), y.numpy()), abs=1e-8)


def test_frechet_distance_is_that_of_scipys_matrix_root(rng):
    mixing = rng.standard_normal((6, 6))
    x, y = rng.standard_normal((80, 6)) @ mixing, 0.5 + 2.0 * rng.standard_normal((50, 6))
    covariance_x, covariance_y = np.cov(x.T), np.cov(y.T)
    root = np.real(sqrtm(covariance_x @ covariance_y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariance_x + covariance_y - 2.0 * root)
    assert frechet_distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, rel=1e-8)


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
    assert frechet_distance(x, y) == pytest.approx(1.0 + 9.0 + 1.0 + 6.25, rel=1e-9)


def test_frechet_distance_of_one_feature_is_its_closed_form(rng):
    x, y = (
        with_moments(rng, 30, np.array([mean]), np.array([[variance]]))
        for mean, variance in ((1, 4.0), (3, 9.0))
    )
    assert frechet_distance(x, y) == pytest.approx(4.0 + 1.0, rel=1e-9)


@pytest.mark.parametrize("distance", [energy_distance, frechet_distance])
def test_distances_are_symmetric_and_take_images_as_flat_vectors(distance):
    x, y = torch.randn(2, 30, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-6)
    assert distance(x, y) == pytest.approx(distance(x.flatten(1), y.flatten(1)), rel=1e-12)


def test_frechet_distance_of_a_set_to_itself_is_0_even_with_fewer_examples_than_features():
    x = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-5)
