"""The reverse step p(x_s | x_t) of ancestral sampling: its mean, its variance, its cost in the bound.

Numpy, float64. alphas_cumprod is `at` before the step and `as_`, the larger one, after it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from diffusion.schedules import Float64Array, NoiseSchedule

Variance = Literal["beta_tilde", "beta"]
# "optimal" needs a measured error curve, which a config cannot hold.
TableVariance = Literal["beta_tilde", "beta", "optimal"]


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """How far a network's prediction was off, by log-SNR: what the "optimal" variance is made of.

    `diffusion.likelihood.elbo_window` measures it: its `log_snr` and `errors` are these.

    Attributes:
        log_snr: [points], rising, at least one.
        epsilon_errors: [points], E|epsilon - epsilon_hat|^2 / d there.

    Raises:
        ValueError: the two differ in length, log_snr does not rise, or a value is not finite or an
            error negative.
    """

    log_snr: ArrayLike
    epsilon_errors: ArrayLike

    def __post_init__(self) -> None:
        nodes, errors = np.asarray(self.log_snr, np.float64), np.asarray(self.epsilon_errors, np.float64)
        whole = nodes.ndim == 1 and nodes.shape == errors.shape and nodes.size > 0
        if not (whole and np.isfinite(nodes).all() and np.isfinite(errors).all()):
            raise ValueError(
                f"an error curve of shapes {nodes.shape} and {errors.shape}: need finite numbers, as many "
                "log-SNRs as errors"
            )
        if (np.diff(nodes) <= 0.0).any() or (errors < 0.0).any():
            raise ValueError(
                f"an error curve over log-SNR from {nodes[0]} to {nodes[-1]} with errors from "
                f"{errors.min()}: log-SNR must rise, and no error be negative"
            )

    def x_0_errors(self, log_snr: Float64Array) -> Float64Array:
        """E|x_0 - x0|^2 / d at each log-SNR: the epsilon error, interpolated linearly, over the SNR.

        Below the curve the error of its first point stands, since it tends to the data's variance;
        above it the epsilon error of the last one.
        """
        nodes = np.asarray(self.log_snr, np.float64)
        inside = np.maximum(log_snr, nodes[0])
        return np.interp(inside, nodes, np.asarray(self.epsilon_errors, np.float64)) * np.exp(-inside)


def ancestral_coefficients(
    at: Float64Array,
    as_: Float64Array,
    variance: TableVariance = "beta_tilde",
    x_0_errors: Float64Array | None = None,
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """The step from alphas_cumprod `at` to `as_`, N(c x0 + d x_t, s^2 I), where x0 is what is predicted.

    With the true x_0 and beta-tilde it is q(x_s | x_t, x_0) (DDPM, Eqs. 6 and 7). The variances:
        beta_tilde: exact where the data are one point (Section 3.2).
        beta: exact where the data are N(0, I).
        optimal: beta-tilde + c^2 E|x_0 - x0|^2 / d, which makes the bound smallest, whatever the
            network; exact for Gaussian data of one variance. Source: Analytic-DPM, arXiv:2201.06503,
            Theorem 1, with the network's own error in place of the exact denoiser's.

    Args:
        at, as_: [steps], 0 <= at < as_ <= 1.
        variance: which s^2.
        x_0_errors: [steps], E|x_0 - x0|^2 / d at `at`, for "optimal".

    Returns:
        c, d and s^2, float64 [steps] each.

    Raises:
        ValueError: "optimal" without errors, or errors without it.
    """
    if (variance == "optimal") != (x_0_errors is not None):
        raise ValueError(
            f"variance {variance!r} {'with' if x_0_errors is not None else 'without'} an error curve: "
            "give 'optimal' a measured one, and the others none"
        )
    beta = 1.0 - at / as_
    beta_tilde = beta * (1.0 - as_) / (1.0 - at)
    c = np.sqrt(as_) * beta / (1.0 - at)
    d = np.sqrt(at / as_) * (1.0 - as_) / (1.0 - at)
    if x_0_errors is not None:
        return c, d, beta_tilde + c**2 * x_0_errors
    return c, d, beta_tilde if variance == "beta_tilde" else beta


@dataclass(frozen=True, eq=False)
class BoundTerms:
    """L_t = constants[t] + weights[t] |x_0 - x0|^2 / d, the bound's terms in nats per dimension.

    Attributes:
        variances: float64 [T], of p(x_{t-1} | x_t); at t = 0 beta_0, since beta-tilde is 0 there.
        constants: float64 [T], what an exact x0 still costs; 0 for beta-tilde.
        weights: float64 [T], the factor of x_0's squared error.
    """

    variances: Float64Array
    constants: Float64Array
    weights: Float64Array


def bound_terms(
    schedule: NoiseSchedule, variance: TableVariance = "beta_tilde", error_curve: ErrorCurve | None = None
) -> BoundTerms:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for every t, as a function of x_0's error.

    Of two Gaussians with variances beta-tilde and v whose means differ by c (x_0 - x0), so

        (ln(v / beta-tilde) + beta-tilde / v - 1) / 2 + c^2 / (2 v) |x_0 - x0|^2 / d.

    With v = beta-tilde the constant is 0 and the weight half the step in SNR, (SNR_{t-1} - SNR_t) / 2.
    At t = 0, where q is a point, stands the decoder N(x0, beta_0): the weight is 1 / (2 beta_0), and the
    constant, which depends on how the decoder reads the data, is left at 0.

    Args:
        schedule: T timesteps.
        variance: of p, see `ancestral_coefficients`.
        error_curve: for "optimal".

    Raises:
        ValueError: "optimal" without a curve, or a curve without it.

    Source: DDPM, arXiv:2006.11239, Eqs. 5 and 8, and Section 3.3 for t = 0; VDM, arXiv:2107.00630,
    Eq. 14, for the step in SNR.
    """
    at, as_ = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    x_0_errors = None if error_curve is None else error_curve.x_0_errors(schedule.log_snr)
    c, _, variances = ancestral_coefficients(at, as_, variance, x_0_errors)
    variances[0] = schedule.betas[0]
    weights = c**2 / (2.0 * variances)
    ratio = ancestral_coefficients(at, as_)[2][1:] / variances[1:]
    constants = np.concatenate([[0.0], (ratio - 1.0 - np.log(ratio)) / 2.0])
    return BoundTerms(variances, constants, weights)
