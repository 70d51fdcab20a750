"""Distances between a set of samples and a reference, with their standard errors; docs/judging.md."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion.devices import to_float64
from diffusion.evaluation.once import once
from diffusion.metrics import STANDARD_ERROR

BLOCK_ROWS = 256  # rows of a pairwise table that are in memory at a time
JACKKNIFE_GROUPS = 10
MAX_UNDECISIVE = 2000  # rows of each set that metrics use which do not decide, to save time
_PROJECTIONS = 200
_NUM_LENGTHS = 5  # of the multi-scale kernel
_EXACT = "donot_use_mm_for_euclid_dist"  # mode of torch.cdist
_MAX_FOR_INTERACTION = 1000  # rows of each set that tell the interaction of a difference
_MAX_FOR_LENGTHS = 1000  # rows whose neighbours and pairs set the lengths of the multi-scale kernel


@dataclass(frozen=True)
class Estimate:
    """A distance and its standard error, which covers the randomness of both sets.

    If both sets have the same distribution, the error is up to 1.4 times too large, never too small.
    """

    value: float
    standard_error: float

    def sign(self, errors: float) -> int:
        """1, -1, or 0 if the value does not exceed so many standard errors or is not known."""
        if not abs(self.value) > errors * self.standard_error:
            return 0
        return 1 if self.value > 0.0 else -1


@dataclass(frozen=True)
class SampleMetric:
    """A comparison of samples with a reference. docs/extending.md tells how to add one.

    Attributes:
        compute: function from samples [n, ...] and reference examples [m, ...] to values by metric name,
            without the prefix `sample/`; a name that ends in `_se` is the standard error of another.
        data_kinds: kinds of data that it compares: "points" by their normalised coordinates, "image" as
            `images_as` says.
        images_as: "features" of `--metrics.features` [n, features], or "pixels" [n, C, H, W] in the 256
            levels of saved pictures, 0 to 255.
    """

    compute: Callable[[Tensor, Tensor], dict[str, float]]
    data_kinds: tuple[str, ...]
    images_as: Literal["features", "pixels"] = "features"


def energy_distance(x: Tensor, y: Tensor) -> Estimate:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, so it can fall slightly below 0.

    Args:
        x: [n, ...] with n >= 2; examples are flattened.
        y: [m, ...] with m >= 2.

    Source: Szekely and Rizzo, 2013, Eq. 2.1, estimated by U-statistics.
    """

    return _discrepancy(x, y, _minus_distance)


@dataclass(frozen=True, eq=False)
class MultiscaleKernel:
    """Mean of five Laplace kernels exp(-|x - y| / h), each divided by its own mean over a reference's pairs.

    The lengths h go geometrically from twice the reference's median distance to the nearest neighbour to its
    median pairwise distance, so that the kernel sees detail as well as the whole. A row's neighbour
    is the nearest row that differs from it, since tables have equal rows. Medians and means are those of
    the first 1,000 rows, with their distances to all.

    Attributes:
        lengths: float64 [5]; ascending, except in many dimensions.
        weights: float64 [5], a fifth of the inverse of each kernel's mean.

    Source: exponential kernels of several bandwidths, arXiv:2110.15073 (MMDAgg), Section 5.
    """

    lengths: Tensor
    weights: Tensor

    @classmethod
    def of(cls, reference: Tensor) -> "MultiscaleKernel":
        """Fit the kernel to a reference [m, ...] with m >= 2."""
        y = to_float64(reference).flatten(1)
        some = y[:_MAX_FOR_LENGTHS]
        # Without matrix products, whose rounding would give equal rows a distance.
        gaps = torch.cat([torch.cdist(block, y, compute_mode=_EXACT) for block in some.split(BLOCK_ROWS)])
        gaps.fill_diagonal_(torch.inf)
        shortest = 2.0 * gaps.where(gaps > 0.0, torch.inf).amin(1).median()
        # Rows that are nearly all equal have no other row, or a median distance of 0.
        shortest = torch.where(shortest.isfinite(), shortest, 1.0)
        longest = torch.nn.functional.pdist(some).median()
        longest = torch.where(longest > 0.0, longest, shortest)
        steps = torch.linspace(0.0, 1.0, _NUM_LENGTHS, dtype=y.dtype, device=y.device)
        lengths = shortest * (longest / shortest) ** steps
        sums = torch.stack([_laplace(gaps, length).sum() for length in lengths])
        return cls(lengths, len(some) * (len(y) - 1) / (_NUM_LENGTHS * sums))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The kernel's value for all pairs of rows of x [n, d] and y [m, d]: [n, m]."""
        distances = _distances(x, y)
        values = torch.zeros_like(distances)
        for length, weight in zip(self.lengths, self.weights, strict=True):
            values += float(weight) * _laplace(distances, length)
        return values


def kernel_distance(x: Tensor, y: Tensor, kernel: MultiscaleKernel | None = None) -> Estimate:
    """Squared maximum mean discrepancy with a multi-scale kernel, unbiased: it can fall slightly below 0.

    Each of the kernel's five parts counts in units of its mean over the reference y.

    Args:
        x: [n, ...] with n >= 2; examples are flattened.
        y: [m, ...] reference with m >= 2. The standard error takes the kernel that is fitted to it as given.
        kernel: the kernel; None fits it to y.

    Source: Gretton et al., 2012 (JMLR 13), Eq. 3, with the kernel of `MultiscaleKernel`.
    """
    return _discrepancy(x, y, kernel or fitted_kernel(y))


def fitted_kernel(reference: Tensor) -> MultiscaleKernel:
    """`MultiscaleKernel.of` a reference [m, ...], fitted once for as long as that tensor exists."""
    kernel: MultiscaleKernel = once(reference, MultiscaleKernel, lambda: MultiscaleKernel.of(reference))
    return kernel


def kernel_distance_difference(
    a: Tensor, b: Tensor, y: Tensor, kernel: MultiscaleKernel | None = None
) -> Estimate:
    """`kernel_distance` of a minus that of b, with the standard error of the difference.

    Args:
        a: samples [n, ...] of one model.
        b: samples [n, ...] of another; sample i of both comes from the same noise, or from independent one.
        y: [m, ...] the reference of both, whose pairs cancel.
        kernel: the kernel; None fits it to y.

    Raises:
        ValueError: the models have different numbers of samples.
    """
    if len(a) != len(b):
        raise ValueError(f"paired samples are equally many, not {len(a)} and {len(b)}")
    kernel = kernel or fitted_kernel(y)
    within = _difference([a, b], [a, b], [_within_once(each, kernel) for each in (a, b)], kernel)
    between = _difference([a, b], [y, y], [_between_once(each, y, kernel) for each in (a, b)], kernel)
    none = torch.zeros_like(between.column_means)
    return _from_pairs(within, between, _PairStatistics(none, none, 0.0, 0.0))


def kernel_inception_distance(x: Tensor, y: Tensor) -> Estimate:
    """Kernel Inception distance (KID), unbiased, so it can fall slightly below 0.

    The squared maximum mean discrepancy with the kernel (x . y / d + 1)^3.

    Args:
        x: [n, ...] features with n >= 2; examples are flattened.
        y: [m, ...] features with m >= 2.

    Source: arXiv:1801.01401, Section 3.
    """
    return _discrepancy(x, y, _cubic)


def frechet_distance(x: Tensor, y: Tensor) -> Estimate:
    """Squared Frechet distance between Gaussians fitted to two sets of features.

    |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2), with matrix roots by symmetric
    eigendecomposition. Finite sets bias it upward, so compare it at equal set sizes only. The standard
    error is a delete-a-group jackknife over each set; it is NaN if a set has fewer than 4 examples.

    Args:
        x: [n, ...] with n >= 2; examples are flattened to features.
        y: [m, ...] with m >= 2.

    Source: arXiv:1706.08500, Eq. 6.
    """
    both = [to_float64(features).flatten(1) for features in (x, y)]
    (moments_x, without_x), (moments_y, without_y) = (_moments(features) for features in both)
    variance = jackknife_variance([_frechet(partial, moments_y) for partial in without_x])
    variance += jackknife_variance([_frechet(moments_x, partial) for partial in without_y])
    return Estimate(_frechet(moments_x, moments_y), variance**0.5)


def sliced_wasserstein_distance(x: Tensor, y: Tensor, seed: int = 0) -> float:
    """Wasserstein-2 distance of the projections to random lines, root mean square over the lines.

    Source: Bonneel et al., 2015, as implemented by POT.
    """
    from ot.sliced import sliced_wasserstein_distance as distance

    arrays = (to_float64(each).flatten(1).cpu().numpy() for each in (x, y))
    return float(distance(*arrays, n_projections=_PROJECTIONS, seed=seed))


def by_name(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """Values and, under names that end in `_se`, standard errors."""
    values = {name: estimate.value for name, estimate in estimates.items()}
    return values | {name + STANDARD_ERROR: estimate.standard_error for name, estimate in estimates.items()}


KERNEL = SampleMetric(lambda x, y: by_name({"kernel": kernel_distance(x, y)}), ("points", "image"))
ENERGY = SampleMetric(
    lambda x, y: by_name({"energy": energy_distance(x[:MAX_UNDECISIVE], y[:MAX_UNDECISIVE])}), ("points",)
)
SLICED_WASSERSTEIN = SampleMetric(
    lambda x, y: {"sliced_wasserstein": sliced_wasserstein_distance(x[:MAX_UNDECISIVE], y[:MAX_UNDECISIVE])},
    ("points",),
)
KID = SampleMetric(lambda x, y: by_name({"kid": kernel_inception_distance(x, y)}), ("image",))
FRECHET = SampleMetric(lambda x, y: by_name({"frechet": frechet_distance(x, y)}), ("image",))


@dataclass(frozen=True)
class _PairStatistics:
    """Means of a kernel k(x, y) over all pairs of two sets, and its interaction variance.

    Attributes:
        row_means: mean over y for each x.
        column_means: mean over x for each y.
        mean: mean over all pairs.
        interaction: variance of k(x, y) - E k(x, .) - E k(., y) + E k, which the means leave unexplained.
    """

    row_means: Tensor
    column_means: Tensor
    mean: float
    interaction: float


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances of all pairs of rows, float32 [n, m], computed in float64."""
    return torch.cdist(x, y).float()


def _laplace(distances: Tensor, length: Tensor) -> Tensor:
    return torch.exp(distances * (-1.0 / float(length)))


def _minus_distance(x: Tensor, y: Tensor) -> Tensor:
    # Without matrix products, whose rounding would give an example a distance to itself.
    return -torch.cdist(x, y, compute_mode=_EXACT)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _discrepancy(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Estimate:
    """E k(X, X') + E k(Y, Y') - 2 E k(X, Y), estimated by U-statistics."""
    return _from_pairs(_within_once(x, kernel), _between_once(x, y, kernel), _within_once(y, kernel))


def _from_pairs(xx: _PairStatistics, xy: _PairStatistics, yy: _PairStatistics) -> Estimate:
    """Mean of xx plus mean of yy minus twice the mean of xy, and its standard error.

    The variance is Hoeffding's decomposition: first-order terms, which vanish if both sets have the same
    distribution, and second-order terms, which then remain. Source: Serfling, 1980, Section 5.2.1.
    """
    n, m = len(xx.row_means), len(yy.row_means)
    first_x = float((xx.row_means - xy.row_means).var()) - xx.interaction / (n - 1) - xy.interaction / m
    first_y = float((yy.row_means - xy.column_means).var()) - yy.interaction / (m - 1) - xy.interaction / n
    variance = (
        4.0 * max(first_x, 0.0) / n
        + 4.0 * max(first_y, 0.0) / m
        + 2.0 * xx.interaction / (n * (n - 1))
        + 2.0 * yy.interaction / (m * (m - 1))
        + 4.0 * xy.interaction / (n * m)
    )
    return Estimate(xx.mean + yy.mean - 2.0 * xy.mean, variance**0.5)


def _within_once(x: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> _PairStatistics:
    """`_within` for examples [n, ...], once for the same tensor."""
    found: _PairStatistics = once(x, (_within, kernel), lambda: _within(to_float64(x).flatten(1), kernel))
    return found


def _between_once(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> _PairStatistics:
    """`_between` for examples [n, ...] and [m, ...], once for the same tensors."""

    def compute() -> _PairStatistics:
        return _between(to_float64(x).flatten(1), to_float64(y).flatten(1), kernel)

    found: _PairStatistics = once(x, (_between, kernel), compute, other=y)
    return found


def _difference(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    statistics: Sequence[_PairStatistics],
    kernel: Callable[[Tensor, Tensor], Tensor],
) -> _PairStatistics:
    """Statistics of k(x[0], y[0]) - k(x[1], y[1]), given those of the two.

    Their interactions do not give that of the difference. It is that of the first 1,000 rows, so that the
    pairs of a model are needed once instead of once for each other model.
    """
    first, second = statistics
    rows, columns = first.row_means - second.row_means, first.column_means - second.column_means
    mean = first.mean - second.mean
    size = _MAX_FOR_INTERACTION
    some = [[to_float64(each[:size]).flatten(1) for each in pair] for pair in (x, y)]
    values = (kernel(some[0][0], some[1][0]) - kernel(some[0][1], some[1][1])).to(rows.dtype)
    left = values - rows[:size, None] - columns[None, :size] + mean
    count = left.numel()
    if x[0] is y[0]:
        left.fill_diagonal_(0.0)  # of an example with itself
        count -= len(left)
    return _PairStatistics(rows, columns, mean, float(left.square().sum()) / count)


def _between(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> _PairStatistics:
    """Statistics of the kernel over all pairs of two sets."""
    row_sums, column_sums, square_sum = [], torch.zeros(len(y), dtype=x.dtype, device=x.device), 0.0
    for block in x.split(BLOCK_ROWS):
        values = kernel(block, y)
        row_sums.append(values.sum(1, dtype=x.dtype))
        column_sums += values.sum(0, dtype=x.dtype)
        square_sum += float(values.square().sum(dtype=x.dtype))
    mean_square = square_sum / (len(x) * len(y))
    return _pair_statistics(torch.cat(row_sums) / len(y), column_sums / len(x), mean_square)


def _within(x: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> _PairStatistics:
    """Statistics of a symmetric kernel over all pairs of different examples of one set."""
    sums, square_sum = torch.zeros(len(x), dtype=x.dtype, device=x.device), 0.0
    for start in range(0, len(x), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(x))
        values = kernel(x[start:stop], x[start:])
        values.diagonal().zero_()
        later = values[:, stop - start :]  # these pairs stand for those in the other order, too
        sums[start:stop] += values.sum(1, dtype=x.dtype)
        sums[stop:] += later.sum(0, dtype=x.dtype)
        square_sum += float(values.square().sum(dtype=x.dtype) + later.square().sum(dtype=x.dtype))
    means = sums / (len(x) - 1)
    return _pair_statistics(means, means, square_sum / (len(x) * (len(x) - 1)))


def _pair_statistics(row_means: Tensor, column_means: Tensor, mean_square: float) -> _PairStatistics:
    mean = float(row_means.mean())
    explained = float(row_means.square().mean() + column_means.square().mean()) - mean**2
    return _PairStatistics(row_means, column_means, mean, max(mean_square - explained, 0.0))


def _moments(features: Tensor) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    """Mean and covariance of all rows, and of the rows left when each jackknife group is removed."""
    centre = features.mean(dim=0)
    num_groups = min(JACKKNIFE_GROUPS, len(features) // 2)
    groups = [features[i::num_groups] - centre for i in range(num_groups)] if num_groups > 1 else []
    group_sums = [(len(group), group.sum(dim=0), group.T @ group) for group in groups]
    centred = features - centre
    count, total, outer = len(centred), centred.sum(dim=0), centred.T @ centred

    def mean_and_covariance(n: int, sums: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        covariance = (products - torch.outer(sums, sums) / n) / (n - 1)
        return centre + sums / n, covariance

    without = [mean_and_covariance(count - n, total - s, outer - p) for n, s, p in group_sums]
    return mean_and_covariance(count, total, outer), without


def _frechet(moments_x: tuple[Tensor, Tensor], moments_y: tuple[Tensor, Tensor]) -> float:
    (mean_x, covariance_x), (mean_y, covariance_y) = moments_x, moments_y
    values, vectors = torch.linalg.eigh(covariance_x)
    root_x = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_x @ covariance_y @ root_x).clamp(min=0.0).sqrt().sum()
    shift = (mean_x - mean_y).square().sum()
    return float(shift + covariance_x.trace() + covariance_y.trace() - 2.0 * cross)


def jackknife_variance(estimates: list[float]) -> float:
    """Variance of an estimate, from its values with each group removed; NaN without any."""
    if not estimates:
        return float("nan")
    values = torch.tensor(estimates, dtype=torch.float64)
    return float((len(estimates) - 1) * values.var(correction=0))
