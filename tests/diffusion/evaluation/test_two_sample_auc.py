"""Classifier two-sample tests: known areas under the curve, errors, pairs, and few rows."""

import math

import numpy as np
import pytest
import torch

from diffusion.evaluation.two_sample_auc import (
    classifier_auc,
    classifier_auc_difference,
    feature_auc,
    pixel_auc,
    pixel_auc_difference,
)


def normals(count, dim, generator, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(count, dim, generator=generator)


def test_the_auc_of_shifted_normals_is_its_closed_form():
    """The best AUC is Phi(shift / sqrt(2)), which logistic regression reaches; trees come close."""
    generator = torch.Generator().manual_seed(0)
    x, y = normals(1500, 2, generator), normals(1500, 2, generator)
    x[:, 0] += 1.0
    expected = 0.5 * (1.0 + math.erf(0.5))
    for auc, loss in ((feature_auc(x, y), 0.0), (classifier_auc(x, y), 0.02)):
        assert expected - loss - 4.0 * auc.standard_error < auc.value < expected + 4.0 * auc.standard_error
        assert 0.005 < auc.standard_error < 0.02


def test_equal_distributions_have_auc_one_half():
    generator = torch.Generator().manual_seed(0)
    for auc in (classifier_auc, feature_auc):
        actual = auc(normals(500, 3, generator), normals(800, 3, generator))
        assert abs(actual.value - 0.5) < 3.0 * actual.standard_error < 0.1


def test_trees_see_a_scale_that_logistic_regression_cannot():
    generator = torch.Generator().manual_seed(0)
    x, y = normals(900, 2, generator, scale=2.0), normals(900, 2, generator)
    assert classifier_auc(x, y).value > 0.7
    assert abs(feature_auc(x, y).value - 0.5) < 0.06


def test_the_value_does_not_depend_on_the_number_of_threads_or_the_random_state():
    generator = torch.Generator().manual_seed(0)
    x, y = normals(100, 2, generator), normals(100, 2, generator)
    np.random.seed(1)
    one = classifier_auc(x, y)
    np.random.seed(2)
    assert classifier_auc(x, y) == one


class DifferenceOfMeans:
    """A linear classifier without the cost of iterations: the best one for normals that are shifted."""

    def fit(self, rows, drawn):
        self.direction = rows[drawn].mean(axis=0) - rows[~drawn].mean(axis=0)
        return self

    def decision_function(self, rows):
        return rows @ self.direction


@pytest.mark.parametrize(
    ("correlation", "shifts"), [(0.0, (0.3, 0.6)), (0.95, (0.3, 0.6)), (0.95, (0.5, 0.5))]
)
def test_errors_match_the_spread_and_pairs_have_smaller_ones(correlation, shifts):
    generator = torch.Generator().manual_seed(0)
    single, differences = [], []
    for _ in range(150):
        shared, own, y = (normals(150, 3, generator) for _ in range(3))
        a = shifts[0] + shared
        b = shifts[1] + correlation * shared + (1.0 - correlation**2) ** 0.5 * own
        single.append(classifier_auc(a, y, DifferenceOfMeans))
        differences.append(classifier_auc_difference(a, b, y, DifferenceOfMeans))
    stated = []
    for estimates in (single, differences):
        stated.append(np.sqrt(np.mean([each.standard_error**2 for each in estimates])))
        assert stated[-1] == pytest.approx(np.std([each.value for each in estimates]), rel=0.25)
    if correlation:
        assert stated[1] < 0.7 * stated[0]


def test_the_difference_is_that_of_the_values_and_needs_pairs():
    generator = torch.Generator().manual_seed(0)
    a, b, y = (normals(90, 20, generator, scale=scale) for scale in (1.0, 1.5, 1.0))
    for difference, auc in ((classifier_auc_difference, classifier_auc), (pixel_auc_difference, pixel_auc)):
        assert difference(a, b, y).value == pytest.approx(auc(a, y).value - auc(b, y).value, abs=1e-12)
        same = difference(a, a, y)
        assert (same.value, same.standard_error) == (0.0, 0.0)
        with pytest.raises(ValueError, match="equally many, not 90 and 89"):
            difference(a, b[:89], y)


def test_pixels_are_compared_in_the_components_of_the_reference():
    """A component that the reference has little of is not looked at."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([10.0] * 16 + [0.1] * 20)
    x, y = (scales * normals(300, 36, generator) for _ in range(2))
    x[:, 16:] += 0.5
    assert abs(pixel_auc(x, y).value - 0.5) < 0.12
    x[:, 0] += 20.0
    assert pixel_auc(x.reshape(-1, 1, 6, 6), y.reshape(-1, 1, 6, 6)).value > 0.8


def test_too_few_rows_have_no_auc():
    x, y = torch.zeros(5, 2), torch.zeros(20, 2)
    assert math.isnan(classifier_auc(x, y).value) and math.isnan(classifier_auc(y, x).standard_error)
    assert classifier_auc(y, y).value == 0.5
