"""The samplers: the coefficients of their steps, each beside its formula. Does not import torch.

Notation as in `diffusion.process.samplers`. A step goes from timestep t to the next, less noisy timestep s
of those that the sampler visits; A is alphas_cumprod, and epsilon solves
x_t = sqrt(A_t) x0 + sqrt(1 - A_t) epsilon. docs/extending.md tells how to add a sampler.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion.process.posterior import Variance, ancestral_coefficients
from diffusion.process.schedules import Float64Array, NoiseSchedule


@dataclass(frozen=True, eq=False)
class SamplingSteps:
    """The steps of a sampler except the last, which in every sampler returns x0.

    Attributes:
        schedule: schedule that the network was trained on.
        timesteps_t: int64 [S - 1], timestep before each step.
        timesteps_s: int64 [S - 1], timestep after each step.
        alphas_cumprod_t: [S - 1], alphas_cumprod before each step; the first may be 0.
        alphas_cumprod_s: [S - 1], alphas_cumprod after each step, larger and below 1.
        log_snr_t: [S - 1], log-SNR before each step; the first may be -inf.
        log_snr_s: [S - 1], log-SNR after each step.
        epsilon_x: [S - 1], coefficient of x_t in the epsilon of the network's raw output.
        epsilon_out: [S - 1], coefficient of `out` in it: epsilon = epsilon_x x_t + epsilon_out out.
        eta: amount of fresh noise, in [0, 1].
        variance: variance of the fresh noise, see `ancestral_coefficients`.
        use_clipped_model_output: see `sampler_table`.
        step_ratio_guard: see `sampler_table`.
    """

    schedule: NoiseSchedule
    timesteps_t: NDArray[np.int64]
    timesteps_s: NDArray[np.int64]
    alphas_cumprod_t: Float64Array
    alphas_cumprod_s: Float64Array
    log_snr_t: Float64Array
    log_snr_s: Float64Array
    epsilon_x: Float64Array
    epsilon_out: Float64Array
    eta: float
    variance: Variance
    use_clipped_model_output: bool
    step_ratio_guard: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One network evaluation in each step, as columns of the table. Each is [S - 1], or one number for all.

    The row computes x <- c x0 + d x + e x0_previous + f out + s z, where x0 is the clipped prediction
    from this evaluation, and x0_previous that from the evaluation before it.

    Attributes:
        c: coefficient of x0.
        d: coefficient of x.
        e: coefficient of x0_previous.
        f: coefficient of the network's raw output.
        s: coefficient of the fresh noise.
        timesteps: int64 [S - 1], timestep at which the network is evaluated; None is that before the step.
    """

    c: Float64Array | float
    d: Float64Array | float
    e: Float64Array | float = 0.0
    f: Float64Array | float = 0.0
    s: Float64Array | float = 0.0
    timesteps: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingMethod:
    """A sampler.

    Attributes:
        stages: function from the steps to their network evaluations, in order, `rows_per_step` of them.
        rows_per_step: network evaluations of a step, each a row of the table. The last step has one.
        uses_eta: whether `eta` has an effect.
        uses_variance: whether `variance` has an effect.
        parity_steps: number of steps over which the export compares trajectories of ONNX Runtime with those
            of PyTorch, or T if that is smaller.
    """

    stages: Callable[[SamplingSteps], Sequence[Stage]]
    rows_per_step: int = 1
    uses_eta: bool = False
    uses_variance: bool = False
    parity_steps: int = 20


def ddpm(steps: SamplingSteps) -> list[Stage]:
    """Ancestral sampling.

        x_s = sqrt(A_s) beta / (1 - A_t) x0 + sqrt(A_t / A_s) (1 - A_s) / (1 - A_t) x_t + sqrt(variance) z

    with beta = 1 - A_t / A_s, and beta-tilde = beta (1 - A_s) / (1 - A_t) as the default variance.

    Source: DDPM, arXiv:2006.11239, Eqs. 7 and 11.
    """
    c, d, variance = ancestral_coefficients(steps.alphas_cumprod_t, steps.alphas_cumprod_s, steps.variance)
    return [Stage(c=c, d=d, s=np.sqrt(variance))]


def ddim(steps: SamplingSteps) -> list[Stage]:
    """DDIM, which takes away the predicted noise, and adds `eta` times as much fresh noise as DDPM.

        x_s = sqrt(A_s) x0 + sqrt(1 - A_s - sigma^2) epsilon + sigma z

    with sigma = eta sqrt((1 - A_s) / (1 - A_t) (1 - A_t / A_s)), which is eta sqrt(beta-tilde). Without
    `use_clipped_model_output`, epsilon is that of the raw output instead of the clipped x0.

    Source: DDIM, arXiv:2010.02502, Eqs. 12 and 16.
    """
    alphas_cumprod_t, alphas_cumprod_s = steps.alphas_cumprod_t, steps.alphas_cumprod_s
    sigma = steps.eta * np.sqrt(
        (1.0 - alphas_cumprod_s) / (1.0 - alphas_cumprod_t) * (1.0 - alphas_cumprod_t / alphas_cumprod_s)
    )
    if steps.use_clipped_model_output:
        c, d = _ddim_coefficients(alphas_cumprod_t, alphas_cumprod_s, sigma)
        return [Stage(c=c, d=d, s=sigma)]
    factor = _epsilon_factor(alphas_cumprod_s, sigma)
    return [
        Stage(c=np.sqrt(alphas_cumprod_s), d=factor * steps.epsilon_x, f=factor * steps.epsilon_out, s=sigma)
    ]


def dpmpp_2m(steps: SamplingSteps) -> list[Stage]:
    """DPM-Solver++(2M), a multistep solver of second order, which extrapolates from two predictions.

        x_s = sigma_s / sigma_t x_t - sqrt(A_s) (exp(-h) - 1) ((1 + w) x0 - w x0_previous)

    with sigma = sqrt(1 - A), h half the step in log-SNR, and w = h / (2 h_previous). Without extrapolation
    (w = 0) it is DDIM with eta = 0, since exp(-h) = sqrt(A_t / A_s) sigma_s / sigma_t; that is finite even
    if A_t is 0, where h is infinite and w is 0 in the next step. w is also 0 in the first step, and where
    h / h_previous exceeds `step_ratio_guard`.

    Source: DPM-Solver++, arXiv:2211.01095, Algorithm 2.
    """
    c, d = _ddim_coefficients(steps.alphas_cumprod_t, steps.alphas_cumprod_s, np.float64(0.0))
    h = steps.log_snr_s - steps.log_snr_t  # twice that of the formula; the factor cancels in the ratio
    guard = np.inf if steps.step_ratio_guard is None else steps.step_ratio_guard
    w = np.zeros_like(h)
    ratio = h[1:] / h[:-1]
    w[1:] = np.where(ratio > guard, 0.0, ratio / 2.0)
    return [Stage(c=c * (1.0 + w), d=d, e=-c * w)]


DDPM = SamplingMethod(stages=ddpm, uses_variance=True, parity_steps=100)
DDIM = SamplingMethod(stages=ddim, uses_eta=True, parity_steps=50)
DPMPP_2M = SamplingMethod(stages=dpmpp_2m, parity_steps=20)


def _ddim_coefficients(
    alphas_cumprod_t: Float64Array, alphas_cumprod_s: Float64Array, sigma: Float64Array | np.float64
) -> tuple[Float64Array, Float64Array]:
    """Coefficients of x_s = c x0 + d x_t: DDIM, Eq. 12, with epsilon expressed by x_t and x0."""
    d = _epsilon_factor(alphas_cumprod_s, sigma) / np.sqrt(1.0 - alphas_cumprod_t)
    return np.sqrt(alphas_cumprod_s) - d * np.sqrt(alphas_cumprod_t), d


def _epsilon_factor(alphas_cumprod_s: Float64Array, sigma: Float64Array | np.float64) -> Float64Array:
    """Factor of epsilon in x_s: DDIM, Eq. 12."""
    return np.sqrt(np.maximum(1.0 - alphas_cumprod_s - sigma**2, 0.0))
