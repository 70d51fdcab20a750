"""Checks of a noise schedule before training: metrics, warnings and reasons to reject it."""

import math

import numpy as np

from diffusion import metrics as names
from diffusion.process.posterior import bound_terms
from diffusion.process.prediction_types import PredictionType
from diffusion.process.schedules import LOWEST_LOG_SNR, NoiseSchedule

# Smallest sqrt(alphas_cumprod_T): below it, x_0 at the last timestep is lost to rounding even in float64.
MIN_SIGNAL = 1e-30
# Largest step in log-SNR that counts as small: a change of the signal-to-noise ratio by exp(2), 7-fold.
_MAX_LOG_SNR_STEP = 2.0
# Largest factor by which x0 may amplify the network's error without a warning.
_MAX_ERROR_GAIN = 1000.0


def schedule_metrics(schedule: NoiseSchedule, num_values: int) -> dict[str, float]:
    """Metrics that describe a schedule.

    Args:
        schedule: the schedule.
        num_values: d, the number of values of one example.

    Returns:
        `schedule/alphas_cumprod_T`, `schedule/log_snr_min` (at the last timestep with any signal),
        `schedule/log_snr_max`, `schedule/prior_kl` and `schedule/prior_kl_total`. The last two are the
        bound -1/2 ln(1 - alphas_cumprod_T) on the mismatch between q(x_T) and the prior N(0, I) for data
        of unit second moment, in nats, per dimension and in total.
    """
    alphas_cumprod_last = float(schedule.alphas_cumprod[-1])
    prior_kl = -0.5 * math.log1p(-alphas_cumprod_last)
    return {
        names.ALPHAS_CUMPROD_T: alphas_cumprod_last,
        names.LOG_SNR_MIN: float(schedule.log_snr[np.isfinite(schedule.log_snr)].min()),
        names.LOG_SNR_MAX: float(schedule.log_snr[0]),
        names.PRIOR_KL: prior_kl,
        names.PRIOR_KL_TOTAL: prior_kl * num_values,
    }


def infeasible_reason(schedule: NoiseSchedule, prediction_type: PredictionType = "epsilon") -> str | None:
    """Reason why a schedule cannot be trained, with a remedy, in one line; None if it can."""
    if schedule.alphas_cumprod[0] == 1.0:
        return f"the first beta, {schedule.betas[0]:g}, is lost to rounding in float64: use a larger one"
    if prediction_type == "epsilon" and schedule.betas[-1] == 1.0:
        return "alphas_cumprod_T is 0, where epsilon says nothing about x_0: use prediction type v_prediction"
    # A last beta of 1 is intended (zero terminal SNR), but some signal must remain before that step.
    steps = schedule.alphas_cumprod if schedule.betas[-1] < 1.0 else schedule.alphas_cumprod_prev
    signal = math.sqrt(steps[-1])
    if signal < MIN_SIGNAL:
        return (
            f"sqrt(alphas_cumprod_T) is {signal:.1e}, below {MIN_SIGNAL:g}: use fewer timesteps or a smaller "
            "beta_end"
        )
    with np.errstate(all="ignore"):
        terms = bound_terms(schedule)
    if not (np.isfinite(terms.weights).all() and np.isfinite(terms.variances).all()):
        return "the coefficients of the reverse steps are not finite: use larger betas or fewer timesteps"
    return None


def wasted_fraction(schedule: NoiseSchedule) -> float:
    """Fraction of the timesteps below a log-SNR of -10, where x_t is nearly pure noise.

    Samplers that take equal steps of log-SNR do not visit these timesteps, except for the last, so that what
    is trained there is of no use.
    """
    return float(np.mean(schedule.log_snr < LOWEST_LOG_SNR))


def prior_mismatch(schedule: NoiseSchedule, window: tuple[float, float], num_values: int) -> str | None:
    """Why sampling, which starts from N(0, I), cannot start as training ended, in one line; None if it can.

    Args:
        schedule: the schedule.
        window: log-SNR window of the data, `DataSpec.log_snr_window`.
        num_values: d, the number of values of one example.
    """
    metrics = schedule_metrics(schedule, num_values)
    low, alphas_cumprod_last = window[0], metrics[names.ALPHAS_CUMPROD_T]
    if schedule.log_snr[-1] <= low + math.log(20.0):  # the noise is stronger than the strongest direction
        return None
    strongest = 0.05 * math.exp(-low)  # the largest eigenvalue, unless the window starts at -8 anyway
    variance = 1.0 + alphas_cumprod_last * (strongest - 1.0)
    along = f"; along the data's strongest direction its variance is {variance:.2g}"
    return (
        f"x_T keeps {math.sqrt(alphas_cumprod_last):.2g} of the data's amplitude (alphas_cumprod_T "
        f"{alphas_cumprod_last:.2g}){along if low < -8.0 else ''}, but sampling starts from N(0, I): a "
        f"mismatch of up to {metrics[names.PRIOR_KL]:.2g} nats/dim, "
        f"{metrics[names.PRIOR_KL_TOTAL]:.2g} in total, for data of unit variance in all "
        "directions; use more timesteps or a larger beta_end"
    )


def schedule_warnings(
    schedule: NoiseSchedule,
    window: tuple[float, float],
    num_values: int,
    *,
    prediction_type: PredictionType = "epsilon",
    clipped: bool = True,
) -> list[str]:
    """Warnings about a schedule that can be trained, one line each, with numbers and a remedy.

    A warning does not rule a schedule out: those that keep a fifth of the signal to the end can give the
    best model.

    Args:
        schedule: schedule for which `infeasible_reason` is None.
        window: log-SNR window of the data, `DataSpec.log_snr_window`. At its low end the variance of the
            data along their strongest direction is a twentieth of the noise's; at its high end less noise
            hardly moves a sample, or the noise is as small as the step between the data's values.
        num_values: d, the number of values of one example.
        prediction_type: prediction type of the network.
        clipped: whether the sampler clips x0.
    """
    metrics, log_snr = schedule_metrics(schedule, num_values), schedule.log_snr
    low, high = window
    lines = []
    alphas_cumprod_last = metrics[names.ALPHAS_CUMPROD_T]
    if (mismatch := prior_mismatch(schedule, window, num_values)) is not None:
        lines.append(mismatch)
    if log_snr[0] < high:
        lines.append(
            f"the noise of the first step, {math.sqrt(schedule.betas[0]):.2g} standard deviations of the "
            f"data, hides detail in the data: log-SNR starts at {log_snr[0]:.2f} but the data have detail up "
            f"to {high:.2f}, and the {(high - log_snr[0]) / 2.0:.2g} nats/dim between them count as not "
            "denoised; use a smaller beta_start"
        )
    outside = float(np.mean((log_snr < low) | (log_snr > high)))
    if outside > 0.5:
        lines.append(
            f"{outside:.0%} of the timesteps are outside the log-SNR window of the data, {low:.2f} to "
            f"{high:.2f}, where training does not improve the objective; use fewer timesteps, or a kind of "
            "schedule that spreads them more evenly, such as cosine"
        )
    within = (log_snr >= low) & (log_snr <= high)
    steps = np.where(within[:-1] & within[1:], -np.diff(np.maximum(log_snr, low - 1.0)), 0.0)
    if steps.max(initial=0.0) > _MAX_LOG_SNR_STEP:
        t = int(steps.argmax())
        lines.append(
            f"the step from t = {t + 1} to {t} changes the signal-to-noise ratio "
            f"{math.exp(steps[t]):.0f}-fold, but a reverse step is Gaussian only if it is small; use more "
            "timesteps"
        )
    if prediction_type == "epsilon" and not clipped and alphas_cumprod_last < _MAX_ERROR_GAIN**-2:
        lines.append(
            f"at t = T - 1 the error of x0 is that of epsilon times {alphas_cumprod_last**-0.5:.2g}, and "
            "nothing clips x0; turn sampler.clip on, predict v, or keep more signal"
        )
    return lines
