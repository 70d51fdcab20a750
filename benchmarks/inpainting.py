"""How wrong is inpainting by replacement, and what does resampling do to it? Measured without a network.

    python -m benchmarks.inpainting            # 3 minutes on one core

Data are Gaussians, whose denoiser and conditional distributions have closed forms. Every row of a sampler is
then affine, so the mean and covariance of the samples follow exactly, without drawing any (`law`). Samples
that the sampler draws are compared with that law. Writes benchmarks/results/inpainting.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.process.inpainting import Inpainting
from diffusion.process.samplers import SamplerTable, last_sample, sampler_table, trajectory
from diffusion.process.schedules import NoiseSchedule, cosine_betas, linear_betas
from diffusion.registry import SAMPLERS

Array = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results" / "inpainting.md"
COSINE = NoiseSchedule(cosine_betas(1000))
RESAMPLING = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Data from N(mean, covariance), of which some values are known.

    Attributes:
        mean: [d].
        covariance: [d, d].
        known: bool [d].
    """

    mean: Array
    covariance: Array
    known: NDArray[np.bool_]

    def conditional(self) -> tuple[Array, Array]:
        """Slope [unknown, known] of the unknown values' mean by the known ones, and their covariance."""
        of_known = self.covariance[np.ix_(self.known, self.known)]
        across = self.covariance[np.ix_(~self.known, self.known)]
        slope = np.linalg.solve(of_known, across.T).T
        return slope, self.covariance[np.ix_(~self.known, ~self.known)] - slope @ across.T

    def posterior_mean(self, alphas_cumprod: float) -> tuple[Array, Array]:
        """Matrix and offset of E[x_0 | x_t] = matrix x_t + offset."""
        noisy = alphas_cumprod * self.covariance + (1.0 - alphas_cumprod) * np.eye(len(self.mean))
        matrix = np.sqrt(alphas_cumprod) * np.linalg.solve(noisy, self.covariance).T
        return matrix, self.mean - matrix @ (np.sqrt(alphas_cumprod) * self.mean)

    def denoiser(self, schedule: NoiseSchedule) -> Callable[[Array, int], Array]:
        """(x_t [batch, d], t) -> E[epsilon | x_t], exactly."""
        affine = [self.posterior_mean(each) for each in schedule.alphas_cumprod]

        def epsilon(x: Array, timestep: int) -> Array:
            a = schedule.alphas_cumprod[timestep]
            matrix, offset = affine[timestep]
            return (x - np.sqrt(a) * (x @ matrix.T + offset)) / np.sqrt(1.0 - a)

        return epsilon


def pair(correlation: float = 0.8) -> Gaussian:
    """Two values of variance 1, the first of which is known."""
    covariance = np.array([[1.0, correlation], [correlation, 1.0]])
    return Gaussian(np.zeros(2), covariance, np.array([True, False]))


def chain(size: int = 8, correlation: float = 0.9) -> Gaussian:
    """Values in a row, each correlated with its neighbours, every second of which is known."""
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    return Gaussian(np.zeros(size), correlation**distance, np.arange(size) % 2 == 0)


def picture(side: int = 6) -> Gaussian:
    """A smooth picture with a little noise, the upper half of which is known."""
    places = np.stack(np.divmod(np.arange(side * side), side), axis=1)
    distance = np.square(places[:, None] - places[None]).sum(axis=2)
    covariance = 0.95 * np.exp(-distance / 8.0) + 0.05 * np.eye(side * side)
    return Gaussian(np.zeros(side * side), covariance, places[:, 0] < side // 2)


GAUSSIANS = {"pair": pair(), "chain": chain(), "picture": picture()}


def law(
    data: Gaussian, table: SamplerTable, resampling: int = 1, jump_length: int = 1
) -> tuple[Array, Array, Array]:
    """Distribution of the unknown values that a sampler draws, exactly.

    Returns:
        Offset [unknown] and slope [unknown, known] of their mean, offset + slope known_values, and their
        covariance [unknown, unknown].
    """
    size = len(data.mean)
    eye, unknown = np.eye(size), np.diag(1.0 - data.known)
    inject = np.concatenate([np.zeros((size, 1)), eye[:, data.known]], axis=1)  # known values are [1, values]
    # The state is x, x0_previous and x0_previous_2 on top of each other: its mean is by [1, values].
    mean, covariance = np.zeros((3 * size, inject.shape[1])), np.zeros((3 * size, 3 * size))
    covariance[:size, :size] = eye

    def transform(matrix: Array, offset: Array, variance: Array) -> None:
        nonlocal mean, covariance
        mean, covariance = matrix @ mean, matrix @ covariance @ matrix.T
        mean[:size] += offset
        covariance[:size, :size] += variance

    def replace_known(level: float) -> None:
        matrix = np.eye(3 * size)
        matrix[:size, :size] = unknown
        transform(matrix, np.sqrt(level) * inject, (1.0 - level) * (eye - unknown))

    levels, columns = table.alphas_cumprod, {name: table.column(name) for name in (*table.columns, "e2")}
    replace_known(levels[0])
    for run in Inpainting(np.zeros(1), np.ones(1), resampling, jump_length).runs(table):
        if run.signal is not None:
            matrix = np.eye(3 * size)
            matrix[:size, :size] *= np.sqrt(run.signal)
            transform(matrix, np.zeros(inject.shape), (1.0 - run.signal) * eye)
        a, b, c, d, e, e2, f, s = (
            columns[name][run.row] for name in ("a", "b", "c", "d", "e", "e2", "f", "s")
        )
        to_x0, x0_offset = data.posterior_mean(levels[run.row])
        to_out, out_offset = (to_x0 - a * eye) / b, x0_offset / b
        zero = np.zeros((size, size))
        matrix = np.block(
            [[c * to_x0 + d * eye + f * to_out, e * eye, e2 * eye], [to_x0, zero, zero], [zero, eye, zero]]
        )
        offset = np.zeros(inject.shape)
        offset[:, 0] = c * x0_offset + f * out_offset
        transform(matrix, offset, s**2 * eye)
        mean[size : 2 * size, 0] += x0_offset
        replace_known(levels[run.row + 1])
    rows = np.flatnonzero(~data.known)
    return mean[rows, 0], mean[rows, 1:], covariance[np.ix_(rows, rows)]


def errors(
    data: Gaussian, table: SamplerTable, resampling: int = 1, jump_length: int = 1
) -> tuple[float, float]:
    """Relative errors of the conditional mean and of the conditional covariance.

    That of the mean is the root mean square over known values from the data, by that of the true mean's
    distance to the mean of all data: 1 if the known values had no effect. That of the covariance is by the
    Frobenius norm.
    """
    slope, covariance = data.conditional()
    _, drawn_slope, drawn_covariance = law(data, table, resampling, jump_length)
    of_known = data.covariance[np.ix_(data.known, data.known)]

    def mean_square(of: Array) -> float:
        return float(np.trace(of @ of_known @ of.T))

    difference = np.linalg.norm(drawn_covariance - covariance) / np.linalg.norm(covariance)
    return np.sqrt(mean_square(drawn_slope - slope) / mean_square(slope)), float(difference)


def draw(
    data: Gaussian, schedule: NoiseSchedule, table: SamplerTable, values: Array, num_samples: int,
    resampling: int = 1, jump_length: int = 1, seed: int = 0,
) -> Array:  # fmt: skip
    """Unknown values [num_samples, unknown] that the sampler draws for known values [known]."""
    known = np.zeros(len(data.mean))
    known[data.known] = values
    generator = np.random.default_rng(seed)

    def noise(_index: int) -> Array:
        return generator.standard_normal((num_samples, len(data.mean)))

    inpainting = Inpainting(known, 1.0 - data.known, resampling, jump_length)
    states = trajectory(data.denoiser(schedule), noise(-1), table, noise, inpainting)
    return last_sample(states)[:, ~data.known]


def deviations(samples: Array, mean: Array, covariance: Array) -> Array:
    """Differences of samples' moments from a Gaussian's, each in units of its standard error."""
    count = len(samples)
    of_mean = (samples.mean(axis=0) - mean) / np.sqrt(np.diag(covariance) / count)
    variances = np.diag(covariance)
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / (count - 1))
    return np.concatenate([of_mean, ((np.cov(samples.T) - covariance) / error)[np.triu_indices(len(mean))]])


def cells(
    settings: Sequence[tuple[str, dict[str, Any]]], names: Sequence[str] = tuple(GAUSSIANS)
) -> Iterator[str]:
    """Lines of a table: a label, and the errors for each Gaussian."""
    for label, options in settings:
        found = (errors(GAUSSIANS[name], **options) for name in names)
        yield f"| {label} | " + " | ".join(f"{mean:.3f}, {cov:.3f}" for mean, cov in found) + " |"


def by_steps() -> Iterator[str]:
    settings = [
        (f"{name} | {steps}", {"table": sampler_table(COSINE, name, steps)})
        for name, numbers in (
            ("ddpm", (50, 250, 1000)),
            ("ddim", (50, 250, 1000)),
            ("dpmpp_2m", (20, 50, 250)),
        )
        for steps in numbers
    ]
    yield from ["| sampler | steps | pair | chain | picture |", "|---|---|---|---|---|", *cells(settings)]


def by_timesteps() -> Iterator[str]:
    """With linear betas scaled so that alphas_cumprod_T is about the same, and with ones that keep signal."""
    schedules = {
        **{
            f"linear, T = {count}": linear_betas(count, 0.1 / count, 20.0 / count)
            for count in (100, 200, 1000)
        },
        "cosine, T = 200": cosine_betas(200),
        "linear, T = 200, to 0.016": linear_betas(200, 1e-4, 0.016),
    }
    settings = []
    for name, betas in schedules.items():
        schedule = NoiseSchedule(betas)
        label = f"{name} | {schedule.alphas_cumprod[-1]:.2g}"
        settings.append((label, {"table": sampler_table(schedule, "ddpm", len(betas))}))
    yield from ["| schedule | alphas_cumprod_T | pair | chain | picture |", "|---|---|---|---|---|"]
    yield from cells(settings)


def by_sampler() -> Iterator[str]:
    yield "| sampler | network calls, resampling 1 | pair, resampling 1 | 5 | 20 | chain, 1 | 5 | 20 |"
    yield "|---" * 8 + "|"
    for name in SAMPLERS:
        table = sampler_table(COSINE, name, 20)
        settings = product(("pair", "chain"), (1, 5, 20))
        found = [errors(GAUSSIANS[data], table, number) for data, number in settings]
        shown = " | ".join(f"{mean:.3f}, {covariance:.3f}" for mean, covariance in found)
        yield f"| {name} | {calls(table, 1)} | {shown} |"


def by_resampling() -> Iterator[str]:
    yield from ["| sampler | steps | resampling | network calls | pair | chain | picture |", "|---" * 7 + "|"]
    for name, steps in (("ddpm", 50), ("ddpm", 250), ("ddim", 50), ("dpmpp_2m", 20), ("dpmpp_2m_sde", 20)):
        table = sampler_table(COSINE, name, steps)
        yield from cells(
            [
                (
                    f"{name} | {steps} | {number} | {calls(table, number):,}",
                    {"table": table, "resampling": number},
                )
                for number in RESAMPLING
            ]
        )


def by_budget() -> Iterator[str]:
    """About 1,000 network calls, spent on steps or on resampling."""
    yield from ["| sampler | steps | resampling | network calls | pair | chain | picture |", "|---" * 7 + "|"]
    for name in ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"):
        settings = []
        for steps, number in ((1000, 1), (200, 5), (100, 10), (50, 20), (20, 50)):
            table = sampler_table(COSINE, name, steps)
            label = f"{name} | {steps} | {number} | {calls(table, number):,}"
            settings.append((label, {"table": table, "resampling": number}))
        yield from cells(settings)


def by_jump_length() -> Iterator[str]:
    table = sampler_table(COSINE, "ddpm", 250)
    settings = [
        (f"{jump}", {"table": table, "resampling": 10, "jump_length": jump}) for jump in (1, 2, 5, 10, 25, 50)
    ]
    yield from ["| jump length | pair | chain | picture |", "|---|---|---|---|", *cells(settings)]


def by_correlation() -> Iterator[str]:
    """Of a pair, by the correlation: without any, nothing is wrong."""
    yield from ["| correlation | slope | drawn, resampling 1 | 5 | 20 |", "|---|---|---|---|---|"]
    table = sampler_table(COSINE, "ddpm", 250)
    for correlation in (0.0, 0.2, 0.5, 0.8, 0.95, 0.99):
        data = pair(correlation)
        drawn = [law(data, table, number) for number in (1, 5, 20)]
        shown = " | ".join(
            f"{slope[0, 0]:.3f} ± {np.sqrt(covariance[0, 0]):.3f}" for _, slope, covariance in drawn
        )
        deviation = np.sqrt(data.conditional()[1][0, 0])
        yield f"| {correlation:g} | {correlation:.3f} ± {deviation:.3f} | {shown} |"


def drawn_against_law(num_samples: int = 20_000) -> Iterator[str]:
    yield from ["| data | sampler | steps | resampling | figures | largest | mean square |", "|---" * 7 + "|"]
    for index, (data_name, name, steps, number) in enumerate(
        [
            ("pair", "ddpm", 50, 1), ("pair", "ddpm", 50, 10), ("chain", "ddpm", 50, 1),
            ("chain", "ddim", 50, 5), ("chain", "dpmpp_2m", 20, 5), ("picture", "dpmpp_2m", 20, 3),
        ]
    ):  # fmt: skip
        data, table = GAUSSIANS[data_name], sampler_table(COSINE, name, steps)
        values = np.random.default_rng(index).standard_normal(data.known.sum())
        samples = draw(data, COSINE, table, values, num_samples, number, seed=100 + index)
        offset, slope, covariance = law(data, table, number)
        found = deviations(samples, offset + slope @ values, covariance)
        yield (
            f"| {data_name} | {name} | {steps} | {number} | {len(found)} | {np.abs(found).max():.1f} "
            f"| {np.square(found).mean():.2f} |"
        )


def calls(table: SamplerTable, resampling: int) -> int:
    return Inpainting(np.zeros(1), np.ones(1), resampling).num_runs(table)


TITLE = """# Inpainting against closed forms

`python -m benchmarks.inpainting`: data are Gaussian, the denoiser is exact, so all errors are those of the
method. Each cell has two relative errors: of the conditional mean (root mean square over known values; 1 if
they had no effect) and of the conditional covariance (Frobenius norm). They are exact: every row is affine,
so the mean and covariance of the samples follow without drawing any. `pair` has two values of correlation
0.8, one known; `chain` 8 in a row of correlation 0.9, every second known; `picture` 6 x 6 smooth pixels, the
upper half known. Unless said otherwise, betas are cosine, T = 1000, spacing logsnr.
"""

SECTIONS = (
    (
        "Replacement alone",
        "The samples depend too little on the known values, and more steps do not help: the network sees "
        "the known part with as much noise as the rest, and what it has drawn from that stays. Noise in the "
        "sampler helps, since it forgets.",
        by_steps,
    ),
    (
        "By the number of training timesteps",
        "DDPM with all timesteps: it makes no difference either, nor does signal that is left at T.",
        by_timesteps,
    ),
    (
        "Every sampler, 20 steps",
        "Those with noise need less resampling. A second order in log-SNR keeps the covariance right at few "
        "steps, so `dpmpp_2m_sde`, which has both, is the best.",
        by_sampler,
    ),
    (
        "With resampling",
        "The error of the mean falls as 1 / resampling; for `picture`, whose neighbours are almost equal, "
        "more slowly. What remains of the covariance's error is that of the sampler at its number of steps.",
        by_resampling,
    ),
    (
        "About 1,000 network calls, spent in different ways",
        "Resampling is worth more than steps, down to the number of steps that the sampler itself needs.",
        by_budget,
    ),
    (
        "Jump length",
        "DDPM, 250 steps, resampling 10, by the number of steps that are repeated together: few are enough.",
        by_jump_length,
    ),
    (
        "By correlation",
        "A pair, DDPM, 250 steps: slope of the unknown value's mean by the known one ± standard deviation "
        "around it. What does not depend on the known part is drawn without an error of this kind.",
        by_correlation,
    ),
    (
        "Drawn samples against these figures",
        "20,000 samples of the product's sampling loop: the differences of all means, variances and "
        "covariances from the exact ones, in standard errors. Their mean square should be about 1.",
        drawn_against_law,
    ),
)


def main() -> None:
    parts = [TITLE]
    for title, text, lines in SECTIONS:
        parts.append("\n".join([f"## {title}", "", text, "", *lines(), ""]))
        print(parts[-1], flush=True)
    RESULTS.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
