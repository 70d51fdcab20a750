"""The windowed evidence bound: a figure that schedules of any length and shape share.

The discrete bound of a schedule's own steps is `diffusion.variational`'s, and can be had from here too.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.portions import in_portions
from diffusion.process import q_sample, to_x_0
from diffusion.sampling import PredictionType
from diffusion.schedules import Float64Array, NoiseSchedule
from diffusion.variational import VariationalBound, kl_to_prior, variational_bound

__all__ = ["ElboWindow", "VariationalBound", "elbo_window", "log_snr_window", "variational_bound"]

_HIGHEST = 3.0  # log-SNR


@dataclass(frozen=True, eq=False)
class ElboWindow:
    """Half the integral of the epsilon error over a window of log-SNR, in nats per dimension.

    Attributes:
        per_example: float64 [examples], the bound of each; their mean is `value`.
        above: the part of `value` above the first timestep's log-SNR, counted as "no denoising".
        below: the part of `value` below the last timestep's log-SNR, in closed form.
        log_snr: float64 [points], rising: where the network was measured.
        errors: float64 [points], the mean squared epsilon error there.
    """

    per_example: Float64Array
    above: float
    below: float
    log_snr: Float64Array
    errors: Float64Array

    @property
    def value(self) -> float:
        """The mean over the examples: lower is better."""
        return float(self.per_example.mean())

    @property
    def standard_error(self) -> float:
        """Of `value`, over the examples."""
        return float(self.per_example.std(ddof=1) / np.sqrt(self.per_example.size))


def log_snr_window(x_0: Tensor, value_step: float) -> tuple[float, float]:
    """The window of log-SNR that a data set is judged in.

    It starts where even the strongest direction of the data has drowned in noise, at
    min(-8, ln(0.05 / largest eigenvalue of E[x_0 x_0^T])), and ends at 3, or where noise is as small as the
    data's own rounding, -ln(value_step^2 / 12), if that comes first.

    Why 3: of the upper ends from 0 to 8 it ranks trained models most like their samples, by three samplers
    and several distances (benchmarks/results). What happens at less noise hardly moves a sample, and yet
    would make up most of a longer integral's differences.

    Args:
        x_0: [examples, ...] training data in normalised units.
        value_step: smallest distance between data values, in normalised units.
    """
    flat = x_0.flatten(1)
    largest = _largest_singular_value(flat) ** 2 / len(flat)
    return min(-8.0, float(np.log(0.05 / largest))), min(_HIGHEST, float(-np.log(value_step**2 / 12.0)))


def _largest_singular_value(matrix: Tensor) -> float:
    if matrix.shape[1] <= 1024:
        return float(torch.linalg.eigvalsh(matrix.T.double() @ matrix.double())[-1].sqrt())
    # Too wide for all of them; the random start must not move the caller's random numbers.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float(torch.svd_lowrank(matrix, q=8, niter=8)[1][0])


@torch.no_grad()
def elbo_window(
    network: nn.Module,
    schedule: NoiseSchedule,
    x_0: Tensor,
    window: tuple[float, float],
    *,
    prediction_type: PredictionType = "epsilon",
    clip: tuple[float, float] | None = None,
    seed: int = 0,
    max_points: int = 64,
    labels: Tensor | None = None,
) -> ElboWindow:
    """Half the integral of E|epsilon - epsilon_hat|^2 / d over log-SNR in `window`, in nats/dim.

    The network is measured at its own timesteps, at most `max_points` of them evenly over the
    window (and the next one beyond each end), and interpolated linearly in between. Below the last
    timestep's log-SNR stands the denoiser of N(0, I), whose error is
    a^2 + a (1 - a) E|x_0|^2 / d with a = sigmoid(log-SNR); above the first timestep's an error of 1.
    The noise depends on seed, example and place in the window alone, so trials can be compared in
    pairs.

    Args:
        network: (x_t, timesteps) -> output, in evaluation mode.
        schedule: the schedule that it was trained on.
        x_0: [examples, ...] held-out data in normalised units.
        window: lowest and highest log-SNR, see `log_snr_window`.
        prediction_type: what the output means.
        clip: the sampler's clip interval for x0, or None.
        seed: of the noise.
        max_points: size of the grid.
        labels: int64 [examples] for a conditional network.

    Source: VDM, arXiv:2107.00630, Eq. 15 (continuous time; the integrand over log-SNR is half the
    squared epsilon error whatever the schedule).
    """
    low, high = window
    first, last = schedule.log_snr[0], schedule.log_snr[np.isfinite(schedule.log_snr)][-1]
    grid = np.linspace(low, high, max_points)
    timesteps, places = _measured_timesteps(schedule, grid)
    errors = np.stack(
        [
            _epsilon_error(
                network, schedule, x_0, int(t), prediction_type, clip, _noise_seed(seed, int(place)), labels
            )
            for t, place in zip(timesteps, places, strict=True)
        ]
    )
    nodes = schedule.log_snr[timesteps]
    weights = _integration_weights(nodes, max(low, last), min(high, first))
    above = 0.5 * max(0.0, high - max(first, low))
    second_moment = x_0.flatten(1).double().square().mean(dim=1).cpu().numpy()
    below = kl_to_prior(second_moment, min(last, high)) - kl_to_prior(second_moment, low)
    below = below if last > low else np.zeros_like(second_moment)
    return ElboWindow(
        per_example=0.5 * weights @ errors + above + below,
        above=above,
        below=float(below.mean()),
        log_snr=nodes,
        errors=errors.mean(axis=1),
    )


def _measured_timesteps(
    schedule: NoiseSchedule, grid: Float64Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Timesteps in order of rising log-SNR, and for each the grid point whose noise it takes.

    A timestep without any signal (log-SNR -inf) cannot be interpolated to: the prior's closed form
    stands from the one before it.
    """
    rising = schedule.log_snr[::-1]
    nearest = {int(np.abs(rising - value).argmin()) for value in grid}
    inside = np.array(
        sorted(index for index in nearest if grid[0] <= rising[index] <= grid[-1]), dtype=np.int64
    )
    below = np.searchsorted(rising, grid[0]) - 1
    above = np.searchsorted(rising, grid[-1], side="right")
    ends = [index for index in (below, above) if 0 <= index < rising.size and np.isfinite(rising[index])]
    indices = np.unique(np.concatenate([inside, np.array(ends, dtype=np.int64)]))
    places = np.abs(grid[None, :] - rising[indices, None]).argmin(axis=1)
    return rising.size - 1 - indices, places


def _noise_seed(seed: int, place: int) -> int:
    """A stream of its own for each place, which no plain seed of torch's generator repeats."""
    return int(np.random.SeedSequence((seed, place)).generate_state(1, np.uint64)[0])


def _epsilon_error(
    network: nn.Module,
    schedule: NoiseSchedule,
    x_0: Tensor,
    timestep: int,
    prediction_type: PredictionType,
    clip: tuple[float, float] | None,
    seed: int,
    labels: Tensor | None,
) -> Float64Array:
    """Squared epsilon error per example, averaged over dimensions, with x0 clipped: float64 [examples].

    After clipping, epsilon - epsilon_hat is exp(log_snr / 2) (x0_hat - x_0).
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
    timesteps = torch.full((len(x_0),), timestep, dtype=torch.int64, device=x_0.device)
    x_t = q_sample(schedule, x_0, timesteps, noise)
    output = in_portions(network, x_t, timesteps, labels).double()
    x0_hat = to_x_0(schedule, prediction_type, output, x_t.double(), timesteps)
    if clip is not None:
        x0_hat = x0_hat.clip(*clip)
    squared = (x0_hat - x_0.double()).square().flatten(1).mean(dim=1)
    return np.exp(schedule.log_snr[timestep]) * squared.cpu().numpy()


def _integration_weights(nodes: Float64Array, low: float, high: float) -> Float64Array:
    """Weights w with w @ f = integral over [low, high] of f interpolated linearly between nodes."""
    weights = np.zeros_like(nodes)
    left, right = np.clip(nodes[:-1], low, high), np.clip(nodes[1:], low, high)
    width = np.maximum(right - left, 0.0)
    share = ((left + right) / 2.0 - nodes[:-1]) / np.diff(nodes)
    weights[:-1] += width * (1.0 - share)
    weights[1:] += width * share
    return weights
