"""Classifier two-sample tests: how well a classifier tells samples from a reference.

The area under its ROC curve (AUC) on rows that it was not trained on: 0.5 for samples that it cannot tell
from the reference, 1 for samples that it always can. Every classifier is trained with one thread, so that
the value is the same on every machine.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.evaluation.distances import Estimate, SampleMetric, by_name
from diffusion.evaluation.once import once

NUM_FOLDS = 3
NUM_COMPONENTS = 16  # principal components by which pixels are compared
_MAX_PASSES = 200  # of the logistic regression

Array = NDArray[np.float64]


def boosted_trees() -> Any:
    """Gradient-boosted trees, for a few coordinates."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    # Early stopping would hold out random rows.
    return HistGradientBoostingClassifier(early_stopping=False, random_state=0)


def logistic_regression() -> Any:
    """Logistic regression on standardised values, for the many values of features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=_MAX_PASSES))


def classifier_auc(x: Tensor, y: Tensor, classifier: Callable[[], Any] = boosted_trees) -> Estimate:
    """Cross-validated AUC of classifiers that tell samples from a reference: lower is better.

    Row i belongs to fold i mod 3. A classifier is trained on each fold, and the mean log odds of two score
    the rows of the third; the AUC is the mean over the folds. For equal distributions its expectation is
    exactly 0.5, so it can fall below.

    The standard error is DeLong's, times a factor of 1 to sqrt(2): every pair of rows counts twice, each as
    the other's training row. Where chance decides, this doubles the variance; where classifiers agree, it
    does not. The factor is the ratio of the variance of one classifier's scores to that of the mean of two.

    Args:
        x: samples [n, ...]; examples are flattened. NaN if n < 6.
        y: reference [m, ...]. NaN if m < 6.
        classifier: makes a classifier of scikit-learn.

    Sources: arXiv:1610.06545; DeLong et al., 1988 (Biometrics 44).
    """
    return _auc([_placements(x, y, classifier)], [1.0])


def classifier_auc_difference(
    a: Tensor, b: Tensor, y: Tensor, classifier: Callable[[], Any] = boosted_trees
) -> Estimate:
    """`classifier_auc` of a minus that of b, with the standard error of the difference (paired DeLong).

    Args:
        a: samples [n, ...] of one model.
        b: samples [n, ...] of another; sample i of both comes from the same noise, or from independent one.
        y: [m, ...] the reference of both.
        classifier: makes a classifier of scikit-learn.

    Raises:
        ValueError: the models have different numbers of samples.
    """
    if len(a) != len(b):
        raise ValueError(f"paired samples are equally many, not {len(a)} and {len(b)}")
    return _auc([_placements(each, y, classifier) for each in (a, b)], [1.0, -1.0])


Placements = list[tuple[Array, Array]]


def _placements(x: Tensor, y: Tensor, classifier: Callable[[], Any]) -> Placements:
    """`_compute_placements`, once for the same tensors."""
    found: Placements = once(
        x, (_placements, classifier), lambda: _compute_placements(x, y, classifier), other=y
    )
    return found


def _compute_placements(x: Tensor, y: Tensor, classifier: Callable[[], Any]) -> Placements:
    """For each fold: of each sample the fraction of reference rows with lower scores [3, n / 3], and of each
    reference row the fraction of samples with higher ones [3, m / 3].

    The three are by the mean of two classifiers, by the first and by the second.
    """
    from threadpoolctl import threadpool_limits

    n, m = len(x), len(y)
    if min(n, m) < 2 * NUM_FOLDS:
        return []
    rows = torch.cat([x.flatten(1), y.flatten(1)]).cpu().double().numpy()
    drawn = np.arange(n + m) < n
    folds = np.concatenate([np.arange(n), np.arange(m)]) % NUM_FOLDS
    with threadpool_limits(limits=1):
        scores = np.stack(
            [
                classifier().fit(rows[folds == fold], drawn[folds == fold]).decision_function(rows)
                for fold in range(NUM_FOLDS)
            ]
        )
    placements = []
    for fold in range(NUM_FOLDS):
        one, other = (scores[trained_on] for trained_on in range(NUM_FOLDS) if trained_on != fold)
        of_samples, of_reference = [], []
        for score in ((one + other) / 2.0, one, other):
            samples, reference = (score[(folds == fold) & (drawn == each)] for each in (True, False))
            of_samples.append(_fraction_below(samples, reference))
            of_reference.append(1.0 - _fraction_below(reference, samples))
        placements.append((np.stack(of_samples), np.stack(of_reference)))
    return placements


def _fraction_below(scores: Array, others: Array) -> Array:
    """For each score the fraction of the others that are lower; equal ones count half."""
    ordered = np.sort(others)
    counts = np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")
    return counts / (2.0 * len(others))


def _auc(placements: list[Placements], signs: list[float]) -> Estimate:
    """Signed sum of the AUCs of several sets of samples, which are paired, against one reference."""
    if not all(placements):
        return Estimate(math.nan, math.nan)
    values, variances = [], []
    for fold in zip(*placements, strict=True):
        parts = [
            sum(sign * part for sign, part in zip(signs, each, strict=True))
            for each in zip(*fold, strict=True)
        ]
        values.append(parts[0][0].mean())
        by_mean, by_one, of_average = (
            sum(np.mean(np.var(each, axis=-1, ddof=1)) / each.shape[-1] for each in chosen)
            for chosen in (
                [part[0] for part in parts],
                [part[1:] for part in parts],
                [part[1:].mean(axis=0) for part in parts],
            )
        )
        # Two classifiers of a few values can contradict each other by chance.
        variances.append(by_mean * min(by_one / of_average, 2.0) if of_average > 0.0 else by_mean)
    return Estimate(float(np.mean(values)), float(np.sqrt(np.sum(variances)) / NUM_FOLDS))


def principal_components(x: Tensor, y: Tensor) -> Tensor:
    """Rows of x in the principal components of the reference y, at most 16: [n, components]."""

    def fit() -> Any:
        from sklearn.decomposition import PCA

        rows = y.flatten(1).cpu().double().numpy()
        with np.errstate(invalid="ignore"):  # if all images are the same, the ratios of variances are 0 / 0
            return PCA(min(NUM_COMPONENTS, *rows.shape), random_state=0).fit(rows)

    def transform() -> Tensor:
        pca = once(y, principal_components, fit)
        return torch.from_numpy(pca.transform(x.flatten(1).cpu().double().numpy()))

    components: Tensor = once(x, principal_components, transform, other=y)
    return components


def pixel_auc(x: Tensor, y: Tensor) -> Estimate:
    """`classifier_auc` by boosted trees on the 16 first principal components of the reference's pixels."""
    return classifier_auc(principal_components(x, y), principal_components(y, y))


def pixel_auc_difference(a: Tensor, b: Tensor, y: Tensor) -> Estimate:
    """`classifier_auc_difference` by boosted trees on the principal components of the reference's pixels."""
    of_a, of_b, of_y = (principal_components(each, y) for each in (a, b, y))
    return classifier_auc_difference(of_a, of_b, of_y)


def feature_auc(x: Tensor, y: Tensor) -> Estimate:
    """`classifier_auc` by logistic regression on features."""
    return classifier_auc(x, y, logistic_regression)


AUC = SampleMetric(lambda x, y: by_name({"auc": classifier_auc(x, y)}), ("points",))
FEATURE_AUC = SampleMetric(lambda x, y: by_name({"feature_auc": feature_auc(x, y)}), ("image",))
PIXEL_AUC = SampleMetric(lambda x, y: by_name({"pixel_auc": pixel_auc(x, y)}), ("image",), "pixels")
