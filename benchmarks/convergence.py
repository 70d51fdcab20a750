"""How fast does each sampler converge? Its order, on data whose denoiser is known in closed form.

    python -m benchmarks.convergence            # a minute on one core

Deterministic samplers: the largest distance between their end points and those of the probability flow from
the same noise, for a mixture of Gaussians. The flow is solved to 12 digits with the score of the mixture, in
sigma and without the schedule's timesteps; the last denoising, from timestep 0, is the same in both. Samplers
with noise: the error of the variance of their samples (the weak error), for Gaussian data. Its denoiser is
linear, so a table's samples are Gaussian, and their moments follow row by row, without Monte Carlo error.
The churn of heun_churn is EDM's S_churn = 2, as its number of steps grows. Writes
benchmarks/results/convergence.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from diffusion.process.samplers import SamplerTable, last_sample, sampler_table, trajectory
from diffusion.process.sampling_methods import LARGEST_CHURN
from diffusion.process.schedules import NoiseSchedule, Spacing, cosine_betas, linear_betas
from diffusion.registry import SAMPLERS

Array = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results" / "convergence.md"
NUM_TIMESTEPS = 10_241  # many, so that the timesteps of a spacing lie where it wants them
INTERVALS = (20, 40, 80, 160, 320, 640)
SPACINGS: tuple[Spacing, ...] = ("logsnr", "karras")
START = np.linspace(-2.0, 2.0, 9)
S_CHURN = 2.0
MEAN, VARIANCE = 0.7, 0.3  # of the Gaussian data


def equal_log_snr_steps(num_timesteps: int) -> NoiseSchedule:
    """A schedule from log-SNR 8 to -9 in equal steps."""
    alphas_cumprod = 1.0 / (1.0 + np.exp(-np.linspace(8.0, -9.0, num_timesteps)))
    return NoiseSchedule(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


SCHEDULES = {
    "equal steps in log-SNR": equal_log_snr_steps(NUM_TIMESTEPS),
    "linear": NoiseSchedule(linear_betas(NUM_TIMESTEPS, 1e-6, 2e-3)),
    "cosine": NoiseSchedule(np.minimum(cosine_betas(NUM_TIMESTEPS), 0.01)),
}


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians in one dimension."""

    means: Array
    deviations: Array
    weights: Array

    def epsilon(self, x: Array, alphas_cumprod: float) -> Array:
        """E[epsilon | x_t], exactly: in component k it is sqrt(1 - a) (x_t - sqrt(a) mean_k) / variance_k."""
        variances = alphas_cumprod * self.deviations**2 + 1.0 - alphas_cumprod
        from_mean = x[:, None] - np.sqrt(alphas_cumprod) * self.means
        log_share = np.log(self.weights) - from_mean**2 / (2.0 * variances) - np.log(variances) / 2.0
        share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        return np.sqrt(1.0 - alphas_cumprod) * (share * from_mean / variances).sum(axis=1)

    def denoiser(self, schedule: NoiseSchedule) -> Callable[[Array, int], Array]:
        """(x_t, t) -> E[epsilon | x_t]."""
        return lambda x, timestep: self.epsilon(x, schedule.alphas_cumprod[timestep])


MIXTURE = Mixture(np.array([-1.2, 0.3, 1.1]), np.array([0.3, 0.2, 0.35]), np.array([0.3, 0.3, 0.4]))


def flow_end(mixture: Mixture, schedule: NoiseSchedule, start: Array = START) -> Array:
    """Where the probability flow ends from x_T, denoised from timestep 0.

    It is d(x / sqrt(a)) = epsilon d(sigma) with sigma = sqrt((1 - a) / a) (DDIM, arXiv:2010.02502, Eq. 14),
    solved in log sigma by an explicit Runge-Kutta method of order 8.
    """
    first, last = schedule.alphas_cumprod[-1], schedule.alphas_cumprod[0]

    def slope(log_sigma: float, u: Array) -> Array:
        sigma = np.exp(log_sigma)
        alphas_cumprod = 1.0 / (1.0 + sigma**2)
        return sigma * mixture.epsilon(np.sqrt(alphas_cumprod) * u, alphas_cumprod)

    span = tuple(0.5 * np.log((1.0 - a) / a) for a in (first, last))
    solved = solve_ivp(slope, span, start / np.sqrt(first), method="DOP853", rtol=1e-12, atol=1e-13)
    x = np.sqrt(last) * solved.y[:, -1]
    return (x - np.sqrt(1.0 - last) * mixture.epsilon(x, last)) / np.sqrt(last)


def end_point_error(mixture: Mixture, schedule: NoiseSchedule, table: SamplerTable, expected: Array) -> float:
    """Largest error of a deterministic sampler's end points, if the flow's are `expected`."""
    states = trajectory(mixture.denoiser(schedule), START.copy(), table, lambda row: np.nan)
    return float(np.abs(last_sample(states) - expected).max())


def gaussian_moments(table: SamplerTable, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance of a table's samples for x_0 ~ N(mean, variance), from the exact marginal of x_T.

    The state of the sampler, (x, x0_previous, x0_previous_2, 1), is Gaussian, and each row maps it linearly.
    """
    a = table.alphas_cumprod[0]
    state = np.array([np.sqrt(a) * mean, 0.0, 0.0, 1.0])
    covariance = np.diag([a * variance + 1.0 - a, 0.0, 0.0, 0.0])
    x, x0_previous, x0_previous_2, one = np.eye(4)
    for index, a in enumerate(table.alphas_cumprod[:-1]):
        row = {name: float(table.column(name)[index]) for name in (*"abcdefs", "e2")}
        out = np.sqrt(1.0 - a) / (a * variance + 1.0 - a) * (x - np.sqrt(a) * mean * one)
        x0 = row["a"] * x + row["b"] * out
        x_next = row["c"] * x0 + row["d"] * x + row["f"] * out
        x_next = x_next + row["e"] * x0_previous + row["e2"] * x0_previous_2
        step = np.stack([x_next, x0, x0_previous, one])
        state, covariance = step @ state, step @ covariance @ step.T
        covariance[0, 0] += row["s"] ** 2
    return float(state[0]), float(covariance[0, 0])


def weak_error(table: SamplerTable, mean: float = MEAN, variance: float = VARIANCE) -> float:
    """Error of the variance of a table's samples; that of timestep 0's marginal, denoised, is exact."""
    a = table.alphas_cumprod[-2]
    factor = np.sqrt(a) * variance / (a * variance + 1.0 - a)  # E[x_0 | x_t] = factor x_t + a constant
    return abs(gaussian_moments(table, mean, variance)[1] - factor**2 * (a * variance + 1.0 - a))


def table_of(schedule: NoiseSchedule, sampler: str, intervals: int, spacing: Spacing) -> SamplerTable:
    """A sampler with this many steps between timesteps; heun_churn with `S_CHURN`."""
    eta = min(1.0, S_CHURN / (intervals * LARGEST_CHURN)) if sampler == "heun_churn" else None
    return sampler_table(schedule, sampler, intervals + 1, spacing=spacing, eta=eta)


def errors(schedule: NoiseSchedule, sampler: str, intervals: tuple[int, ...], spacing: Spacing) -> Array:
    """Errors by number of steps: of the end points, or of the variance for a sampler with noise."""
    tables = [table_of(schedule, sampler, number, spacing) for number in intervals]
    if any(table.column("s").any() for table in tables):
        return np.array([weak_error(table) for table in tables])
    expected = flow_end(MIXTURE, schedule)
    return np.array([end_point_error(MIXTURE, schedule, table, expected) for table in tables])


def order(intervals: tuple[int, ...], found: Array) -> float:
    """The fitted slope of the error's logarithm against that of the step's length."""
    return float(-np.polyfit(np.log(intervals), np.log(found), 1)[0])


def published_third_order(schedule: NoiseSchedule, intervals: tuple[int, ...], spacing: Spacing) -> Array:
    """Errors of DPM-Solver++(3M) as diffusers has it."""
    from benchmarks.diffusers_reference import diffusers_trajectory

    expected, found = flow_end(MIXTURE, schedule), []
    denoise = MIXTURE.denoiser(schedule)
    for number in intervals:
        table = table_of(schedule, "dpmpp_3m", number, spacing)
        states = diffusers_trajectory(
            "dpmpp_3m_published",
            table,
            schedule,
            torch.from_numpy(START),
            torch.zeros(table.num_rows, 1),
            lambda x, timestep: torch.from_numpy(denoise(x.double().numpy(), timestep)),
            spacing=spacing,
        )
        found.append(float(np.abs(states[-1].numpy() - expected).max()))
    return np.array(found)


def main() -> None:
    lines = [
        "# Order of convergence",
        "",
        "Written by `python -m benchmarks.convergence`: errors of samplers with an exact denoiser, by the",
        "number of steps between timesteps. The order is the slope over the last three. Deterministic",
        "samplers: largest error of nine end points of the probability flow of a mixture of Gaussians.",
        f"Samplers with noise (*): error of the variance of samples of N({MEAN}, {VARIANCE}); heun_churn has",
        f"S_churn = {S_CHURN:g}. Last row: DPM-Solver++(3M) as diffusers computes it, in float32, with half",
        "of phi_3 (see `diffusion.process.sampling_methods.dpmpp_3m`).",
    ]
    for name, schedule in SCHEDULES.items():
        for spacing in SPACINGS:
            lines += [
                "",
                f"## {name}, T = {NUM_TIMESTEPS:,}, spacing {spacing}",
                "",
                f"| sampler | {' | '.join(map(str, INTERVALS))} | order |",
                f"|---|{'---|' * len(INTERVALS)}---|",
            ]
            rows = {sampler: errors(schedule, sampler, INTERVALS, spacing) for sampler in SAMPLERS}
            rows["dpmpp_3m, published"] = published_third_order(schedule, INTERVALS, spacing)
            for sampler, found in rows.items():
                has_noise = sampler in SAMPLERS and any(table_of(schedule, sampler, 20, spacing).column("s"))
                cells = " | ".join(f"{value:.2g}" for value in found)
                fitted = order(INTERVALS[-3:], found[-3:])
                lines.append(f"| {sampler}{'*' if has_noise else ''} | {cells} | {fitted:.2f} |")
                print(name, lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    print(f"{RESULTS}: written")


if __name__ == "__main__":
    main()
