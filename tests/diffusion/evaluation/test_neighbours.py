"""Nearest neighbours: distances, precision, recall and Kullback-Leibler divergence."""

import numpy as np
import pytest
import torch

from diffusion.evaluation import neighbours as neighbours_module
from diffusion.evaluation.neighbours import nearest_distances, neighbour_kl, precision_and_recall


def minus_distance(p, q):
    return -np.sqrt(((p - q) ** 2).sum(-1))


def normals(count, dim, generator, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(count, dim, generator=generator)


def values(*arguments):
    """Precision and recall without their errors."""
    return tuple(each.value for each in precision_and_recall(*arguments))


@pytest.fixture
def halves():
    """Two clouds of 200 points, far from each other."""
    generator = torch.Generator().manual_seed(0)
    return normals(200, 2, generator), normals(200, 2, generator, shift=100.0)


def test_samples_of_half_the_data_have_precision_1_and_recall_one_half(halves):
    data = torch.cat(halves)
    assert values(halves[0], data) == (1.0, 0.5)
    fresh = normals(200, 2, torch.Generator().manual_seed(1))
    precision, recall = values(fresh, data)
    assert 0.9 < precision <= 1.0 and 0.45 < recall <= 0.5


def test_samples_half_of_which_are_far_from_the_data_have_precision_one_half_and_recall_1(halves):
    samples = torch.cat(halves)
    assert values(samples, halves[0]) == (0.5, 1.0)
    fresh = normals(200, 2, torch.Generator().manual_seed(1))
    precision, recall = values(samples, fresh)
    assert 0.45 < precision <= 0.5 and 0.9 < recall <= 1.0


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_match_balls_checked_one_by_one(rng, neighbours):
    x, y = rng.standard_normal((40, 2)), 0.7 + 1.3 * rng.standard_normal((60, 2))

    def fraction_covered(points, centres):
        radii = [np.sort(-minus_distance(q, centres))[neighbours] for q in centres]
        balls = list(zip(centres, radii, strict=True))
        return np.mean([any(-minus_distance(p, q) <= radius for q, radius in balls) for p in points])

    expected = fraction_covered(x, y), fraction_covered(y, x)
    assert values(torch.tensor(x), torch.tensor(y), neighbours) == expected


def test_precision_and_recall_use_only_the_first_examples_of_large_sets(monkeypatch, halves):
    monkeypatch.setattr(neighbours_module, "MAX_UNDECISIVE", 200)
    assert values(torch.cat(halves), torch.cat(halves[::-1])) == (0.0, 0.0)
    assert values(torch.cat(halves), halves[0]) == (1.0, 1.0)


@pytest.mark.parametrize(("n", "m", "count"), [(7, 5, 5), (1100, 30, 1), (1100, 1030, 4)])
def test_nearest_distances_are_the_smallest_of_all(rng, n, m, count):
    x, y = rng.standard_normal((n, 1, 1, 3)), rng.standard_normal((m, 1, 1, 3))
    all_distances = -minus_distance(x.reshape(n, 1, 3), y.reshape(1, m, 3))
    actual = nearest_distances(torch.tensor(x), torch.tensor(y), count)
    np.testing.assert_allclose(actual, np.sort(all_distances, axis=1)[:, :count], atol=1e-7)


def spread_and_error(estimate, count=40):
    """Standard deviation of a value over repeats, and root mean square of its standard error."""
    generator = torch.Generator().manual_seed(0)
    estimates = [estimate(generator) for _ in range(count)]
    errors, found = ([getattr(each, name) for each in estimates] for name in ("standard_error", "value"))
    return np.std(found), np.sqrt(np.mean(np.square(errors)))


@pytest.mark.parametrize("index", [0, 1])
def test_errors_of_precision_and_recall_match_their_spread(index):
    def estimate(generator):
        return precision_and_recall(normals(300, 2, generator, scale=1.5), normals(200, 2, generator))[index]

    spread, error = spread_and_error(estimate)
    assert 0.75 < error / spread < 2.2


def test_the_divergence_is_the_formula_computed_row_by_row():
    generator = torch.Generator().manual_seed(2)
    x, y = normals(7, 2, generator).double(), normals(9, 2, generator).double()

    def one_way(p, q, k=2):
        within = torch.cdist(p, p).sort(dim=1).values[:, k]  # the first is the row itself
        across = torch.cdist(p, q).sort(dim=1).values[:, k - 1]
        return 2.0 * (across / within).log().mean() + np.log(len(q) / (len(p) - 1))

    assert neighbour_kl(x, y, 2).value == pytest.approx(float(one_way(x, y) + one_way(y, x)), rel=1e-6)


@pytest.mark.parametrize(("shift", "scale"), [(0.7, 1.0), (0.0, 1.6)])
def test_the_divergence_of_normals_is_its_closed_form_and_its_error_matches_the_spread(shift, scale):
    """KL(N(d, s^2) | N(0, 1)): (s^2 + d^2 - 1) / 2 - log s; reverse: (1 + d^2) / (2 s^2) - 1/2 + log s."""
    generator = torch.Generator().manual_seed(1)
    s2, d2 = scale**2, shift**2
    expected = (1.0 + d2) / (2.0 * s2) + (s2 + d2) / 2.0 - 1.0
    actual = neighbour_kl(normals(3000, 1, generator, shift, scale), normals(3000, 1, generator))
    assert actual.value == pytest.approx(expected, abs=4.0 * actual.standard_error)
    assert actual.standard_error < 0.15 * expected + 0.05
    spread, error = spread_and_error(
        lambda each: neighbour_kl(normals(250, 1, each, shift, scale), normals(300, 1, each))
    )
    assert 0.75 < error / spread < 1.9


def test_the_divergence_of_equal_distributions_is_0_within_its_error():
    generator = torch.Generator().manual_seed(0)
    actual = neighbour_kl(normals(1000, 3, generator), normals(1500, 3, generator))
    assert abs(actual.value) < 4.0 * actual.standard_error < 0.5


def test_the_divergence_of_repeated_rows_is_large_but_finite():
    """Columns on a grid have rows without distance; samples between them are told apart."""
    generator = torch.Generator().manual_seed(0)
    on_grid, other = ((2.0 * normals(1000, 2, generator)).round() for _ in range(2))
    same, between = (
        neighbour_kl(other, on_grid),
        neighbour_kl(normals(1000, 2, generator, scale=2.0), on_grid),
    )
    assert np.isfinite(same.value) and abs(same.value) < 1.0
    assert 5.0 < between.value < np.inf


def test_too_few_rows_have_no_divergence_or_no_error():
    x = normals(30, 2, torch.Generator().manual_seed(0))
    assert np.isnan(neighbour_kl(x[:5], x).value)
    few = neighbour_kl(x[:8], x)
    assert np.isfinite(few.value) and np.isnan(few.standard_error)
