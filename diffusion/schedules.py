"""Noise schedules in numpy float64: betas and everything that follows from them.

Names are those of DDPM (arXiv:2006.11239), Section 2. A timestep is 0-based: t = 0 is one noising
step, so `alphas_cumprod[t]` is the paper's alpha-bar of step t + 1.
"""

from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64Array = NDArray[np.float64]
Spacing = Literal["leading", "trailing", "linspace", "logsnr"]


def linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Betas that grow linearly from `beta_start` to `beta_end`.

    Args:
        num_train_timesteps: T, at least 1. With T = 1 the only beta is `beta_start`.
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in [beta_start, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or betas that are not 0 < beta_start <= beta_end < 1.

    Source: DDPM, arXiv:2006.11239, Section 4 (1e-4 to 0.02 over T = 1000).
    """
    _check_beta_range(num_train_timesteps, beta_start, beta_end)
    return np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)


def scaled_linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Betas whose square roots grow linearly, so that they rise more slowly at first than linear ones.

    Args:
        num_train_timesteps: T, at least 1. With T = 1 the only beta is `beta_start`.
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in [beta_start, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or betas that are not 0 < beta_start <= beta_end < 1.

    Source: latent diffusion, arXiv:2112.10752, whose code names it "linear"; "scaled_linear" in
    diffusers. Stable Diffusion goes from 0.00085 to 0.012 over T = 1000.
    """
    _check_beta_range(num_train_timesteps, beta_start, beta_end)
    return np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), num_train_timesteps, dtype=np.float64) ** 2


def quadratic_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Another name of `scaled_linear_betas`, with its arguments, result and errors.

    The code of DDIM calls linspace(beta_start^0.5, beta_end^0.5, T)^2 "quad": a quadratic in t, and the
    same formula that Stable Diffusion made known as "scaled linear".

    Source: DDIM, arXiv:2010.02502 (its code).
    """
    return scaled_linear_betas(num_train_timesteps, beta_start, beta_end)


def sigmoid_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Betas that rise from `beta_start` to `beta_end` as a logistic curve over [-6, 6].

    Args:
        num_train_timesteps: T, at least 1.
        beta_start: lower end, in (0, 1). The first beta lies sigmoid(-6) = 0.25% of the way above it.
        beta_end: upper end, in [beta_start, 1). The last beta lies as far below it, for T of 2 or more.

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or betas that are not 0 < beta_start <= beta_end < 1.

    Source: GeoDiff, arXiv:2203.02923 (its code).
    """
    _check_beta_range(num_train_timesteps, beta_start, beta_end)
    share = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_train_timesteps, dtype=np.float64)))
    return share * (beta_end - beta_start) + beta_start


def constant_betas(num_train_timesteps: int, terminal_noise: float = 0.9999) -> Float64Array:
    """One beta for every step, so that alphas_cumprod ends at 1 - `terminal_noise`.

    Every beta is 1 - (1 - terminal_noise)^(1/T). Seed 003 prints this formula with a "small constant"
    beta_min in terminal_noise's place and says that q(x_T) then comes close to a uniform
    distribution. Neither can be: the product of T factors (1 - beta_min)^(1/T) is 1 - beta_min
    whatever T is, so a small constant leaves x_T almost free of noise, and the limit of the forward
    process is Gaussian, N(0, I) (DDPM, Section 2). The constant must be close to 1.

    Args:
        num_train_timesteps: T, at least 1.
        terminal_noise: 1 - alphas_cumprod of the last timestep, in (0, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or terminal_noise outside (0, 1).

    Source: seed 003, Section 3.1, with the constant that it needs.
    """
    _check_num_train_timesteps(num_train_timesteps)
    if not 0.0 < terminal_noise < 1.0:
        raise ValueError(f"terminal_noise {terminal_noise}: need 0 < terminal_noise < 1")
    return np.full(num_train_timesteps, -np.expm1(np.log1p(-terminal_noise) / num_train_timesteps))


def cosine_betas(num_train_timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Float64Array:
    """Betas whose alphas_cumprod follows a squared cosine.

    Args:
        num_train_timesteps: T, at least 1.
        s: offset that keeps the first betas from being tiny, at least 0.
        max_beta: upper limit of every beta, in (0, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, s < 0 or max_beta outside (0, 1).

    Source: Improved DDPM, arXiv:2102.09672, Eq. 17.
    """
    _check_num_train_timesteps(num_train_timesteps)
    if s < 0.0 or not 0.0 < max_beta < 1.0:
        raise ValueError(f"s {s} and max_beta {max_beta}: need s >= 0 and 0 < max_beta < 1")
    u = np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
    alpha_bar = np.cos((u + s) / (1.0 + s) * np.pi / 2.0) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


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
        """Cumulative product of alphas: the signal's share of x_t's variance (alpha-bar, Eq. 4)."""
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


def _check_num_train_timesteps(num_train_timesteps: int) -> None:
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps {num_train_timesteps}: need at least 1")


def _check_beta_range(num_train_timesteps: int, beta_start: float, beta_end: float) -> None:
    _check_num_train_timesteps(num_train_timesteps)
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(
            f"beta_start {beta_start} and beta_end {beta_end}: need 0 < beta_start <= beta_end < 1"
        )


def _frozen(values: NDArray[Any]) -> Float64Array:
    values.flags.writeable = False
    return values
