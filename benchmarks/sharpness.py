"""How close samples of the heart are to its curve."""

import numpy as np
from numpy.typing import NDArray

MEAN_DISTANCE = "mean distance"
NUM_SAMPLES = 2000
_CURVE = 20_000  # points, 0.002 apart at most


def mean_distance(samples: NDArray[np.floating]) -> float:
    """Mean distance of points [samples, 2], in data units, to the outline of the heart."""
    # Not before: the start of the processes that import this counts.
    from scipy.spatial import KDTree

    from diffusion.data.named import heart_curve

    curve = [heart_curve(u) for u in np.linspace(0.0, 2.0 * np.pi, _CURVE).tolist()]
    return float(KDTree(np.array(curve) / 5.0).query(samples)[0].mean())
