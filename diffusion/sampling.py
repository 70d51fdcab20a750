"""Every sampler as one table of coefficients, and the one step that reads it. Loads no torch.

Notation, for the step from timestep t to the next, less noisy timestep s:

    variable        meaning                                         name in the papers
    alphas_cumprod  the signal's share of the variance of x_t       alpha-bar (DDPM), alpha (DDIM)
    out             the network's raw output
    x0              the clean sample that `out` implies, clipped    f_theta (DDIM), x_theta (DPM-Solver++)
    z               fresh standard normal noise

A row holds the nine coefficients a b c d e f s lo hi of

    x0 = clip(a x + b out, lo, hi)
    x  = c x0 + d x + e x0_previous + f out + s z
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.reverse import ErrorCurve, TableVariance, Variance, ancestral_coefficients
from diffusion.schedules import Float64Array, NoiseSchedule, Spacing, respaced_timesteps

__all__ = [
    "COEFFICIENTS",
    "ErrorCurve",
    "PredictionType",
    "SamplerName",
    "SamplerTable",
    "Variance",
    "last_sample",
    "sampler_table",
    "step",
    "trajectory",
]

PredictionType = Literal["epsilon", "sample", "v_prediction"]
SamplerName = Literal["ddpm", "ddim", "dpmpp_2m"]

COEFFICIENTS = ("a", "b", "c", "d", "e", "f", "s", "lo", "hi")


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler, ready to run.

    Attributes:
        timesteps: int64 [S], noisy first: what the network is told in each row.
        coefficients: float64 [S, 9], columns as in `COEFFICIENTS`.
        alphas_cumprod: float64 [S + 1]: before each row, and 1 after the last.
    """

    timesteps: NDArray[np.int64]
    coefficients: Float64Array
    alphas_cumprod: Float64Array


def sampler_table(
    schedule: NoiseSchedule,
    sampler: SamplerName,
    num_inference_steps: int,
    *,
    prediction_type: PredictionType = "epsilon",
    eta: float = 0.0,
    variance: TableVariance = "beta_tilde",
    error_curve: ErrorCurve | None = None,
    spacing: Spacing = "trailing",
    clip: tuple[float, float] | None = None,
    use_clipped_model_output: bool = True,
    step_ratio_guard: float | None = 3.0,
) -> SamplerTable:
    """Compute a sampler's table from a schedule, in float64.

    Args:
        schedule: the schedule that the network was trained on.
        sampler: "ddpm" (ancestral), "ddim" or "dpmpp_2m" (DPM-Solver++(2M), second order).
        num_inference_steps: S, from 1 to T.
        prediction_type: what the network's output means.
        eta: DDIM's share of fresh noise, in [0, 1]; the others do not use it.
        variance: DDPM's noise, see `ancestral_coefficients` (respaced, as everything here); the others
            do not use it. A covariance that a network learns, the Sigma_theta(x_t, t) of seeds 000 and
            001, fits no table, whose s is one number a row.
        error_curve: for "optimal", measured with the same clip interval.
        spacing: how the S timesteps are chosen, see `respaced_timesteps`.
        clip: (lo, hi) for x0 in normalised units, or None.
        use_clipped_model_output: DDIM derives epsilon anew from the clipped x0 (f = 0); otherwise
            it takes epsilon from the raw output, which is diffusers' default.
        step_ratio_guard: a row of dpmpp_2m whose step in log-SNR is more than this many times the
            one before is of first order, since it would extrapolate too far. None: no such row
            (diffusers has no guard).

    Returns:
        The table. The last row is c = 1, d = e = f = s = 0: it returns x0.

    Raises:
        ValueError: an unknown name, eta outside [0, 1], clip without lo < hi, a guard that is not
            positive, S outside 1..T, "optimal" without an error curve or a curve without it, or epsilon
            prediction where alphas_cumprod is 0 (x_t then says nothing about x_0).

    Source: DDPM, arXiv:2006.11239, Eqs. 7 and 11; DDIM, arXiv:2010.02502, Eqs. 12 and 16;
    DPM-Solver++(2M), arXiv:2211.01095, Algorithm 2.

    Seed 003, Section 3.2, prints the update with beta-bar, the product of the betas, in alpha-bar's
    place and sigma_t = eta sqrt(beta_t (1 - beta-bar) / beta-bar). That cannot be: a product of small
    numbers is next to 0, so the first says that x_t holds nothing but noise from the first steps on,
    and the second grows without bound. DDIM's sigma_t (Eq. 16) is eta times the root of beta-tilde.
    """
    _check_choice("sampler", sampler, SamplerName)
    _check_choice("prediction_type", prediction_type, PredictionType)
    _check_choice("variance", variance, TableVariance)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta {eta}: need a number from 0 (no fresh noise) to 1")
    lo, hi = (-np.inf, np.inf) if clip is None else clip
    if not lo < hi:
        raise ValueError(f"clip ({lo}, {hi}): the first must be smaller than the second")
    if step_ratio_guard is not None and not step_ratio_guard > 0.0:
        raise ValueError(f"step_ratio_guard {step_ratio_guard}: need a positive number, or None for no guard")

    timesteps = respaced_timesteps(schedule, num_inference_steps, spacing)
    alphas_cumprod = np.append(schedule.alphas_cumprod[timesteps], 1.0)
    if prediction_type == "epsilon" and alphas_cumprod[0] == 0.0:
        raise ValueError(
            "alphas_cumprod reaches 0, where epsilon does not determine x_0: "
            "use prediction_type 'v_prediction' or 'sample', or a gentler schedule"
        )
    at, as_ = alphas_cumprod[:-1], alphas_cumprod[1:]
    a, b = _x0_coefficients(prediction_type, at)
    e = f = s = np.zeros_like(at)
    if sampler == "ddpm":
        x_0_errors = None if error_curve is None else error_curve.x_0_errors(schedule.log_snr[timesteps])
        c, d, s_squared = ancestral_coefficients(at, as_, variance, x_0_errors)
        s = np.sqrt(s_squared)
    elif sampler == "ddim":
        s = eta * np.sqrt((1.0 - as_) / (1.0 - at) * (1.0 - at / as_))
        if use_clipped_model_output:
            c, d = _ddim_coefficients(at, as_, s)
        else:
            c, direction = np.sqrt(as_), _direction(as_, s)
            epsilon_x, epsilon_out = _epsilon_coefficients(prediction_type, at)
            d, f = direction * epsilon_x, direction * epsilon_out
    else:
        c, d = _ddim_coefficients(at, as_, s)
        weight = _extrapolation(schedule.log_snr[timesteps], step_ratio_guard)
        c, e = c * (1.0 + weight), -c * weight
    rows = np.stack([a, b, c, d, e, f, s, np.full_like(at, lo), np.full_like(at, hi)], axis=1)
    rows[-1, 2:7] = (1.0, 0.0, 0.0, 0.0, 0.0)
    return SamplerTable(timesteps, rows, alphas_cumprod)


def step(row: Sequence[float] | Float64Array, x: Any, out: Any, x0_previous: Any, z: Any) -> tuple[Any, Any]:
    """One row of the table; only `+`, `*` and clip, so arrays and tensors both pass.

    Args:
        row: nine coefficients in the order of `COEFFICIENTS`.
        x: [batch, ...] the current sample.
        out: [batch, ...] the network's raw output for it.
        x0_previous: [batch, ...] x0 of the row before, zeros in the first row.
        z: [batch, ...] standard normal noise (anything where s is 0).

    Returns:
        The next x and this row's x0, both [batch, ...].
    """
    a, b, c, d, e, f, s, lo, hi = (float(value) for value in row)
    x0 = (a * x + b * out).clip(lo, hi)
    return c * x0 + d * x + e * x0_previous + f * out + s * z, x0


def trajectory(
    denoise: Callable[[Any, int], Any], x: Any, table: SamplerTable, noise: Callable[[int], Any]
) -> Iterator[tuple[Any, Any]]:
    """Run a table from noise to samples, yielding after every row.

    Args:
        denoise: (x, timestep) -> the network's output, of x's shape.
        x: [batch, ...] standard normal noise to start from.
        table: the sampler.
        noise: row index -> fresh standard normal noise of x's shape; asked only where s is not 0.

    Yields:
        (x, x0) after each row; the last x is the sample.
    """
    x0 = 0.0 * x
    for index, (timestep, row) in enumerate(zip(table.timesteps, table.coefficients, strict=True)):
        z = noise(index) if row[6] else 0.0
        x, x0 = step(row, x, denoise(x, int(timestep)), x0, z)
        yield x, x0


def last_sample(states: Iterator[tuple[Any, Any]]) -> Any:
    """The x at the end of a `trajectory`; the states on the way are not kept."""
    return deque(states, maxlen=1).pop()[0]


def _ddim_coefficients(
    at: Float64Array, as_: Float64Array, s: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """x_s = c x_0 + d x_t: DDIM, Eq. 12, with epsilon written as x_t and x_0."""
    d = _direction(as_, s) / np.sqrt(1.0 - at)
    return np.sqrt(as_) - d * np.sqrt(at), d


def _direction(as_: Float64Array, s: Float64Array) -> Float64Array:
    """Factor of epsilon in x_s: DDIM, Eq. 12."""
    return np.sqrt(np.maximum(1.0 - as_ - s**2, 0.0))


def _extrapolation(log_snr: Float64Array, guard: float | None) -> Float64Array:
    """The w by which DPM-Solver++(2M) reads x_0 ahead of its two last values: (1 + w) x0 - w x0_previous.

    The rest of its update, (sigma_s / sigma_t) x - sqrt(alphas_cumprod_s) (exp(-h) - 1) x0 with
    exp(-h) = sqrt(alphas_cumprod_t / alphas_cumprod_s) sigma_s / sigma_t, is DDIM's with eta = 0, which
    is finite also where alphas_cumprod is 0. There h is infinite, so that the row after it has w = 0;
    so have the first row and the last.

    Args:
        log_snr: [S] before each row: 2 lambda in the paper.
        guard: see `step_ratio_guard`.

    Returns:
        float64 [S]: h / (2 h_previous), with h the row's step in log-SNR.
    """
    weight = np.zeros_like(log_snr)
    h = np.diff(log_snr)
    ratio = h[1:] / h[:-1]
    weight[1:-1] = np.where(ratio > (np.inf if guard is None else guard), 0.0, ratio / 2.0)
    return weight


def _x0_coefficients(prediction_type: PredictionType, at: Float64Array) -> tuple[Float64Array, Float64Array]:
    """x_0 = a x_t + b out."""
    if prediction_type == "epsilon":
        return 1.0 / np.sqrt(at), -np.sqrt((1.0 - at) / at)
    if prediction_type == "sample":
        return np.zeros_like(at), np.ones_like(at)
    return np.sqrt(at), -np.sqrt(1.0 - at)


def _epsilon_coefficients(
    prediction_type: PredictionType, at: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """epsilon = a x_t + b out, from the raw output."""
    if prediction_type == "epsilon":
        return np.zeros_like(at), np.ones_like(at)
    if prediction_type == "sample":
        return 1.0 / np.sqrt(1.0 - at), -np.sqrt(at / (1.0 - at))
    return np.sqrt(1.0 - at), np.sqrt(at)


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} {value!r}: choose one of {', '.join(get_args(choices))}")
