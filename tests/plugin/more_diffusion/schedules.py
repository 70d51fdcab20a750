"""A noise schedule."""

import numpy as np
from numpy.typing import NDArray

from diffusion.process.schedules import BetaSchedule


def geometric_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> NDArray[np.float64]:
    """Betas whose logarithms grow linearly."""
    return np.geomspace(beta_start, beta_end, num_train_timesteps)


GEOMETRIC = BetaSchedule(geometric_betas, ("beta_start", "beta_end"))
