"""How far are our schedules, samplers, conversions and embeddings from those of diffusers?

    python -m benchmarks.diffusers_agreement            # 15 seconds on one core

Needs diffusers (extra `test`). Writes benchmarks/results/diffusers_agreement.md: the name that diffusers has
for each, the largest difference, and where the two differ on purpose.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
import torch
from diffusers.models.embeddings import SinusoidalPositionalEmbedding, get_timestep_embedding
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.diffusers_reference import (
    diffusers_trajectory,
    heun_trajectory,
    our_trajectory,
    relative_difference,
    scheduler,
    shared_noise,
)
from diffusion.networks.embeddings import sinusoidal_embedding
from diffusion.process.forward import q_sample, to_epsilon, to_v, to_x_0
from diffusion.process.prediction_types import PredictionType
from diffusion.process.samplers import sampler_table
from diffusion.process.schedules import (
    NoiseSchedule,
    Spacing,
    constant_betas,
    cosine_betas,
    linear_betas,
    quadratic_betas,
    respaced_timesteps,
    scaled_linear_betas,
    sigmoid_betas,
    zero_terminal_snr,
)

T = 1000
BETAS = (1e-4, 0.02)
CLIP = (-0.8, 0.8)
RESULTS = Path(__file__).parent / "results" / "diffusers_agreement.md"


@dataclass(frozen=True)
class Agreement:
    """A row of the results: what we have, what diffusers has, and how far apart they are.

    Attributes:
        ours: name here, with options.
        theirs: name in diffusers, with options.
        exact: largest difference if diffusers' scheduler is given our float64 alphas_cumprod; None if it
            computes in float32 whatever it is given.
        as_installed: largest difference to diffusers as it is, whose schedules are float32.
    """

    ours: str
    theirs: str
    exact: float | None
    as_installed: float


@dataclass(frozen=True)
class Choice:
    """A row of the results: a difference on purpose.

    Attributes:
        ours: what we do.
        theirs: what diffusers does.
        option: what makes both the same.
        by_default: largest difference without it.
        with_option: largest difference with it.
    """

    ours: str
    theirs: str
    option: str
    by_default: float
    with_option: float


def sampling_difference(
    sampler: str,
    num_steps: int,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    *,
    exact: bool = True,
    last_noise: float = 0.0,
    peer: str | None = None,
) -> float:
    """Difference between a trajectory of ours and one of diffusers, see `relative_difference`.

    Args:
        sampler: see `scheduler`.
        num_steps: number of steps.
        ours: options of `sampler_table`; the spacing is "trailing" by default, as in `scheduler`.
        theirs: options of `diffusers_trajectory`.
        exact: see `scheduler`.
        last_noise: all values of the noise in the last row.
        peer: diffusers' sampler, see `scheduler`, if it is another one.
    """
    schedule = NoiseSchedule(linear_betas(T, *BETAS))
    table = sampler_table(schedule, sampler, num_steps, **{"spacing": "trailing", **ours})
    start, noise = shared_noise(table.num_rows)
    noise[-1] = last_noise
    reference = diffusers_trajectory(peer or sampler, table, schedule, start, noise, exact=exact, **theirs)
    return relative_difference(our_trajectory(table, start, noise), reference)


def schedules() -> Iterator[Agreement]:
    """Betas of T timesteps, relative to the largest."""
    constant = constant_betas(T)
    kinds: list[tuple[str, NDArray[np.float64], str, dict[str, Any]]] = [
        ("linear", linear_betas(T, *BETAS), "linear", {}),
        ("scaled_linear", scaled_linear_betas(T, *BETAS), "scaled_linear", {}),
        ("quadratic", quadratic_betas(T, *BETAS), "scaled_linear", {}),
        ("sigmoid", sigmoid_betas(T, *BETAS), "sigmoid", {}),
        ("cosine", cosine_betas(T), "squaredcos_cap_v2", {}),
        ("constant", constant, "", {"trained_betas": constant.tolist()}),
        (
            "linear, zero_terminal_snr",
            zero_terminal_snr(linear_betas(T, *BETAS)),
            "linear",
            {"rescale_betas_zero_snr": True},
        ),
    ]
    for ours, betas, kind, options in kinds:
        theirs = diffusers.DDPMScheduler(T, *BETAS, kind, **options).betas.double().numpy()
        name = ", ".join([f"beta_schedule={kind!r}"] * bool(kind) + list(options))
        yield Agreement(ours, name, None, float(np.abs(theirs - betas).max() / betas.max()))


def spacings() -> Iterator[Agreement]:
    """Timesteps of 10, 30 and T steps."""
    for spacing in get_args(Spacing)[:3]:  # diffusers has none that depends on the log-SNR of a timestep
        difference = max(spacing_difference(spacing, num_steps) for num_steps in (10, 30, T))
        yield Agreement(spacing, f"timestep_spacing={spacing!r}, steps_offset=0", None, difference)


def spacing_difference(spacing: Spacing, num_steps: int) -> float:
    """Largest difference between a timestep of ours and the one of diffusers."""
    schedule = NoiseSchedule(linear_betas(T, *BETAS))
    made = scheduler("ddpm", schedule, spacing=spacing)
    made.set_timesteps(num_steps)
    return float(np.abs(made.timesteps.numpy() - respaced_timesteps(schedule, num_steps, spacing)).max())


def samplers() -> Iterator[Agreement]:
    """Trajectories of 20 and 50 steps, with every prediction type and two spacings, clipped and not."""
    for variance, variance_type in (("beta_tilde", "fixed_small"), ("beta", "fixed_large")):
        options: dict[str, Any] = {"variance": variance}
        yield agreement("ddpm", options, f"DDPMScheduler, variance_type={variance_type!r}", options)
    for eta, from_clipped in product((0.0, 0.5, 1.0), (True, False)):
        options = {"eta": eta, "use_clipped_model_output": from_clipped}
        yield agreement("ddim", options, "DDIMScheduler, the same arguments of step", options)
    name = "DPMSolverMultistepScheduler, algorithm_type='dpmsolver++', solver_order=2"
    yield agreement("dpmpp_2m", {"step_ratio_guard": None}, name, {})
    name = "DPMSolverMultistepScheduler, algorithm_type='sde-dpmsolver++', solver_order=2"
    yield agreement("dpmpp_2m_sde", {"step_ratio_guard": None}, name, {})
    name = "UniPCMultistepScheduler, solver_order=3, without its corrector, 12 steps"
    third_order = {
        exact: sampling_difference("dpmpp_3m", 12, {"step_ratio_guard": None}, {}, exact=exact)
        for exact in (True, False)
    }
    yield Agreement("dpmpp_3m, step_ratio_guard=None", name, third_order[True], third_order[False])
    for sampler in ("heun", "heun_churn, eta=0"):
        difference = heun_difference(sampler.split(",")[0])
        yield Agreement(f"{sampler}, step_ratio_guard=None", "HeunDiscreteScheduler", None, difference)


def heun_difference(sampler: str) -> float:
    """Difference between trajectories of 20 steps, without the churn, which diffusers does not have."""
    schedule = NoiseSchedule(linear_betas(T, *BETAS))
    table = sampler_table(schedule, sampler, 20, eta=0.0, spacing="trailing", step_ratio_guard=None)
    start, noise = shared_noise(table.num_rows)
    return relative_difference(our_trajectory(table, start, noise), heun_trajectory(table, schedule, start))


def agreement(sampler: str, ours: dict[str, Any], name: str, theirs: dict[str, Any]) -> Agreement:
    """The largest difference over all settings of `samplers`; arguments as in `sampling_difference`."""
    largest = {True: 0.0, False: 0.0}
    # DPMSolverMultistepScheduler does not clip.
    clips = (None,) if sampler.startswith("dpmpp") else (None, CLIP)
    for num_steps, prediction_type, spacing, clip, exact in product(
        (20, 50), get_args(PredictionType), ("leading", "trailing"), clips, largest
    ):
        common = {"prediction_type": prediction_type, "spacing": spacing, "clip": clip}
        difference = sampling_difference(sampler, num_steps, ours | common, theirs | common, exact=exact)
        largest[exact] = max(largest[exact], difference)
    text = ", ".join([sampler, *(f"{key}={value!r}" for key, value in ours.items())])
    # DPMSolverMultistepScheduler computes in float32 whatever its alphas_cumprod are.
    return Agreement(text, name, None if sampler.startswith("dpmpp") else largest[True], largest[False])


def conversions() -> Iterator[Agreement]:
    """Conversions between x_0, x_t and the outputs of each prediction type, at timesteps from 1 to T - 1."""
    exact, as_installed = (conversion_differences(exact) for exact in (True, False))
    for names, difference in exact.items():
        yield Agreement(*names, difference, as_installed[names])


def conversion_differences(exact: bool) -> dict[tuple[str, str], float]:
    """Difference of each conversion, by its names here and in diffusers; `exact` as in `scheduler`."""
    schedule = NoiseSchedule(linear_betas(T, *BETAS))
    timesteps = torch.tensor([1, 10, 100, 500, 900, T - 1])
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, len(timesteps), 8, generator=generator, dtype=torch.float64)
    x_t = q_sample(schedule, x_0, timesteps, noise)
    v = to_v(schedule, "epsilon", noise, x_t, timesteps)
    made = scheduler("ddpm", schedule, exact=exact)
    velocity = made.get_velocity(x_0, noise, timesteps)
    found = {
        ("q_sample", "DDPMScheduler.add_noise"): relative_difference(
            x_t, made.add_noise(x_0, noise, timesteps)
        ),
        ("to_v, of epsilon and of x_0", "DDPMScheduler.get_velocity"): max(
            relative_difference(ours, velocity) for ours in (v, to_v(schedule, "sample", x_0, x_t, timesteps))
        ),
    }
    outputs: dict[PredictionType, Tensor] = {"epsilon": noise, "sample": x_0, "v_prediction": v}
    for prediction_type, output in outputs.items():
        made = scheduler("ddim", schedule, exact=exact, prediction_type=prediction_type)
        made.set_timesteps(T)
        steps = [
            made.step(out, t, x, return_dict=False)
            for out, t, x in zip(output, timesteps.tolist(), x_t, strict=True)
        ]
        x_s, their_x_0 = (torch.stack(each) for each in zip(*steps, strict=True))
        # The step is x_s = sqrt(A_s) x_0 + sqrt(1 - A_s) epsilon.
        a_s = made.alphas_cumprod[timesteps - 1, None]
        their_epsilon = (x_s - a_s.sqrt() * their_x_0) / (1.0 - a_s).sqrt()
        for convert, theirs in ((to_x_0, their_x_0), (to_epsilon, their_epsilon)):
            names = (
                f"{convert.__name__}, of {prediction_type}",
                f"DDIMScheduler.step, prediction_type={prediction_type!r}",
            )
            ours = convert(schedule, prediction_type, output, x_t, timesteps)
            found[names] = relative_difference(ours, theirs)
    return found


def embeddings() -> Iterator[Agreement]:
    """Embeddings of 0 to T - 1 in 64 columns. diffusers computes the angles in float32."""
    timesteps = torch.arange(T)
    table = SinusoidalPositionalEmbedding(64, T)(torch.zeros(1, T, 64))[0]
    for layout, name, theirs in (
        ("concatenated", "get_timestep_embedding, downscale_freq_shift=1", concatenated(timesteps)),
        ("interleaved", "SinusoidalPositionalEmbedding", table),
    ):
        difference = (sinusoidal_embedding(timesteps, 64, layout) - theirs).abs().max()
        yield Agreement(f"layout={layout!r}", name, None, float(difference))


def concatenated(timesteps: Tensor) -> Tensor:
    """The embedding of DDPM's code in diffusers, [timesteps, 64]."""
    return get_timestep_embedding(timesteps, 64, flip_sin_to_cos=False, downscale_freq_shift=1)


def choices() -> Iterator[Choice]:
    """Where we differ on purpose."""
    clipped, raw = {"clip": CLIP}, {"use_clipped_model_output": False}
    yield Choice(
        "ddim takes epsilon from the clipped x0",
        "DDIMScheduler takes it from the raw output",
        "use_clipped_model_output=False (or True in DDIMScheduler.step)",
        sampling_difference("ddim", 50, clipped, clipped | raw),
        sampling_difference("ddim", 50, clipped | raw, clipped | raw),
    )
    linspace = {"spacing": "linspace"}
    yield Choice(
        "dpmpp_2m does not extrapolate over a step in log-SNR more than 3 times as long as the one before",
        "DPMSolverMultistepScheduler always extrapolates",
        "step_ratio_guard=None",
        sampling_difference("dpmpp_2m", 20, linspace, linspace),
        sampling_difference("dpmpp_2m", 20, linspace | {"step_ratio_guard": None}, linspace),
    )
    unguarded = {"step_ratio_guard": None}
    yield Choice(
        "dpmpp_3m integrates the parabola through three predictions exactly",
        "DPMSolverMultistepScheduler with solver_order=3 has half of the curvature's term: order 2",
        "UniPCMultistepScheduler without its corrector, whose coefficients are ours",
        sampling_difference("dpmpp_3m", 12, unguarded, {}, peer="dpmpp_3m_published"),
        sampling_difference("dpmpp_3m", 12, unguarded, {}),
    )
    clip_network = {"prediction_type": "sample"}
    yield Choice(
        "dpmpp_2m clips x0",
        "DPMSolverMultistepScheduler does not",
        "clip=None",
        sampling_difference("dpmpp_2m", 20, clipped | clip_network, clip_network),
        sampling_difference("dpmpp_2m", 20, clip_network, clip_network),
    )
    beta = {"variance": "beta"}
    yield Choice(
        "ddpm returns the mean of the last step",
        "DDPMScheduler adds noise unless that step starts at timestep 0",
        'variance="beta_tilde", or spacing="leading", which ends at timestep 0',
        sampling_difference("ddpm", 50, clipped | beta, clipped | beta, last_noise=1.0),
        sampling_difference("ddpm", 50, clipped, clipped, last_noise=1.0),
    )
    yield Choice(
        "ddim goes to the next timestep that it visits",
        "DDIMScheduler goes T // S timesteps down",
        "a number of steps that divides T, with leading or trailing spacing",
        sampling_difference("ddim", 30, linspace, linspace),
        sampling_difference("ddim", 50, {}, {}),
    )
    yield Choice(
        f"a single step of linspace is at timestep {T - 1}",
        "DDPMScheduler has it at timestep 0",
        "two steps or more",
        spacing_difference("linspace", 1),
        spacing_difference("linspace", 2),
    )
    timesteps = torch.arange(T)
    by_default, with_option = (
        float((sinusoidal_embedding(timesteps, 64, layout) - concatenated(timesteps)).abs().max())
        for layout in ("interleaved", "concatenated")
    )
    yield Choice(
        "embeddings alternate sines and cosines",
        "get_timestep_embedding has all sines, then all cosines, and other frequencies",
        'layout="concatenated"',
        by_default,
        with_option,
    )


def number(value: float) -> str:
    """Two digits at most, but whole numbers of timesteps in full."""
    return f"{value:.0f}" if value.is_integer() else f"{value:.1g}"


def results() -> str:
    """The text of the results file."""
    lines = [
        "# Agreement with diffusers",
        "",
        f"`python -m benchmarks.diffusers_agreement` with diffusers {diffusers.__version__}: the largest "
        "difference of each quantity. Schedules are float32 in diffusers and float64 here; given our "
        "alphas_cumprod, its schedulers differ from ours in their formulas only. "
        f"T = {T}, and linear betas unless another kind is named. Differences of betas, trajectories and "
        "conversions are relative to the largest value.",
    ]
    for title, found in (
        ("Noise schedules", schedules()),
        ("Spacings, in timesteps", spacings()),
        ("Samplers", samplers()),
        ("Conversions", conversions()),
        ("Timestep embeddings", embeddings()),
    ):
        rows = list(found)
        exact = any(row.exact is not None for row in rows)
        header = ["here", "in diffusers", "difference"] + ["with our alphas_cumprod"] * exact
        lines += ["", f"## {title}", "", *table_lines(header)]
        for row in rows:
            cells = [row.ours, row.theirs, number(row.as_installed)]
            lines.append(table_row(cells + ["" if row.exact is None else number(row.exact)] * exact))
    lines += [
        "",
        "Without a counterpart in diffusers: the spacings logsnr and karras (use_lu_lambdas and "
        "use_karras_sigmas also take noise levels between two timesteps), and the churn of heun_churn, which "
        "tests/diffusion/process/test_heun.py compares with EDM's Algorithm 2 written out.",
        "",
        "## Different on purpose",
        "",
        *table_lines(
            ["here", "in diffusers", "what makes them the same", "difference without it", "with it"]
        ),
    ]
    for choice in choices():
        numbers = [number(choice.by_default), number(choice.with_option)]
        lines.append(table_row([choice.ours, choice.theirs, choice.option, *numbers]))
    return "\n".join(lines) + "\n"


def table_lines(header: list[str]) -> list[str]:
    return [table_row(header), "|" + "---|" * len(header)]


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    torch.set_num_threads(1)
    RESULTS.write_text(results())
    print(f"{RESULTS}: written")


if __name__ == "__main__":
    main()
