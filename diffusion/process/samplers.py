"""Samplers as tables of coefficients, and the one step that runs every table. Does not import torch.

Notation, for the step from timestep t to the next, less noisy timestep s:

    variable          meaning                                          name in the papers
    alphas_cumprod_t  fraction of x_t's variance that is signal        alpha-bar (DDPM), alpha (DDIM)
    alphas_cumprod_s  fraction of x_s's variance that is signal        alpha-bar (DDPM), alpha (DDIM)
    x                 the current sample, x_t
    out               the network's raw output
    x0                the clean sample that `out` implies, clipped     f_theta (DDIM), x_theta (DPM-Solver++)
    z                 fresh standard normal noise

A row of a table holds the nine coefficients a b c d e f s lo hi of

    x0 = clip(a x + b out, lo, hi)
    x  = c x0 + d x + e x0_previous + f out + s z

A table may have two more columns: e2, the coefficient of x0_previous_2 (the x0 of two rows before), which
samplers of third order need, and g, by which a network that learns its variance scales the noise
(docs/onnx-format.md):

    x  = c x0 + d x + e x0_previous + e2 x0_previous_2 + f out + s exp(g variance) z

The samplers' own coefficients, c to s, and their formulas are in `diffusion.process.sampling_methods`.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.process.inpainting import (
    JUMP_NOISE,
    KNOWN_NOISE,
    Inpainting,
    RowRun,
    inject,
    noised,
)
from diffusion.process.posterior import Variance
from diffusion.process.prediction_types import (
    PredictionType,
    check_determines_x_0,
    epsilon_coefficients,
    x0_coefficients,
)
from diffusion.process.sampling_methods import SamplingMethod, SamplingSteps
from diffusion.process.schedules import Float64Array, NoiseSchedule, Spacing, respaced_timesteps
from diffusion.registry import SAMPLERS


class Array(Protocol):
    """What `step` needs of an array: numpy's and PyTorch's have it."""

    def __add__(self, other: Any, /) -> Any: ...
    def __rmul__(self, other: Any, /) -> Any: ...
    def clip(self, min: Any, max: Any, /) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=Array)

COEFFICIENTS = ("a", "b", "c", "d", "e", "f", "s", "lo", "hi")
EXTRA_COEFFICIENTS = ("e2", "g")


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The coefficients of a sampler with R rows, one for each evaluation of the network, ready to run.

    Attributes:
        timesteps: int64 [R], noisiest first: the timestep that the network receives in each row; empty if
            it receives noise levels.
        coefficients: float64 [R, columns].
        alphas_cumprod: float64 [R + 1], the value before each row, and 1 after the last row.
        rows_per_step: rows of each step except the last, which has one: 2 for a two-stage sampler.
        columns: names of the columns of `coefficients`: those of `COEFFICIENTS` and possibly some of
            `EXTRA_COEFFICIENTS`.
        noise_levels: float64 [R], what a network receives that has a noise level as its input instead of
            a timestep; None for timesteps.
    """

    timesteps: NDArray[np.int64]
    coefficients: Float64Array
    alphas_cumprod: Float64Array
    rows_per_step: int = 1
    columns: tuple[str, ...] = COEFFICIENTS
    noise_levels: Float64Array | None = None

    @property
    def num_rows(self) -> int:
        """R, the number of rows, which is the number of evaluations of the network."""
        return len(self.coefficients)

    @property
    def num_steps(self) -> int:
        """S, the number of sampling steps."""
        return (self.num_rows - 1) // self.rows_per_step + 1

    @property
    def network_levels(self) -> list[int] | list[float]:
        """What the network receives in each row: a timestep or a noise level."""
        return self.timesteps.tolist() if self.noise_levels is None else self.noise_levels.tolist()

    def column(self, name: str) -> Float64Array:
        """One column, float64 [R]; zeros if it is one of `EXTRA_COEFFICIENTS` that the table lacks."""
        if name in EXTRA_COEFFICIENTS and name not in self.columns:
            return np.zeros(self.num_rows)
        return self.coefficients[:, self.columns.index(name)]

    def from_row(self, row: int) -> "SamplerTable":
        """The table of the rows from `row` on.

        Its first rows lack the predictions of the rows before: the first takes its own x0 for them, and the
        second that of the first for the one before it, which makes multistep samplers first order there.
        """
        coefficients = self.coefficients[row:].copy()
        index = {name: place for place, name in enumerate(self.columns)}

        def move(of_row: int, source: str, target: str) -> None:
            if source in index and of_row < len(coefficients):
                coefficients[of_row, index[target]] += coefficients[of_row, index[source]]
                coefficients[of_row, index[source]] = 0.0

        if row > 0:
            move(0, "e", "c")
            move(0, "e2", "c")
            move(1, "e2", "e")
        return replace(
            self,
            timesteps=self.timesteps[row:],
            coefficients=coefficients,
            alphas_cumprod=self.alphas_cumprod[row:],
            noise_levels=None if self.noise_levels is None else self.noise_levels[row:],
        )


def sampler_table(
    schedule: NoiseSchedule,
    sampler: str,
    num_inference_steps: int,
    *,
    prediction_type: PredictionType = "epsilon",
    eta: float | None = None,
    variance: Variance = "beta_tilde",
    spacing: Spacing = "logsnr",
    clip: tuple[float, float] | None = None,
    use_clipped_model_output: bool = True,
    step_ratio_guard: float | None = 3.0,
) -> SamplerTable:
    """Compute a sampler's table from a schedule, in float64.

    Args:
        schedule: schedule that the network was trained on.
        sampler: name in `diffusion.registry.SAMPLERS`: "ddpm" (ancestral), "ddim", "dpmpp_2m" and "dpmpp_3m"
            (DPM-Solver++ of second and third order), "dpmpp_2m_sde", "heun" and "heun_churn" (EDM), or one
            that another package adds.
        num_inference_steps: S, from 1 to T. A step of Heun's samplers has two rows.
        prediction_type: meaning of the network's output.
        eta: amount of fresh noise, in [0, 1]: 0 is deterministic. In DDIM 1 is DDPM with beta_tilde, in
            heun_churn 1 is EDM's largest churn. None is the sampler's own, `SamplingMethod.default_eta`.
            Ignored by samplers that do not use it.
        variance: variance of the noise in DDPM, see `ancestral_coefficients`, computed for the respaced
            timesteps. Ignored by samplers that do not use it. A learned covariance Sigma_theta(x_t, t) is
            not possible, since a row has a single number s.
        spacing: choice of the S timesteps, see `respaced_timesteps`.
        clip: interval (lo, hi) for x0 in normalised units, or None.
        use_clipped_model_output: whether DDIM recomputes epsilon from the clipped x0 (f = 0). If not, it
            takes epsilon from the raw output, which is diffusers' default.
        step_ratio_guard: A row of a multistep sampler (dpmpp) is of lower order if its step in log-SNR is
            more than this many times the step before, because it would extrapolate too far; a step of
            Heun's samplers is of first order if sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod) falls
            by more than this factor. None: never (diffusers has no such guard).

    Returns:
        The table. Its last row is c = 1, d = e = f = s = 0, so that it returns x0. It has the column e2 if
            that is not 0 everywhere.

    Raises:
        ValueError: an unknown name, eta outside [0, 1], clip without lo < hi, a guard that is not
            positive, S outside 1..T, or epsilon prediction where alphas_cumprod is 0 (x_t then says nothing
            about x_0).

    Source: see each sampler in `diffusion.process.sampling_methods`. The update and the sigma_t in source
    document 003 are wrong (docs/source-documents.md).
    """
    _check_choice("sampler", sampler, SAMPLERS)
    _check_choice("prediction_type", prediction_type, get_args(PredictionType))
    _check_choice("variance", variance, get_args(Variance))
    used_eta = eta_of(sampler, eta)
    if not 0.0 <= used_eta <= 1.0:
        raise ValueError(f"eta {eta}: need a number from 0 (no fresh noise) to 1")
    lo, hi = (-np.inf, np.inf) if clip is None else clip
    if not lo < hi:
        raise ValueError(f"clip ({lo}, {hi}): the first must be smaller than the second")
    if step_ratio_guard is not None and not step_ratio_guard > 0.0:
        raise ValueError(f"step_ratio_guard {step_ratio_guard}: need a positive number, or None for no guard")

    visited = respaced_timesteps(schedule, num_inference_steps, spacing)
    levels, log_snr = schedule.alphas_cumprod[visited], schedule.log_snr[visited]
    check_determines_x_0(prediction_type, levels[0])
    epsilon_x, epsilon_out = epsilon_coefficients(prediction_type, levels[:-1])
    steps = SamplingSteps(
        schedule=schedule,
        timesteps_t=visited[:-1],
        timesteps_s=visited[1:],
        alphas_cumprod_t=levels[:-1],
        alphas_cumprod_s=levels[1:],
        log_snr_t=log_snr[:-1],
        log_snr_s=log_snr[1:],
        epsilon_x=epsilon_x,
        epsilon_out=epsilon_out,
        eta=used_eta,
        variance=variance,
        use_clipped_model_output=use_clipped_model_output,
        step_ratio_guard=step_ratio_guard,
    )
    method: SamplingMethod = SAMPLERS[sampler]
    stages = method.stages(steps)
    if len(stages) != method.rows_per_step:
        raise ValueError(
            f"sampler {sampler!r} has {len(stages)} stages, but declares rows_per_step {method.rows_per_step}"
        )

    def rows(of_stage: Sequence[Any], of_last_row: Any) -> NDArray[Any]:
        """One column: the stages of each step in turn, then the last step's only row."""
        per_step = np.stack([np.broadcast_to(each, visited[1:].shape) for each in of_stage], axis=1)
        return np.append(per_step.ravel(), of_last_row)

    timesteps = rows(
        [visited[:-1] if stage.timesteps is None else stage.timesteps for stage in stages], visited[-1]
    )
    alphas_cumprod = schedule.alphas_cumprod[timesteps]
    a, b = x0_coefficients(prediction_type, alphas_cumprod)
    columns = {"a": a, "b": b, "lo": np.full_like(a, lo), "hi": np.full_like(a, hi)}
    for name in ("c", "d", "e", "e2", "f", "s"):
        of_last_row = float(name == "c")  # it returns x0
        columns[name] = rows([getattr(stage, name) for stage in stages], of_last_row)
    names = (*COEFFICIENTS, "e2") if columns["e2"].any() else COEFFICIENTS
    return SamplerTable(
        timesteps,
        np.stack([columns[name] for name in names], axis=1),
        np.append(alphas_cumprod, 1.0),
        method.rows_per_step,
        names,
    )


def eta_of(sampler: str, eta: float | None) -> float:
    """The `eta` that a registered sampler has if this one is asked for; None is the sampler's own."""
    return SAMPLERS[sampler].default_eta if eta is None else eta


def samplers_with_eta() -> list[str]:
    """Names of the samplers in which `eta` has an effect."""
    return [name for name, method in SAMPLERS.items() if method.uses_eta]


def step(
    row: Sequence[float] | Float64Array,
    x: ArrayT,
    out: ArrayT,
    x0_previous: ArrayT | float,
    z: ArrayT | float,
    *,
    columns: Sequence[str] = COEFFICIENTS,
    x0_previous_2: ArrayT | float = 0.0,
    variance: ArrayT | float = 0.0,
) -> tuple[ArrayT, ArrayT]:
    """Apply one row of a table. It uses only `+`, `*`, `**` and clip, so it accepts arrays and tensors.

    Args:
        row: one coefficient per column.
        x: [batch, ...], the current sample.
        out: [batch, ...], the network's raw output for x.
        x0_previous: [batch, ...], x0 of the previous row, zeros in the first row.
        z: [batch, ...], standard normal noise; any value if s is 0.
        columns: names of the row's columns, see `SamplerTable`.
        x0_previous_2: [batch, ...], x0 of two rows before, zeros in the first two rows; used if e2 is not 0.
        variance: [batch, ...], the network's second output for x; used if g is not 0.

    Returns:
        The next x and this row's x0, both [batch, ...].
    """
    value = {name: float(number) for name, number in zip(columns, row, strict=True)}
    x0 = (value["a"] * x + value["b"] * out).clip(value["lo"], value["hi"])
    x_next = value["c"] * x0 + value["d"] * x + value["e"] * x0_previous
    if e2 := value.get("e2", 0.0):
        x_next = x_next + e2 * x0_previous_2
    s = value["s"]
    if g := value.get("g", 0.0):
        s = s * math.e ** (g * variance)  # arrays and tensors have no exp in common
    return x_next + value["f"] * out + s * z, x0


def trajectory(
    denoise: Callable[[Any, Any], Any],
    x: Any,
    table: SamplerTable,
    noise: Callable[[int], Any],
    inpainting: Inpainting | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Run a table from noise to samples, yielding after every row.

    Args:
        denoise: function (x, timestep) -> the network's output, of x's shape. For a table of noise
            levels, it receives the noise level instead of the timestep. For a table with the column g, it
            returns a pair: the output and the variance.
        x: [batch, ...], standard normal noise to start from.
        table: table of the sampler.
        noise: function (row index) -> fresh standard normal noise of x's shape. Called only for rows in
            which s is not 0. Inpainting adds `KNOWN_NOISE`, `JUMP_NOISE` and multiples of `REPETITION` to
            the index, see `diffusion.process.inpainting`.
        inpainting: the known part of the samples, if there is any.

    Yields:
        (x, x0) after each row; the last x is the sample.
    """
    x0 = x0_previous = 0.0 * x
    variance: Any = 0.0
    runs = map(RowRun, range(table.num_rows)) if inpainting is None else inpainting.runs(table)
    levels, s = table.network_levels, table.column("s")
    if inpainting is not None:
        x = inject(x, inpainting, table.alphas_cumprod[0], lambda: noise(KNOWN_NOISE - 1))
    for run in runs:
        index = run.noise_index
        if run.signal is not None:
            x = noised(x, run.signal, noise(JUMP_NOISE + index))
        z = noise(index) if s[run.row] else 0.0
        out = denoise(x, levels[run.row])
        if "g" in table.columns:
            out, variance = out
        x0_previous_2, x0_previous = x0_previous, x0
        x, x0 = step(
            table.coefficients[run.row],
            x,
            out,
            x0_previous,
            z,
            columns=table.columns,
            x0_previous_2=x0_previous_2,
            variance=variance,
        )
        if inpainting is not None:
            level = table.alphas_cumprod[run.row + 1]
            x = inject(x, inpainting, level, partial(noise, KNOWN_NOISE + index))
        yield x, x0


def last_sample(states: Iterator[tuple[Any, Any]]) -> Any:
    """The final x of a `trajectory`; the states before it are not kept."""
    return deque(states, maxlen=1).pop()[0]


def with_learned_variance(smallest: SamplerTable, largest: SamplerTable) -> SamplerTable:
    """Combine two tables that differ in s alone into one in which the network chooses between the two.

    At a variance output of -1 a row's standard deviation is `smallest`'s, at 1 it is `largest`'s, and in
    between their logarithms are interpolated.

    Source: improved DDPM, arXiv:2102.09672, Eq. 15.
    """
    low, high = smallest.column("s"), largest.column("s")
    noisy = low > 0.0
    s, g = np.zeros_like(low), np.zeros_like(low)
    s[noisy] = np.sqrt(low[noisy] * high[noisy])
    g[noisy] = 0.5 * np.log(high[noisy] / low[noisy])
    coefficients = np.column_stack([smallest.coefficients, g])
    coefficients[:, smallest.columns.index("s")] = s
    return replace(smallest, coefficients=coefficients, columns=(*smallest.columns, "g"))


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r}: choose one of {', '.join(choices)}")
