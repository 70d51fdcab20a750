"""Noise schedules in numpy float64: betas and everything that follows from them.

Names are those of DDPM (arXiv:2006.11239), Section 2. A timestep is 0-based: t = 0 is one noising
step, so `alphas_cumprod[t]` is the paper's alpha-bar of step t + 1.
"""

from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion.betas import (
    Float64Array,
    constant_betas,
    cosine_betas,
    linear_betas,
    quadratic_betas,
    scaled_linear_betas,
    sigmoid_betas,
)

__all__ = [
    "Float64Array",
    "NoiseSchedule",
    "Spacing",
    "constant_betas",
    "cosine_betas",
    "linear_betas",
    "quadratic_betas",
    "respaced_timesteps",
    "scaled_linear_betas",
    "sigmoid_betas",
    "zero_terminal_snr",
]

Spacing = Literal["leading", "trailing", "linspace", "logsnr"]


def zero_terminal_snr(betas: ArrayLike) -> Float64Array:
    """Betas changed so that the last timestep is pure noise, and the first as it was.

    sqrt(alphas_cumprod) is shifted to end at 0 and scaled to start where it did. The last beta
    becomes 1, where epsilon no longer determines x_0: only networks that predict x_0 or v can use it.

    Args:
        betas: [T], T at least 2, each in (0, 1].

    Returns:
        float64 [T], the last of them 1.

    Raises:
        ValueError: what `NoiseSchedule` refuses, T < 2, or alphas_cumprod that is not smallest at the
            last timestep alone.

    Source: arXiv:2305.08891, Algorithm 1.
    """
    schedule = NoiseSchedule(betas)
    root = np.sqrt(schedule.alphas_cumprod)
    shifted = root - root[-1]
    if schedule.num_train_timesteps < 2 or not np.all(shifted[:-1] > 0.0):
        raise ValueError(
            f"alphas_cumprod goes from {schedule.alphas_cumprod[0]} to {schedule.alphas_cumprod[-1]} in "
            f"{len(root)} timesteps: it must be smallest at the last one alone, so give two betas or more, "
            "none of them lost in float64 and none but the last equal to 1"
        )
    scaled = shifted * (root[0] / shifted[0])
    return np.append(schedule.betas[0], 1.0 - (scaled[1:] / scaled[:-1]) ** 2)


class NoiseSchedule:
    """Betas and the quantities derived from them, each float64 [T] and read-only.

    Args:
        betas: [T] variances of the forward steps, every one in (0, 1].

    Raises:
        ValueError: not one-dimensional, empty, or a beta outside (0, 1] or not finite.

    Source: DDPM, arXiv:2006.11239, Eqs. 2 to 7.
    """

    def __init__(self, betas: ArrayLike) -> None:
        self.betas = np.array(betas, dtype=np.float64)
        if self.betas.ndim != 1 or self.betas.size == 0:
            raise ValueError(f"betas have shape {self.betas.shape}: need one dimension, at least 1 long")
        if not np.all((self.betas > 0.0) & (self.betas <= 1.0)):
            raise ValueError(
                f"betas reach from {self.betas.min()} to {self.betas.max()}: each must be in (0, 1]"
            )
        self.betas.flags.writeable = False

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noising steps."""
        return self.betas.size

    @cached_property
    def alphas(self) -> Float64Array:
        """1 - betas."""
        return _frozen(1.0 - self.betas)

    @cached_property
    def alphas_cumprod(self) -> Float64Array:
        """Cumulative product of alphas: the signal's share of x_t's variance (alpha-bar, Eq. 4).

        Seed 004 writes the product's index as T; it runs over the steps up to t.
        """
        return _frozen(np.cumprod(self.alphas))

    @cached_property
    def alphas_cumprod_prev(self) -> Float64Array:
        """alphas_cumprod one step earlier; 1 at t = 0, where nothing has been noised."""
        return _frozen(np.concatenate(([1.0], self.alphas_cumprod[:-1])))

    @cached_property
    def log_snr(self) -> Float64Array:
        """log(alphas_cumprod / (1 - alphas_cumprod)), falling with t; -inf where alphas_cumprod is 0."""
        with np.errstate(divide="ignore"):
            log_alphas_cumprod = np.cumsum(np.log1p(-self.betas))
        return _frozen(log_alphas_cumprod - np.log(-np.expm1(log_alphas_cumprod)))

    @cached_property
    def posterior_variance(self) -> Float64Array:
        """beta-tilde, the variance of q(x_{t-1} | x_t, x_0); 0 at t = 0 (Eq. 7)."""
        return _frozen(self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod))

    @cached_property
    def posterior_mean_coef1(self) -> Float64Array:
        """Factor of x_0 in the mean of q(x_{t-1} | x_t, x_0) (Eq. 7)."""
        return _frozen(self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod))

    @cached_property
    def posterior_mean_coef2(self) -> Float64Array:
        """Factor of x_t in the mean of q(x_{t-1} | x_t, x_0) (Eq. 7)."""
        remaining = 1.0 - self.alphas_cumprod_prev
        return _frozen(np.sqrt(self.alphas) * remaining / (1.0 - self.alphas_cumprod))


def respaced_timesteps(
    schedule: NoiseSchedule, num_inference_steps: int, spacing: Spacing = "trailing"
) -> NDArray[np.int64]:
    """The timesteps that a sampler with fewer steps visits.

    Args:
        schedule: T timesteps.
        num_inference_steps: S, from 1 to T. S = T gives every timestep, whatever the spacing.
        spacing: "leading" counts up from t = 0 in whole strides, "trailing" counts down from
            t = T - 1, "linspace" holds both ends, "logsnr" goes evenly in log-SNR between both ends.

    Returns:
        int64 [S], strictly falling (noisy first).

    Raises:
        ValueError: S outside 1..T, or an unknown spacing.

    Source: arXiv:2305.08891, Table 2, for the first three; DPM-Solver, arXiv:2206.00927,
    Section 3.4, for even steps in log-SNR.
    """
    total = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise ValueError(
            f"num_inference_steps {num_inference_steps}: the schedule has {total} timesteps, "
            f"so choose from 1 to {total}"
        )
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing {spacing!r}: choose one of {', '.join(get_args(Spacing))}")
    steps = np.arange(num_inference_steps)
    if spacing == "leading":
        rising = steps * (total // num_inference_steps)
    elif spacing == "trailing":
        rising = np.round(total - steps[::-1] * (total / num_inference_steps)).astype(np.int64) - 1
    elif num_inference_steps == 1:
        rising = np.array([total - 1])
    elif spacing == "linspace":
        rising = np.round(np.linspace(0, total - 1, num_inference_steps)).astype(np.int64)
    else:
        rising = _evenly_in_log_snr(schedule, num_inference_steps)
    return rising[::-1].astype(np.int64)


def _evenly_in_log_snr(schedule: NoiseSchedule, num_steps: int) -> NDArray[np.int64]:
    falling = np.maximum(schedule.log_snr, -1000.0)  # nothing is even about a step to -inf
    targets = np.linspace(falling[0], falling[-1], num_steps)
    timesteps = np.abs(falling[None, :] - targets[:, None]).argmin(axis=1)
    # Where the schedule is coarser than the targets several fall on one timestep: move them apart.
    index = np.arange(num_steps)
    timesteps = np.maximum.accumulate(timesteps - index) + index
    return np.minimum(timesteps, falling.size - num_steps + index)


def _frozen(values: NDArray[Any]) -> Float64Array:
    values.flags.writeable = False
    return values
