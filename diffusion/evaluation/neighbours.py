"""Comparisons of samples with a reference by nearest neighbours: precision, recall and KL divergence."""

import math

import torch
from torch import Tensor

from diffusion.devices import to_float64
from diffusion.evaluation.distances import (
    BLOCK_ROWS,
    JACKKNIFE_GROUPS,
    MAX_UNDECISIVE,
    Estimate,
    SampleMetric,
    by_name,
    jackknife_variance,
)

# Equal rows, as tables have them, count as this far apart, in units of the reference's median distance to
# the k-th neighbour: without it, a repeated row would make the divergence infinite.
_SMALLEST_RATIO = 1e-3
# Further neighbours, which take the place of those in a removed group of the jackknife, about a tenth.
_RESERVE = 10


def nearest_distances(x: Tensor, y: Tensor, count: int) -> Tensor:
    """Distances from each row of x to its `count` nearest rows of y, ascending: [n, count]."""
    return _nearest(to_float64(x).flatten(1), to_float64(y).flatten(1), count)[0]


def precision_and_recall(samples: Tensor, data: Tensor, neighbours: int = 3) -> tuple[Estimate, Estimate]:
    """Fraction of the samples that the data cover, and fraction of the data that the samples cover.

    A set covers the balls around its members; each ball's radius is the distance from the member to its
    `neighbours`-th nearest neighbour in the set. Only the first 2,000 examples of each set are used. The
    standard errors are a delete-a-group jackknife over each set, up to twice too large; they are NaN if a
    set has fewer than 4 examples.

    Args:
        samples: [n, ...]; if n <= `neighbours`, the farthest neighbour sets the radius.
        data: [m, ...], likewise.
        neighbours: k of the k-th nearest neighbour.

    Source: arXiv:1904.06991, Eq. 1 and 2.
    """
    x, y = (to_float64(each[:MAX_UNDECISIVE]).flatten(1) for each in (samples, data))
    return _fraction_covered(x, y, neighbours), _fraction_covered(y, x, neighbours)


def neighbour_kl(x: Tensor, y: Tensor, neighbours: int = 5) -> Estimate:
    """Jeffreys divergence KL(p_x | p_y) + KL(p_y | p_x) in nats, from distances to k-th neighbours.

    Each term of KL(p_x | p_y) is d log(nu_k(i) / rho_k(i)) + log(m / (n - 1)): rho_k(i) is the distance
    from x_i to its k-th nearest neighbour among the other rows of x, nu_k(i) that among the rows of y.
    Distances have a lower limit of a thousandth of the median rho_k in y, so that repeated rows count as
    very close. Only the first 2,000 examples of each set are used. The standard error is a delete-a-group
    jackknife over each set, up to 1.6 times too large in few dimensions; it is NaN if a set has
    fewer than 4 `neighbours` examples, and so is the value with `neighbours` examples or fewer.

    Args:
        x: [n, ...]; examples are flattened.
        y: [m, ...] reference, which sets the limit.
        neighbours: k.

    Source: Wang, Kulkarni and Verdu, 2009 (IEEE Trans. Inf. Theory 55), Eq. 14.
    """
    x, y = (to_float64(each[:MAX_UNDECISIVE]).flatten(1) for each in (x, y))
    if min(len(x), len(y)) <= neighbours:
        return Estimate(math.nan, math.nan)
    radii = nearest_distances(y, y, neighbours + 1)[:, -1]
    # Where most rows are repeated, rows that are not set the limit, or else the spread of all.
    typical = radii.median() or radii[radii > 0.0].nanmedian().nan_to_num() or y.std(dim=0).norm()
    smallest = max(_SMALLEST_RATIO * float(typical), 1e-300)
    one, other = (_Divergence(p, q, neighbours, smallest) for p, q in ((x, y), (y, x)))
    value = one.value() + other.value()
    variance = jackknife_variance(
        [one.value(gone_p=gone) + other.value(gone_q=gone) for gone in _groups(x, 2 * neighbours)]
    )
    variance += jackknife_variance(
        [one.value(gone_q=gone) + other.value(gone_p=gone) for gone in _groups(y, 2 * neighbours)]
    )
    return Estimate(value, variance**0.5)


class _Divergence:
    """KL(p | q) by k-th neighbours, of all rows or without some."""

    def __init__(self, p: Tensor, q: Tensor, neighbours: int, smallest: float) -> None:
        self._k, self._smallest, self._dim = neighbours, smallest, p.shape[1]
        # A row's nearest neighbour in its own set is itself.
        self._in_p = _nearest(p, p, min(neighbours + 1 + _RESERVE, len(p)))
        self._in_q = _nearest(p, q, min(neighbours + _RESERVE, len(q)))
        self._all_p, self._all_q = (
            torch.zeros(len(each), dtype=torch.bool, device=p.device) for each in (p, q)
        )

    def value(self, gone_p: Tensor | None = None, gone_q: Tensor | None = None) -> float:
        """The divergence without the rows of two masks."""
        gone_p, gone_q = self._all_p if gone_p is None else gone_p, self._all_q if gone_q is None else gone_q
        logs = []
        for (distances, indices), gone, skip in ((self._in_p, gone_p, 1), (self._in_q, gone_q, 0)):
            radii = _without(distances, gone[indices], skip)[~gone_p, self._k - 1 + skip]
            logs.append(float(radii.clamp(min=self._smallest).log().mean()))
        n, m = int((~gone_p).sum()), int((~gone_q).sum())
        return self._dim * (logs[1] - logs[0]) + math.log(m / (n - 1))


def _fraction_covered(points: Tensor, centres: Tensor, neighbours: int) -> Estimate:
    """Fraction of the points that lie within the balls around the centres."""
    # One more than `neighbours`, since a point's nearest neighbour in its own set is itself.
    count = min(neighbours + 1, len(centres))
    distances, indices = _nearest(centres, centres, min(count + _RESERVE, len(centres)))
    radii = [distances[:, count - 1]]
    groups = _groups(centres, 2)
    for gone in groups:
        without = _without(distances, gone[indices], skip=1)[:, count - 1]
        radii.append(torch.where(gone, -1.0, without))  # a removed centre covers nothing
    blocks = [torch.cdist(block, centres) for block in points.split(BLOCK_ROWS)]
    covered = torch.stack([torch.cat([(block <= r).any(1) for block in blocks]) for r in radii]).double()
    variance = jackknife_variance(covered[1:].mean(1).tolist())
    variance += jackknife_variance([float(covered[0, ~gone].mean()) for gone in _groups(points, 2)])
    return Estimate(float(covered[0].mean()), variance**0.5)


def _groups(x: Tensor, smallest: int) -> list[Tensor]:
    """The jackknife's groups of at least `smallest` rows, as masks [n]; empty if there would be one only."""
    num_groups = min(JACKKNIFE_GROUPS, len(x) // smallest)
    index = torch.arange(len(x), device=x.device) % max(num_groups, 1)
    return [index == group for group in range(num_groups)] if num_groups > 1 else []


def _without(distances: Tensor, gone: Tensor, skip: int) -> Tensor:
    """Ascending distances [n, count] with those of removed rows moved to the end.

    Args:
        distances: [n, count].
        gone: which of them are to removed rows, [n, count].
        skip: number of leading columns that stay, such as a row's distance to itself.
    """
    gone = gone.clone()
    gone[:, :skip] = False
    return distances.gather(1, gone.to(torch.int8).argsort(dim=1, stable=True))


def _nearest(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances and indices of the `count` nearest rows of y for each row of x, ascending: [n, count]."""
    found = [torch.cdist(block, y).topk(count, largest=False) for block in x.split(BLOCK_ROWS)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


PRECISION_RECALL = SampleMetric(
    lambda x, y: by_name(dict(zip(("precision", "recall"), precision_and_recall(x, y), strict=True))),
    ("points",),
)
NEIGHBOUR_KL = SampleMetric(lambda x, y: by_name({"neighbour_kl": neighbour_kl(x, y)}), ("points",))
