"""Whether a model copies its training examples: an exact test, and what it could have found.

A copy is a sample that is less than a third as far from the nearest training example as from the next
nearest. By chance some new examples of the data are, too, in few dimensions or where the data are nearly
repeated, so samples are compared with held-out examples.
"""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusion.evaluation.neighbours import nearest_distances
from diffusion.metrics import (
    COPIED,
    COPIED_DETECTABLE,
    COPIED_P,
    FLOOR,
    NN_HELDOUT,
    NN_SE,
    NN_TRAIN,
    SAMPLE_PREFIX,
)

CopyingVerdict = Literal["copies", "no sign", "too little data"]

# Limits on the ratio of the distances to the nearest and to the next training example. The first one defines
# a copy; exact copies are found by the others where chance brings many examples below the first.
_RATIOS = (1 / 3, 1 / 10, 1 / 30, 1 / 100)
_SIGNIFICANCE = 0.001  # a sweep judges many trials
_MIN_EXCESS = 0.01  # fewer copies do not make a model that copies
_MAX_DETECTABLE = 0.1  # with a test that overlooks more, nothing is said
_QUANTILE = 0.8416  # of the normal distribution: power of 80%


def copying_metrics(samples: Tensor, train: Tensor, held_out: Tensor) -> dict[str, float]:
    """Metrics that tell whether samples are copies of training examples.

    `copied` is the fraction of samples that are copies, and `copied_floor` that of held-out examples, which
    cannot be. `copied_p` is the p-value of Fisher's exact test, one-sided, that samples are as often this
    close to training examples as held-out ones are; also at a tenth, a 30th and a 100th of the distance in
    place of a third, the smallest of the four times four (Bonferroni). `copied_detectable` is its power: the
    smallest fraction of copies at a third that it would find with a probability of 80%; 1 if there is none.

    `nn_train` and `nn_heldout` are the mean distances of the samples to the nearest of equally many training
    and held-out examples, as root mean square over dimensions; without copying they differ only by chance.
    `nn_se`, the standard error of their difference, covers the randomness of the samples only and is too
    small if they outnumber the examples.

    Examples that the training data repeat have no next nearest example farther away, so a sample at one of
    them is no copy.

    Args:
        samples: [n, *shape].
        train: [N, *shape] training examples.
        held_out: [m, *shape] examples that the model was not trained on.

    Returns:
        The metrics by name; none with fewer than two training or held-out examples.

    Source: arXiv:2310.02664, Section 2, for the factor of a third.
    """
    if min(len(train), len(held_out)) < 2:
        return {}
    count = min(len(train), len(held_out))
    scale = math.sqrt(math.prod(samples.shape[1:]))
    to_train = nearest_distances(samples, train[:count], 1)[:, 0] / scale
    to_held_out = nearest_distances(samples, held_out[:count], 1)[:, 0] / scale
    of_samples, of_held_out = _close_counts(samples, train), _close_counts(held_out, train)
    n, m = len(samples), len(held_out)
    p_values = [_p_value(x, y, n, m) for x, y in zip(of_samples, of_held_out, strict=True)]
    return {
        NN_TRAIN: float(to_train.mean()),
        NN_HELDOUT: float(to_held_out.mean()),
        NN_SE: float((to_train - to_held_out).std() / math.sqrt(n)),
        COPIED: of_samples[0] / n,
        COPIED + FLOOR: of_held_out[0] / m,
        COPIED_P: min(1.0, len(_RATIOS) * min(p_values)),
        COPIED_DETECTABLE: _detectable(of_held_out[0] / m, n, m),
    }


def copying_verdict(metrics: Mapping[str, float], prefix: str = SAMPLE_PREFIX) -> CopyingVerdict:
    """The verdict on a model's metrics.

    "copies": the test rejects at 0.1%, and at least 1% of the samples are copies beyond the floor. "no sign":
    it does not, and would have found a tenth of copies. "too little data": it would not, or there are no
    metrics of copying, which earlier versions did not have.

    Args:
        metrics: metrics by name, with those of `copying_metrics`.
        prefix: prefix of their names.
    """
    copied, floor, p_value, detectable = (
        metrics.get(prefix + name, math.nan) for name in (COPIED, COPIED + FLOOR, COPIED_P, COPIED_DETECTABLE)
    )
    if p_value <= _SIGNIFICANCE and copied - floor >= _MIN_EXCESS:
        return "copies"
    return "no sign" if detectable <= _MAX_DETECTABLE else "too little data"


def _close_counts(x: Tensor, train: Tensor) -> list[int]:
    """Number of rows of x whose distances to the nearest and next training example are below each ratio."""
    first, second = nearest_distances(x, train, 2).unbind(1)
    return [int((first < ratio * second).sum()) for ratio in _RATIOS]


def _p_value(x: int, y: int, n: int, m: int) -> float:
    """Fisher's exact test: probability that of x + y close ones x or more are samples, if n of n + m are."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(x - 1, n + m, x + y, n))


def _detectable(floor: float, n: int, m: int) -> float:
    """Smallest fraction of copies that the test at a third finds with a probability of 80%; 1 if none.

    Args:
        floor: fraction of held-out examples that are as close as copies.
        n: number of samples.
        m: number of held-out examples.
    """
    from scipy.stats import hypergeom

    fractions: NDArray[np.float64] = np.arange(1, 201) / 200.0
    close = fractions + (1.0 - fractions) * floor
    # One quantile of the binomial below its mean.
    x = np.floor(n * close - _QUANTILE * np.sqrt(n * close * (1.0 - close)))
    y = np.ceil(m * floor)
    p_values = hypergeom.sf(x - 1, n + m, x + y, n)
    found = len(_RATIOS) * p_values <= _SIGNIFICANCE
    return float(fractions[found][0]) if found.any() else 1.0
