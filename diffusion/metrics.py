"""Distances between a set of samples and held-out data."""

import torch
from torch import Tensor


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased: it can fall slightly below 0.

    Args:
        x: [n, ...], n at least 2; examples are flattened.
        y: [m, ...], m at least 2.

    Source: Szekely and Rizzo, 2013, Eq. 2.1, estimated by U-statistics.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    n, m = len(x), len(y)
    within_x = _sum_of_distances(x, x) / (n * (n - 1))
    within_y = _sum_of_distances(y, y) / (m * (m - 1))
    return 2.0 * _sum_of_distances(x, y) / (n * m) - within_x - within_y


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features.

    |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2), roots by symmetric
    eigendecomposition. Biased upward by the finite sets: compare at equal sizes only.

    Args:
        x: [n, ...], n at least 2; examples are flattened to features.
        y: [m, ...], m at least 2.

    Source: arXiv:1706.08500, Eq. 6.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    covariance_x, covariance_y = (torch.cov(features.T).reshape(x.shape[1], -1) for features in (x, y))
    root_x = _symmetric_root(covariance_x)
    cross = torch.linalg.eigvalsh(root_x @ covariance_y @ root_x).clamp(min=0.0).sqrt().sum()
    shift = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    return float(shift + covariance_x.trace() + covariance_y.trace() - 2.0 * cross)


def _sum_of_distances(x: Tensor, y: Tensor) -> float:
    # Without matrix products, which would give an example a distance to itself.
    mode = "donot_use_mm_for_euclid_dist"
    return float(sum(torch.cdist(rows, y, compute_mode=mode).sum() for rows in x.split(1024)))


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
