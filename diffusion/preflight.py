"""What can be said of a noise schedule before anything is trained on it: figures, warnings, refusals."""

import math

import numpy as np

from diffusion.reverse import bound_terms
from diffusion.sampling import PredictionType
from diffusion.schedules import NoiseSchedule

# Below this the network's x_0 at the last timestep is lost even in float64.
SMALLEST_SIGNAL = 1e-30
# A step over which the noise's share against the signal's changes more than exp(2) = 7-fold is no small one.
_LONG_STEP = 2.0
# What one network's error may be multiplied by.
_LARGEST_GAIN = 1000.0


def schedule_metrics(schedule: NoiseSchedule, num_values: int) -> dict[str, float]:
    """The preflight's figures of a schedule.

    Args:
        schedule: the schedule.
        num_values: d, the number of values of one example.

    Returns:
        `schedule/alphas_cumprod_T`, `schedule/log_snr_min` (of the last timestep with any signal),
        `schedule/log_snr_max`, and the bound -1/2 ln(1 - alphas_cumprod_T) on the prior's mismatch for
        unit second moment, in nats: `schedule/prior_kl` per dimension and `schedule/prior_kl_total`.
    """
    last = float(schedule.alphas_cumprod[-1])
    prior_kl = -0.5 * math.log1p(-last)
    return {
        "schedule/alphas_cumprod_T": last,
        "schedule/log_snr_min": float(schedule.log_snr[np.isfinite(schedule.log_snr)].min()),
        "schedule/log_snr_max": float(schedule.log_snr[0]),
        "schedule/prior_kl": prior_kl,
        "schedule/prior_kl_total": prior_kl * num_values,
    }


def why_it_cannot_run(schedule: NoiseSchedule, prediction_type: PredictionType = "epsilon") -> str | None:
    """A reason to prune a schedule before it costs anything, one line, or None."""
    if schedule.alphas_cumprod[0] == 1.0:
        return f"the first beta, {schedule.betas[0]:g}, is lost in float64: a larger one"
    if prediction_type == "epsilon" and schedule.betas[-1] == 1.0:
        return "alphas_cumprod_T is 0, where epsilon says nothing about x_0: prediction type v_prediction"
    # A last beta of 1, zero terminal SNR, is meant; the step before it must have kept some signal.
    steps = schedule.alphas_cumprod if schedule.betas[-1] < 1.0 else schedule.alphas_cumprod_prev
    signal = math.sqrt(steps[-1])
    if signal < SMALLEST_SIGNAL:
        return (
            f"sqrt(alphas_cumprod_T) is {signal:.1e}, below {SMALLEST_SIGNAL:g}: "
            "fewer steps or a smaller beta_end"
        )
    with np.errstate(all="ignore"):
        terms = bound_terms(schedule)
    if not (np.isfinite(terms.weights).all() and np.isfinite(terms.variances).all()):
        return "the coefficients of the reverse steps are not finite numbers: larger betas, or fewer steps"
    return None


def schedule_warnings(
    schedule: NoiseSchedule,
    window: tuple[float, float],
    num_values: int,
    *,
    prediction_type: PredictionType = "epsilon",
    clipped: bool = True,
) -> list[str]:
    """What may go badly with a schedule that can run, one line each with its numbers and a remedy.

    None of it is a verdict: gentle schedules that keep a fifth of the signal to the end can win.

    Args:
        schedule: that `why_it_cannot_run` finds nothing against.
        window: the log-SNR window of the data, `DataSpec.log_snr_window`: it starts where their
            strongest direction has a twentieth of the noise's variance, and ends where less noise hardly
            moves a sample, or is as small as the step between their values.
        num_values: d, the number of values of one example.
        prediction_type: what the network predicts.
        clipped: whether the sampler clips x0.
    """
    metrics, log_snr = schedule_metrics(schedule, num_values), schedule.log_snr
    low, high = window
    lines = []
    at_end = metrics["schedule/alphas_cumprod_T"]
    if log_snr[-1] > low + math.log(20.0):  # the strongest direction is as strong as the noise
        strongest = 0.05 * math.exp(-low)  # the largest eigenvalue, unless the window starts at -8 anyway
        along = f"; along their strongest direction its variance is {1.0 + at_end * (strongest - 1.0):.2g}"
        lines.append(
            f"x_T keeps {math.sqrt(at_end):.2g} of the data's amplitude (alphas_cumprod_T {at_end:.2g})"
            f"{along if low < -8.0 else ''}, but sampling starts from N(0, I): a mismatch of up to "
            f"{metrics['schedule/prior_kl']:.2g} nats/dim, {metrics['schedule/prior_kl_total']:.2g} in all, "
            "for data of unit variance in all directions; more steps or a larger beta_end lower it"
        )
    if log_snr[0] < high:
        lines.append(
            f"the first step's noise, {math.sqrt(schedule.betas[0]):.2g} deviations of the data, hides "
            f"detail that they have: log-SNR starts at {log_snr[0]:.2f}, the data reach {high:.2f}, and the "
            f"{(high - log_snr[0]) / 2.0:.2g} nats/dim between count as not denoised; a smaller beta_start "
            "lowers them"
        )
    outside = float(np.mean((log_snr < low) | (log_snr > high)))
    if outside > 0.5:
        lines.append(
            f"{outside:.0%} of the timesteps lie outside the log-SNR window of the data, {low:.2f} to "
            f"{high:.2f}, so most of the training teaches nothing that counts: fewer steps, or a kind of "
            "schedule that spreads them evenly, such as cosine"
        )
    within = (log_snr >= low) & (log_snr <= high)
    steps = np.where(within[:-1] & within[1:], -np.diff(np.maximum(log_snr, low - 1.0)), 0.0)
    if steps.max(initial=0.0) > _LONG_STEP:
        t = int(steps.argmax())
        lines.append(
            f"the step from t = {t + 1} to {t} changes the signal-to-noise ratio "
            f"{math.exp(steps[t]):.0f}-fold: a reverse step is Gaussian only where it is small; more steps "
            "make it smaller"
        )
    if prediction_type == "epsilon" and not clipped and at_end < _LARGEST_GAIN**-2:
        lines.append(
            f"x0 at t = T - 1 is the error in epsilon times {at_end**-0.5:.2g}, and nothing clips it: switch "
            "sampler.clip on, predict v, or keep more signal"
        )
    return lines
