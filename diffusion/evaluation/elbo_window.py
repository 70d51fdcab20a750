"""The windowed evidence bound: a metric that is comparable between schedules of any length and shape.

The bound over a schedule's own discrete steps is in `diffusion.evaluation.variational_bound`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.devices import to_float64
from diffusion.evaluation.sharing import ALONE, Workers
from diffusion.evaluation.variational_bound import HeldOutBound, kl_to_prior
from diffusion.process.forward import q_sample, to_x_0
from diffusion.process.generate import apply_in_batches
from diffusion.process.prediction_types import PredictionType
from diffusion.process.schedules import Float64Array, NoiseSchedule

_POINTS_PER_LOG_SNR = 6


@dataclass(frozen=True, eq=False)
class ElboWindow(HeldOutBound):
    """Half the integral of the epsilon error over a window of log-SNR, in nats per dimension.

    Attributes:
        above: part of `value` above the first timestep's log-SNR, in closed form.
        below: part of `value` below the last timestep's log-SNR, in closed form.
        log_snr: float64 [points], ascending log-SNRs at which the network was measured.
        errors: float64 [points], mean squared epsilon error at each `log_snr`.
    """

    above: float
    below: float
    log_snr: Float64Array
    errors: Float64Array


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
    max_points: int | None = None,
    inputs: Sequence[Tensor] = (),
    workers: Workers = ALONE,
) -> ElboWindow:
    """Half the integral of E|epsilon - epsilon_hat|^2 / d over log-SNR in `window`, in nats/dim.

    The network is measured at timesteps of its own schedule: at most `max_points` of them, evenly
    spread over the window, and the next one beyond each end. The error is interpolated linearly in
    between. Each point of the window has noise of its own, with which the nearest of these timesteps is
    measured. So a timestep of a coarse schedule is measured several times, and all schedules share most of
    their noise, which cancels in differences.

    Below the last timestep's log-SNR, the error is that of the denoiser of N(0, I),
    a^2 + a (1 - a) E|x_0|^2 / d with a = sigmoid(log-SNR). Above the first timestep's log-SNR the network
    says nothing: samplers return its x_0 there. That x_0 is taken as a normal law with the variance of its
    own error, and the error is that of the denoiser of this law, see `_above_first_timestep`. A schedule
    that ends early is thus neither excused from what it leaves undone, nor charged for more.

    With a clip interval, examples are clipped like the network's x_0, since samples cannot lie outside: an
    example far beyond the interval costs what one at its end does, instead of the square of its distance
    times the SNR. Without one, the influence of an example is not bounded.

    The noise depends only on the seed, the example and the position in the window, so the bounds of two
    trials can be compared example by example.

    Args:
        network: (x_t, timesteps) -> output, in evaluation mode.
        schedule: the schedule that the network was trained on.
        x_0: [examples, ...] held-out data in normalised units.
        window: lowest and highest log-SNR, see `diffusion.data.dataset.log_snr_window`.
        prediction_type: quantity that the network predicts.
        clip: the sampler's clip interval for x0, or None.
        seed: seed of the noise.
        max_points: number of grid points in the window; by default six for each unit of log-SNR.
        inputs: further inputs of the network, such as labels, each [examples, ...].
        workers: share the calls of the network, which are independent of each other.

    Source: VDM, arXiv:2107.00630, Eq. 15 (continuous time; the integrand over log-SNR is half the
    squared epsilon error whatever the schedule).
    """
    low, high = window
    if clip is not None:
        x_0 = x_0.clip(*clip)
    first, last = schedule.log_snr[0], schedule.log_snr[np.isfinite(schedule.log_snr)][-1]
    grid = np.linspace(low, high, max_points or math.ceil(_POINTS_PER_LOG_SNR * (high - low)) + 1)
    measured = _timesteps_to_measure(schedule, grid)

    def error(call: tuple[int, int]) -> Float64Array:
        timestep, point = call
        noise_seed = _noise_seed(seed, point)
        return _epsilon_error(network, schedule, x_0, timestep, prediction_type, clip, noise_seed, inputs)

    each = iter(workers.map(error, [(t, point) for t, points in measured.items() for point in points]))
    errors = np.stack([np.mean([next(each) for _ in points], axis=0) for points in measured.values()])
    nodes = schedule.log_snr[list(measured)]
    weights = integration_weights(nodes, max(low, last), min(high, first))
    above = _above_first_timestep(errors[-1] * np.exp(-nodes[-1]), first, max(low, first), max(high, first))
    second_moment = to_float64(x_0).flatten(1).square().mean(dim=1).cpu().numpy()
    below = kl_to_prior(second_moment, min(last, high)) - kl_to_prior(second_moment, low)
    below = below if last > low else np.zeros_like(second_moment)
    return ElboWindow(
        per_example=0.5 * weights @ errors + above + below,
        above=float(above.mean()),
        below=float(below.mean()),
        log_snr=nodes,
        errors=errors.mean(axis=1),
    )


def _above_first_timestep(squared: Float64Array, first: float, low: float, high: float) -> Float64Array:
    """Half the integral over [low, high] of the epsilon error of a normal law around each example's x0_hat.

    Given x_t at the first timestep, x_0 is taken as N(x0_hat, v I) with v the mean squared error of x0_hat.
    A larger log-SNR adds an independent observation of x_0 of precision p = exp(log-SNR) - exp(first), so
    that the squared error per dimension is (squared / v^2 + p) / (1 / v + p)^2. Its integral over p, half of
    which is the integral sought, is ln(1 + p v) + (squared - v) p / (1 + p v). For normal data this is
    exact, whatever the schedule.

    Args:
        squared: float64 [examples], mean squared error of x0_hat at the first timestep.
        first: log-SNR of the first timestep.
        low, high: ends of the integral, at least `first`.

    Returns:
        float64 [examples].

    Source: I-MMSE relation, arXiv:cs/0412108, Theorem 1.
    """
    v = squared.mean()

    def integral(log_snr: float) -> Float64Array:
        p = math.exp(log_snr) - math.exp(first)
        return 0.5 * (math.log1p(p * v) + (squared - v) * p / (1.0 + p * v))

    return integral(high) - integral(low)


def _timesteps_to_measure(schedule: NoiseSchedule, grid: Float64Array) -> dict[int, list[int]]:
    """Timesteps in order of ascending log-SNR, each with the indices of the grid points it is measured for.

    They are the grid points to which it is the nearest timestep, and at least the one nearest to it. A
    timestep without any signal (log-SNR -inf) cannot be interpolated to, so it is left out: the closed
    form of the prior already applies from the timestep before it.
    """
    ascending = schedule.log_snr[::-1]
    nearest = {int(np.abs(ascending - value).argmin()) for value in grid}
    inside = np.array(
        sorted(index for index in nearest if grid[0] <= ascending[index] <= grid[-1]), dtype=np.int64
    )
    below = np.searchsorted(ascending, grid[0]) - 1
    above = np.searchsorted(ascending, grid[-1], side="right")
    ends = [i for i in (below, above) if 0 <= i < ascending.size and np.isfinite(ascending[i])]
    indices = np.unique(np.concatenate([inside, np.array(ends, dtype=np.int64)]))
    distances = np.abs(grid[None, :] - ascending[indices, None])
    points = [{int(point)} for point in distances.argmin(axis=1)]
    for point in np.flatnonzero(grid >= ascending[indices[0]]):  # below, a closed form is used instead
        points[distances[:, point].argmin()].add(int(point))
    timesteps = ascending.size - 1 - indices
    return {int(t): sorted(each) for t, each in zip(timesteps, points, strict=True)}


def _noise_seed(seed: int, grid_index: int) -> int:
    """Seed of an independent noise stream for each grid point, unlike any plain seed of a torch generator."""
    return int(np.random.SeedSequence((seed, grid_index)).generate_state(1, np.uint64)[0])


def _epsilon_error(
    network: nn.Module,
    schedule: NoiseSchedule,
    x_0: Tensor,
    timestep: int,
    prediction_type: PredictionType,
    clip: tuple[float, float] | None,
    seed: int,
    inputs: Sequence[Tensor],
) -> Float64Array:
    """Squared epsilon error of each example, averaged over dimensions: float64 [examples].

    It is computed from the clipped x0_hat, since epsilon - epsilon_hat = exp(log_snr / 2) (x0_hat - x_0).
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
    timesteps = torch.full((len(x_0),), timestep, dtype=torch.int64, device=x_0.device)
    x_t = q_sample(schedule, x_0, timesteps, noise)
    output = to_float64(apply_in_batches(network, x_t, timesteps, *inputs))
    x0_hat = to_x_0(schedule, prediction_type, output, to_float64(x_t), timesteps)
    if clip is not None:
        x0_hat = x0_hat.clip(*clip)
    squared = (x0_hat - to_float64(x_0)).square().flatten(1).mean(dim=1)
    return np.exp(schedule.log_snr[timestep]) * squared.cpu().numpy()


def integration_weights(nodes: Float64Array, low: float, high: float) -> Float64Array:
    """Weights w such that w @ f is the integral of f over [low, high].

    Args:
        nodes: float64 [points], ascending; f is interpolated linearly between its values there.
        low, high: ends of the interval; any part of it outside the nodes counts 0.
    """
    weights = np.zeros_like(nodes)
    left, right = np.clip(nodes[:-1], low, high), np.clip(nodes[1:], low, high)
    width = np.maximum(right - left, 0.0)
    fraction = ((left + right) / 2.0 - nodes[:-1]) / np.diff(nodes)
    weights[:-1] += width * (1.0 - fraction)
    weights[1:] += width * fraction
    return weights
