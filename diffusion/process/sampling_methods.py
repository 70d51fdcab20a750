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
from diffusion.process.schedules import Float64Array, NoiseSchedule, nearest_timesteps


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

    The row computes x <- c x0 + d x + e x0_previous + e2 x0_previous_2 + f out + s z, where x0 is the clipped
    prediction from this evaluation, and x0_previous and x0_previous_2 are those from the two before it.

    Attributes:
        c: coefficient of x0.
        d: coefficient of x.
        e: coefficient of x0_previous.
        e2: coefficient of x0_previous_2.
        f: coefficient of the network's raw output.
        s: coefficient of the fresh noise.
        timesteps: int64 [S - 1], timestep at which the network is evaluated; None is that before the step.
    """

    c: Float64Array | float
    d: Float64Array | float
    e: Float64Array | float = 0.0
    e2: Float64Array | float = 0.0
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
        default_eta: `eta` where none is asked for.
        uses_variance: whether `variance` has an effect.
        is_candidate: whether it is measured when the sampler of a finished model is chosen, see
            `diffusion.evaluation.sampler_choice`.
        parity_steps: number of steps over which the export compares trajectories of ONNX Runtime with those
            of PyTorch, or T if that is smaller.
    """

    stages: Callable[[SamplingSteps], Sequence[Stage]]
    rows_per_step: int = 1
    uses_eta: bool = False
    default_eta: float = 0.0
    uses_variance: bool = False
    is_candidate: bool = True
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
    w = _extrapolation(steps)
    return [Stage(c=c * (1.0 + w), d=d, e=-c * w)]


def dpmpp_2m_sde(steps: SamplingSteps) -> list[Stage]:
    """SDE-DPM-Solver++(2M): DPM-Solver++(2M) for the reverse diffusion, which adds fresh noise.

        x_s = sigma_s / sigma_t exp(-h) x_t + sqrt(A_s) (1 - exp(-2 h)) ((1 + w) x0 - w x0_previous)
              + sigma_s sqrt(1 - exp(-2 h)) z

    with sigma, h and w as in `dpmpp_2m`. Without extrapolation it is DDPM with the variance beta-tilde, since
    exp(-2 h) = A_t (1 - A_s) / (A_s (1 - A_t)).

    Source: DPM-Solver++, arXiv:2211.01095, SDE-DPM-Solver++(2M).
    """
    c, d, variance = ancestral_coefficients(steps.alphas_cumprod_t, steps.alphas_cumprod_s, "beta_tilde")
    w = _extrapolation(steps)
    return [Stage(c=c * (1.0 + w), d=d, e=-c * w, s=np.sqrt(variance))]


def dpmpp_3m(steps: SamplingSteps) -> list[Stage]:
    """DPM-Solver++(3M), a multistep solver of third order, which extrapolates from three predictions.

        x_s = sigma_s / sigma_t x_t + sqrt(A_s) (phi_1 x0 + phi_2 D_1 + phi_3 D_2)
        phi_1 = 1 - exp(-h),  phi_2 = 1 - phi_1 / h,  phi_3 = 1 - 2 phi_2 / h
        D_2 = (F_1 - F_2) / (r_1 + r_2),  D_1 = F_1 + r_1 D_2
        F_1 = (x0 - x0_previous) / r_1,  F_2 = (x0_previous - x0_previous_2) / r_2

    with sigma and h as in `dpmpp_2m`, r_1 the step before divided by this one, and r_2 the one before that
    divided by this one. D_1 and D_2 are h times the slope and h^2 / 2 times the curvature of the parabola
    through the three predictions, which the formula integrates exactly. The first step is of first order, the
    second of second order (`dpmpp_2m`). A later step is `dpmpp_2m`'s if it or the step before exceeds
    `step_ratio_guard` times its predecessor, and the last two steps, of which the very last returns x0, lower
    the order to 2 and 1 where there are fewer than `LOWER_ORDER_FINAL` steps.

    Source: DPM-Solver++, arXiv:2211.01095, with the coefficients of UniP-3, UniPC, arXiv:2302.04867, Section
    3.2. The published code of DPM-Solver++, and diffusers', have half of phi_3, which leaves order 2.
    """
    [second_order] = dpmpp_2m(steps)
    c, e = np.array(second_order.c), np.array(second_order.e)
    e2 = np.zeros_like(c)
    h = (steps.log_snr_s - steps.log_snr_t) / 2.0
    guard = np.inf if steps.step_ratio_guard is None else steps.step_ratio_guard
    within_guard = h[1:] / h[:-1] <= guard
    third_order = np.flatnonzero(within_guard[1:] & within_guard[:-1]) + 2
    num_steps = len(h) + 1
    if num_steps < LOWER_ORDER_FINAL:
        third_order = third_order[third_order < len(h) - 1]
    r_1, r_2, h = h[third_order - 1] / h[third_order], h[third_order - 2] / h[third_order], h[third_order]
    phi_1 = -np.expm1(-h)
    phi_2 = 1.0 - phi_1 / h
    phi_3 = 1.0 - 2.0 * phi_2 / h
    of_difference = (r_1 * phi_2 + phi_3) / (r_1 + r_2)  # the factor of F_1 - F_2
    of_f_1 = (phi_2 + of_difference) / r_1
    of_f_2 = of_difference / r_2
    signal = np.sqrt(steps.alphas_cumprod_s[third_order])
    c[third_order] = signal * (phi_1 + of_f_1)
    e[third_order] = -signal * (of_f_1 + of_f_2)
    e2[third_order] = signal * of_f_2
    return [Stage(c=c, d=second_order.d, e=e, e2=e2)]


def heun(steps: SamplingSteps) -> list[Stage]:
    """Heun's method: a step of Euler's, then a second evaluation at its end, and the mean of both slopes.

        predictor: u_s = u_t + (sigma_s - sigma_t) (u_t - x0) / sigma_t
        corrector: u_s = u_t + (sigma_s - sigma_t) ((u_t - x0) / sigma_t + (u_s - x0') / sigma_s) / 2

    with u = x / sqrt(A) and sigma = sqrt((1 - A) / A). The predictor is DDIM with eta = 0. In the second row
    x is its result, x0 is x0', and x0_previous is the first row's x0. Since the first slope is
    (u_s - x0_previous) / sigma_s as well, the corrector adds w (x0' - x0_previous) to the predictor's
    result, with w = sqrt(A_s) (sigma_t / sigma_s - 1) / 2. Where sigma_t / sigma_s is infinite or exceeds
    `step_ratio_guard`, w is 0: the step is of first order, though it has two evaluations.

    Source: EDM, arXiv:2206.00364, Algorithm 1.
    """
    return _heun(steps, steps.timesteps_t)


def heun_churn(steps: SamplingSteps) -> list[Stage]:
    """EDM's stochastic sampler: before each step of Heun's method, noise is added ("churn").

    The noise raises sigma to (1 + gamma) sigma, with gamma = eta (sqrt(2) - 1): eta is the fraction of the
    largest churn that EDM allows, and its S_churn is gamma times the number of steps. As in EDM's code for
    networks with discrete timesteps, the raised sigma is that of a timestep, here the nearest in log-SNR;
    that is the step's own if the schedule is coarse or gamma small. Raising from timestep s to a noisier one
    r is the forward process: a factor k = sqrt(A_r / A_s) and noise of variance 1 - k^2, both in the last row
    of the step before. The first step has no churn, since it starts from the noisiest timestep, and neither
    has the last, which returns x0; EDM's S_tmin and S_tmax leave out the ends, too. S_noise is 1.

    Source: EDM, arXiv:2206.00364, Algorithm 2.
    """
    gamma = steps.eta * LARGEST_CHURN
    raised = nearest_timesteps(steps.schedule.log_snr, steps.log_snr_t[1:] - 2.0 * np.log1p(gamma))
    return _heun(steps, np.concatenate([steps.timesteps_t[:1], raised]))


LOWER_ORDER_FINAL = 15  # steps, as in diffusers
LARGEST_CHURN = np.sqrt(2.0) - 1.0  # EDM, Algorithm 2: more noise than there is already is never added

DDPM = SamplingMethod(stages=ddpm, uses_variance=True, parity_steps=100)
DDIM = SamplingMethod(stages=ddim, uses_eta=True, parity_steps=50)
DPMPP_2M = SamplingMethod(stages=dpmpp_2m, parity_steps=20)
DPMPP_3M = SamplingMethod(stages=dpmpp_3m, is_candidate=False, parity_steps=20)
DPMPP_2M_SDE = SamplingMethod(stages=dpmpp_2m_sde, parity_steps=20)
HEUN = SamplingMethod(stages=heun, rows_per_step=2, parity_steps=20)
HEUN_CHURN = SamplingMethod(
    stages=heun_churn,
    rows_per_step=2,
    uses_eta=True,
    default_eta=0.25,
    is_candidate=False,
    parity_steps=20,
)


def _heun(steps: SamplingSteps, timesteps_t: NDArray[np.int64]) -> list[Stage]:
    """Heun's method from these timesteps [S - 1] to `steps.timesteps_s`, and up to the next of the former."""
    alphas_cumprod_t, alphas_cumprod_s = steps.schedule.alphas_cumprod[timesteps_t], steps.alphas_cumprod_s
    c, d = _ddim_coefficients(alphas_cumprod_t, alphas_cumprod_s, np.float64(0.0))
    sigma_ratio = np.exp((steps.log_snr_s - steps.schedule.log_snr[timesteps_t]) / 2.0)
    guard = np.inf if steps.step_ratio_guard is None else steps.step_ratio_guard
    second_order = np.isfinite(sigma_ratio) & (sigma_ratio <= guard)
    w = np.where(second_order, np.sqrt(alphas_cumprod_s) * (sigma_ratio - 1.0) / 2.0, 0.0)
    kept = np.append(alphas_cumprod_t[1:], alphas_cumprod_s[-1:]) / alphas_cumprod_s
    k = np.sqrt(kept)
    return [
        Stage(c=c, d=d, timesteps=timesteps_t),
        Stage(c=k * w, d=k, e=-k * w, s=np.sqrt(1.0 - kept), timesteps=steps.timesteps_s),
    ]


def _extrapolation(steps: SamplingSteps) -> Float64Array:
    """w of `dpmpp_2m`, [S - 1]: how far a step extrapolates from two predictions."""
    h = steps.log_snr_s - steps.log_snr_t  # twice that of the formula; the factor cancels in the ratio
    guard = np.inf if steps.step_ratio_guard is None else steps.step_ratio_guard
    w = np.zeros_like(h)
    ratio = h[1:] / h[:-1]
    w[1:] = np.where(ratio > guard, 0.0, ratio / 2.0)
    return w


def _ddim_coefficients(
    alphas_cumprod_t: Float64Array, alphas_cumprod_s: Float64Array, sigma: Float64Array | np.float64
) -> tuple[Float64Array, Float64Array]:
    """Coefficients of x_s = c x0 + d x_t: DDIM, Eq. 12, with epsilon expressed by x_t and x0."""
    d = _epsilon_factor(alphas_cumprod_s, sigma) / np.sqrt(1.0 - alphas_cumprod_t)
    return np.sqrt(alphas_cumprod_s) - d * np.sqrt(alphas_cumprod_t), d


def _epsilon_factor(alphas_cumprod_s: Float64Array, sigma: Float64Array | np.float64) -> Float64Array:
    """Factor of epsilon in x_s: DDIM, Eq. 12."""
    return np.sqrt(np.maximum(1.0 - alphas_cumprod_s - sigma**2, 0.0))
