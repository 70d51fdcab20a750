"""Which timesteps should a sampler with few steps visit? Measured without a trained network.

    python -m benchmarks.spacing            # 3 minutes on one core

A Gaussian mixture has a closed-form denoiser, so what separates the samples from the data is the
sampler alone: its steps, and the gap between x_T and the prior. The distance is the one by which
sweeps choose, which sees detail: by energy distance all spacings look alike from 20 steps on. Writes
benchmarks/results/spacing.md.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.evaluation.distances import kernel_distance
from diffusion.process.samplers import last_sample, sampler_table, trajectory
from diffusion.process.schedules import NoiseSchedule, Spacing, cosine_betas, linear_betas
from diffusion.registry import SAMPLERS

SCHEDULES = {
    "long: linear, T = 1000, 1e-4 to 0.02": NoiseSchedule(linear_betas(1000, 1e-4, 0.02)),
    "cosine, T = 1000": NoiseSchedule(cosine_betas(1000)),
    "gentle: linear, T = 200, 1e-5 to 0.01": NoiseSchedule(linear_betas(200, 1e-5, 0.01)),
    "steep: linear, T = 1000, 5e-4 to 0.06": NoiseSchedule(linear_betas(1000, 5e-4, 0.06)),
}
STEPS = (10, 20, 50, 100)
SEEDS = (0, 1)
NUM_SAMPLES = 1000
RESULTS = Path(__file__).parent / "results" / "spacing.md"

Array = NDArray[np.float64]


class Mixture:
    """Eight Gaussians on a ring, of unequal weight and width, with mean 0 and variance 1 on average."""

    def __init__(self) -> None:
        angles = np.arange(8) * np.pi / 4.0
        self.means = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        self.weights = np.array([4.0, 1.0, 2.0, 1.0, 3.0, 1.0, 2.0, 2.0]) / 16.0
        self.deviations = np.array([0.02, 0.05, 0.1, 0.05, 0.02, 0.2, 0.1, 0.05])
        self.means -= self.weights @ self.means
        second_moment = self.weights @ (np.square(self.means).mean(axis=1) + self.deviations**2)
        self.means, self.deviations = (
            values / np.sqrt(second_moment) for values in (self.means, self.deviations)
        )

    def draw(self, num_samples: int, rng: np.random.Generator) -> Array:
        component = rng.choice(len(self.weights), size=num_samples, p=self.weights)
        noise = rng.standard_normal((num_samples, 2))
        return self.means[component] + self.deviations[component, None] * noise

    def denoiser(self, schedule: NoiseSchedule) -> Callable[[Array, int], Array]:
        """(x_t, t) -> E[epsilon | x_t], exactly."""

        def epsilon(x: Array, timestep: int) -> Array:
            a = schedule.alphas_cumprod[timestep]
            variances = a * self.deviations**2 + 1.0 - a
            from_mean = x[:, None, :] - np.sqrt(a) * self.means
            log_density = -np.square(from_mean).sum(axis=2) / (2.0 * variances) - np.log(variances)
            share = self.weights * np.exp(log_density - log_density.max(axis=1, keepdims=True))
            share /= share.sum(axis=1, keepdims=True)
            # In component k, E[epsilon | x_t] = sqrt(1 - a) (x_t - sqrt(a) mean_k) / variance_k.
            return np.sqrt(1.0 - a) * np.einsum("nk,nkd->nd", share / variances, from_mean)

        return epsilon


def distance(
    mixture: Mixture, schedule: NoiseSchedule, sampler: str, steps: int, spacing: Spacing, seed: int
) -> float:
    """Kernel distance of samples to fresh data; all settings use the same data and noise for a seed."""
    table = sampler_table(schedule, sampler, steps, spacing=spacing)
    noise = np.random.default_rng([seed, 0])
    start = noise.standard_normal((NUM_SAMPLES, 2))
    states = trajectory(
        mixture.denoiser(schedule), start, table, lambda row: noise.standard_normal((NUM_SAMPLES, 2))
    )
    return kernel_distance(torch.from_numpy(last_sample(states)), reference(mixture, seed)).value


@cache
def reference(mixture: Mixture, seed: int) -> torch.Tensor:
    """Data for a seed, [NUM_SAMPLES, 2]."""
    return torch.from_numpy(mixture.draw(NUM_SAMPLES, np.random.default_rng([seed, 1])))


def main() -> None:
    torch.set_num_threads(1)
    mixture = Mixture()
    spacings = get_args(Spacing)
    floor = [
        kernel_distance(
            torch.from_numpy(mixture.draw(NUM_SAMPLES, np.random.default_rng([seed, 2]))),
            reference(mixture, seed),
        ).value
        for seed in SEEDS
    ]
    lines = [
        "# Which timesteps to visit",
        "",
        "`python -m benchmarks.spacing`: kernel distance (docs/judging.md) times 1000 of "
        f"{NUM_SAMPLES:,} samples to as many of a 2-D Gaussian mixture, with its closed-form denoiser; "
        f"mean and standard error over {len(SEEDS)} seeds (data and noise the same in every cell of a "
        f"seed). Data against data: {cell(floor)}. The best of a row is bold.",
    ]
    excess: dict[str, list[Array]] = {sampler: [] for sampler in SAMPLERS}
    for name, schedule in SCHEDULES.items():
        lines += [
            "",
            f"## {name} (alphas_cumprod_T = {schedule.alphas_cumprod[-1]:.2g})",
            "",
            f"| sampler | steps | {' | '.join(spacings)} |",
            f"|---|---|{'---|' * len(spacings)}",
        ]
        for sampler, steps in product(SAMPLERS, STEPS):
            found = np.array(
                [
                    [distance(mixture, schedule, sampler, steps, spacing, seed) for seed in SEEDS]
                    for spacing in spacings
                ]
            )
            best = int(found.mean(axis=1).argmin())
            excess[sampler].append(found - found[best])
            cells = [cell(values, bold=index == best) for index, values in enumerate(found)]
            lines.append(f"| {sampler} | {steps} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    lines += [
        "",
        "## In excess of the best of its row",
        "",
        "Mean over all rows above, with the standard error over seeds, and the largest row mean.",
        "",
        f"| sampler | {' | '.join(spacings)} |",
        f"|---|{'---|' * len(spacings)}",
    ]
    for sampler, rows in excess.items():
        by_row = np.stack(rows)  # [rows, spacings, seeds]
        cells = [
            f"{cell(by_row[:, index].mean(axis=0))}, at most {1e3 * by_row[:, index].mean(axis=1).max():.1f}"
            for index in range(len(spacings))
        ]
        lines.append(f"| {sampler} | {' | '.join(cells)} |")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    print(f"{RESULTS}: written")


def cell(values: list[float] | Array, bold: bool = False) -> str:
    scaled = 1e3 * np.array(values)
    mean = f"**{scaled.mean():.1f}**" if bold else f"{scaled.mean():.1f}"
    return f"{mean} ± {scaled.std(ddof=1) / np.sqrt(len(scaled)):.1f}"


if __name__ == "__main__":
    main()
