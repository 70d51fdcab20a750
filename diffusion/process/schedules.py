"""Noise schedules in numpy float64: betas and the quantities derived from them.

Names are those of DDPM (arXiv:2006.11239), Section 2. Timesteps are 0-based: t = 0 is one noising
step, so `alphas_cumprod[t]` is the paper's alpha-bar of step t + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64Array = NDArray[np.float64]


def linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Betas that grow linearly from `beta_start` to `beta_end`.

    Args:
        num_train_timesteps: T, at least 1. If T = 1, the only beta is `beta_start`.
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in [beta_start, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or not 0 < beta_start <= beta_end < 1.

    Source: DDPM, arXiv:2006.11239, Section 4 (1e-4 to 0.02 over T = 1000).
    """
    _check_beta_range(num_train_timesteps, beta_start, beta_end)
    return np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)


def scaled_linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Betas whose square roots grow linearly, so that they grow more slowly at first than linear ones.

    Args:
        num_train_timesteps: T, at least 1. If T = 1, the only beta is `beta_start`.
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in [beta_start, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or not 0 < beta_start <= beta_end < 1.

    Source: latent diffusion, arXiv:2112.10752, whose code calls it "linear"; diffusers calls it
    "scaled_linear". Stable Diffusion goes from 0.00085 to 0.012 over T = 1000.
    """
    _check_beta_range(num_train_timesteps, beta_start, beta_end)
    return np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), num_train_timesteps, dtype=np.float64) ** 2


def quadratic_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Alias of `scaled_linear_betas`, with the same arguments, result and errors.

    DDIM's code calls linspace(beta_start^0.5, beta_end^0.5, T)^2 "quad", because it is quadratic in t.
    Stable Diffusion made the same formula known as "scaled linear".

    Source: DDIM, arXiv:2010.02502 (its code).
    """
    return scaled_linear_betas(num_train_timesteps, beta_start, beta_end)


def sigmoid_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Betas that grow from `beta_start` to `beta_end` along a logistic curve over [-6, 6].

    Args:
        num_train_timesteps: T, at least 1.
        beta_start: lower end, in (0, 1). The first beta is above it by sigmoid(-6) = 0.25% of the range.
        beta_end: upper end, in [beta_start, 1). The last beta is below it by as much, if T is at least 2.

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or not 0 < beta_start <= beta_end < 1.

    Source: GeoDiff, arXiv:2203.02923 (its code).
    """
    _check_beta_range(num_train_timesteps, beta_start, beta_end)
    fraction = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_train_timesteps, dtype=np.float64)))
    return fraction * (beta_end - beta_start) + beta_start


def constant_betas(num_train_timesteps: int, terminal_noise: float = 0.9999) -> Float64Array:
    """The same beta for every step, so that alphas_cumprod ends at 1 - `terminal_noise`.

    Every beta is 1 - (1 - terminal_noise)^(1/T). `terminal_noise` must be close to 1: source document
    003 asks for a small constant instead, with which x_T stays almost free of noise
    (docs/source-documents.md).

    Args:
        num_train_timesteps: T, at least 1.
        terminal_noise: 1 - alphas_cumprod of the last timestep, in (0, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or terminal_noise outside (0, 1).

    Source: source document 003, Section 3.1, with the constant corrected.
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
    alphas_cumprod = np.cos((u + s) / (1.0 + s) * np.pi / 2.0) ** 2
    return np.minimum(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], max_beta)


def _check_num_train_timesteps(num_train_timesteps: int) -> None:
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps {num_train_timesteps}: need at least 1")


def _check_beta_range(num_train_timesteps: int, beta_start: float, beta_end: float) -> None:
    _check_num_train_timesteps(num_train_timesteps)
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(
            f"beta_start {beta_start} and beta_end {beta_end}: need 0 < beta_start <= beta_end < 1"
        )


@dataclass(frozen=True)
class BetaSchedule:
    """A kind of noise schedule. docs/extending.md tells how to add one.

    Attributes:
        betas: function from T, and from each of the parameters by name, to float64 [T].
        parameters: fields of `diffusion.config.ScheduleConfig` that it uses: some of "beta_start",
            "beta_end" and "terminal_noise".
    """

    betas: Callable[..., Float64Array]
    parameters: tuple[str, ...] = ()


LINEAR = BetaSchedule(linear_betas, ("beta_start", "beta_end"))
SCALED_LINEAR = BetaSchedule(scaled_linear_betas, ("beta_start", "beta_end"))
QUADRATIC = BetaSchedule(quadratic_betas, ("beta_start", "beta_end"))
SIGMOID = BetaSchedule(sigmoid_betas, ("beta_start", "beta_end"))
CONSTANT = BetaSchedule(constant_betas, ("terminal_noise",))
COSINE = BetaSchedule(cosine_betas)

Spacing = Literal["leading", "trailing", "linspace", "logsnr", "karras"]
# Below it x_t is noise: steps would be lost there. Of 200 values that are all equal, such as the ground of an
# image, the mean still has a signal-to-noise ratio of 1%.
LOWEST_LOG_SNR = -10.0
RHO = 7.0  # of the spacing "karras": EDM, arXiv:2206.00364, Table 1


def zero_terminal_snr(betas: ArrayLike) -> Float64Array:
    """Betas rescaled so that the last timestep is pure noise; the first beta stays the same.

    sqrt(alphas_cumprod) is shifted to end at 0 and scaled to start at its old value. The last beta
    becomes 1, where epsilon no longer determines x_0: only networks that predict x_0 or v can use it.

    Args:
        betas: [T], T at least 2, each in (0, 1].

    Returns:
        float64 [T]; the last beta is 1.

    Raises:
        ValueError: betas that `NoiseSchedule` rejects, T < 2, or an alphas_cumprod that reaches its
            minimum before the last timestep.

    Source: arXiv:2305.08891, Algorithm 1.
    """
    schedule = NoiseSchedule(betas)
    root = np.sqrt(schedule.alphas_cumprod)
    shifted = root - root[-1]
    if schedule.num_train_timesteps < 2 or not np.all(shifted[:-1] > 0.0):
        raise ValueError(
            f"alphas_cumprod goes from {schedule.alphas_cumprod[0]} to {schedule.alphas_cumprod[-1]} in "
            f"{len(root)} timesteps: it must reach its minimum only at the last one, so give at least two "
            "betas, all large enough that 1 - beta differs from 1 in float64, and only the last equal to 1"
        )
    scaled = shifted * (root[0] / shifted[0])
    return np.append(schedule.betas[0], 1.0 - (scaled[1:] / scaled[:-1]) ** 2)


class NoiseSchedule:
    """Betas and the quantities derived from them, each float64 [T] and read-only.

    Args:
        betas: [T], variances of the forward steps, each in (0, 1].

    Raises:
        ValueError: betas are not one-dimensional, empty, outside (0, 1] or not finite.

    Source: DDPM, arXiv:2006.11239, Eqs. 2 to 7.
    """

    def __init__(self, betas: ArrayLike) -> None:
        self.betas = np.array(betas, dtype=np.float64)
        if self.betas.ndim != 1 or self.betas.size == 0:
            raise ValueError(f"betas have shape {self.betas.shape}: need one dimension and at least one beta")
        if not np.all((self.betas > 0.0) & (self.betas <= 1.0)):
            raise ValueError(
                f"betas range from {self.betas.min()} to {self.betas.max()}: each must be in (0, 1]"
            )
        self.betas.flags.writeable = False

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noising steps."""
        return self.betas.size

    @cached_property
    def alphas(self) -> Float64Array:
        """1 - betas."""
        return _read_only(1.0 - self.betas)

    @cached_property
    def alphas_cumprod(self) -> Float64Array:
        """Cumulative product of alphas up to t: the fraction of x_t's variance that is signal.

        It is alpha-bar in DDPM, Eq. 4.
        """
        return _read_only(np.cumprod(self.alphas))

    @cached_property
    def alphas_cumprod_prev(self) -> Float64Array:
        """alphas_cumprod one step earlier; 1 at t = 0, before any noise is added."""
        return _read_only(np.concatenate(([1.0], self.alphas_cumprod[:-1])))

    @cached_property
    def log_snr(self) -> Float64Array:
        """log(alphas_cumprod / (1 - alphas_cumprod)); it decreases with t, to -inf if alphas_cumprod is 0."""
        with np.errstate(divide="ignore"):
            log_alphas_cumprod = np.cumsum(np.log1p(-self.betas))
        return _read_only(log_alphas_cumprod - np.log(-np.expm1(log_alphas_cumprod)))

    @cached_property
    def posterior_variance(self) -> Float64Array:
        """beta-tilde, the variance of q(x_{t-1} | x_t, x_0); 0 at t = 0 (Eq. 7)."""
        return _read_only(self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod))

    @cached_property
    def posterior_mean_coef1(self) -> Float64Array:
        """Factor of x_0 in the mean of q(x_{t-1} | x_t, x_0) (Eq. 7)."""
        return _read_only(self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod))

    @cached_property
    def posterior_mean_coef2(self) -> Float64Array:
        """Factor of x_t in the mean of q(x_{t-1} | x_t, x_0) (Eq. 7)."""
        remaining = 1.0 - self.alphas_cumprod_prev
        return _read_only(np.sqrt(self.alphas) * remaining / (1.0 - self.alphas_cumprod))


def respaced_timesteps(
    schedule: NoiseSchedule, num_inference_steps: int, spacing: Spacing = "logsnr"
) -> NDArray[np.int64]:
    """The timesteps that a sampler with fewer steps visits.

    Args:
        schedule: schedule with T timesteps.
        num_inference_steps: S, from 1 to T. S = T gives every timestep, whatever the spacing.
        spacing: "leading" counts up from t = 0 in strides of T // S, "trailing" counts down from
            t = T - 1 in strides of T / S, "linspace" includes both ends with equal strides, "logsnr"
            includes both ends with equal steps in log-SNR, of which only the first one starts below -10,
            "karras" includes both ends with equal steps in the 7th root of
            sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod), with the same limit.

    Returns:
        int64 [S], strictly decreasing (noisiest first).

    Raises:
        ValueError: S outside 1..T, or an unknown spacing.

    Source: arXiv:2305.08891, Table 2, for the first three; DPM-Solver, arXiv:2206.00927,
    Section 3.4, for equal steps in log-SNR; EDM, arXiv:2206.00364, Eq. 5, for "karras".
    """
    num_train_timesteps = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps {num_inference_steps}: the schedule has {num_train_timesteps} timesteps, "
            f"so choose from 1 to {num_train_timesteps}"
        )
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing {spacing!r}: choose one of {', '.join(get_args(Spacing))}")
    steps = np.arange(num_inference_steps)
    if spacing == "leading":
        increasing = steps * (num_train_timesteps // num_inference_steps)
    elif spacing == "trailing":
        stride = num_train_timesteps / num_inference_steps
        increasing = np.round(num_train_timesteps - steps[::-1] * stride).astype(np.int64) - 1
    elif num_inference_steps == 1:
        increasing = np.array([num_train_timesteps - 1])
    elif spacing == "linspace":
        increasing = np.round(np.linspace(0, num_train_timesteps - 1, num_inference_steps)).astype(np.int64)
    else:
        increasing = _timesteps_by_log_snr(schedule, num_inference_steps, spacing)
    return increasing[::-1].astype(np.int64)


def nearest_timesteps(log_snr: Float64Array, targets: Float64Array) -> NDArray[np.int64]:
    """The timesteps whose log-SNR is nearest to each target, the smallest of equally near ones.

    Args:
        log_snr: [T], not increasing.
        targets: [n].

    Returns:
        int64 [n].
    """
    after = np.searchsorted(-log_snr, -targets)  # the first timestep whose log-SNR is not above the target
    before, after = np.maximum(after - 1, 0), np.minimum(after, log_snr.size - 1)
    is_before = np.abs(log_snr[before] - targets) <= np.abs(log_snr[after] - targets)
    nearest = np.where(is_before, before, after)
    return np.searchsorted(-log_snr, -log_snr[nearest])  # the first of equal ones


def _timesteps_by_log_snr(
    schedule: NoiseSchedule, num_inference_steps: int, spacing: Literal["logsnr", "karras"]
) -> NDArray[np.int64]:
    """Increasing timesteps whose log-SNRs are spaced as nearly in this way as the schedule allows."""
    log_snr = np.maximum(schedule.log_snr, LOWEST_LOG_SNR)
    if spacing == "karras":
        first, last = np.exp(log_snr[[0, -1]] / (-2.0 * RHO))  # roots of sigma
        targets = -2.0 * RHO * np.log(np.linspace(first, last, num_inference_steps))
    else:
        targets = np.linspace(log_snr[0], log_snr[-1], num_inference_steps)
    timesteps = nearest_timesteps(log_snr, targets)
    # Where the schedule is coarser than the targets, several of them share a timestep: move them apart.
    index = np.arange(num_inference_steps)
    timesteps = np.maximum.accumulate(timesteps - index) + index
    timesteps = np.minimum(timesteps, log_snr.size - num_inference_steps + index)
    timesteps[-1] = log_snr.size - 1  # the noise to start from is x_T
    return timesteps


def _read_only(values: NDArray[Any]) -> Float64Array:
    values.flags.writeable = False
    return values
