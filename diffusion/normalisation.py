"""Between data units and the network's units, in numpy: data = x * std + mean."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def denormalise(
    x: ArrayLike, mean: Sequence[Any], std: Sequence[Any], value_range: Sequence[float] | None
) -> NDArray[np.float64]:
    """Normalised values to data units.

    Args:
        x: [batch, *shape] normalised.
        mean, std: nested lists that broadcast against shape.
        value_range: smallest and largest possible value in data units, to which the result is
            clipped, or None.

    Returns:
        float64 [batch, *shape].
    """
    data = np.asarray(x, dtype=np.float64) * np.array(std) + np.array(mean)
    return data if value_range is None else data.clip(*value_range)
