"""The schedulers of diffusers as a reference: trajectories at the timesteps and with the noise of ours.

Needs diffusers (extra `test`). Used by `benchmarks.diffusers_agreement` and by tests.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm
from numpy.typing import NDArray
from torch import Tensor

from diffusion.process.prediction_types import PredictionType
from diffusion.process.samplers import SamplerTable, trajectory
from diffusion.process.schedules import NoiseSchedule

Denoiser = Callable[[Tensor, int], Tensor]


def denoise(x: Tensor, timestep: int) -> Tensor:
    """An arbitrary smooth network, for which some x0 are outside the clip interval."""
    return torch.sin(1.7 * x + 0.05 * timestep) + 0.3 * x.roll(1, dims=-1)


def scheduler(
    name: str,
    schedule: NoiseSchedule,
    *,
    exact: bool = True,
    prediction_type: PredictionType = "epsilon",
    spacing: str = "trailing",
    clip: tuple[float, float] | None = None,
    variance: str = "beta_tilde",
) -> Any:
    """The scheduler of diffusers that corresponds to a sampler, with every other option off.

    Args:
        name: "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m" (UniPC's predictor, UniP-3) or
            "dpmpp_3m_published" (DPM-Solver++(3M) as diffusers has it).
        schedule: schedule of the betas.
        exact: whether to replace its float32 alphas_cumprod by those of the schedule in float64.
        prediction_type: meaning of the network's output.
        spacing: "leading", "trailing" or "linspace".
        clip: interval (-c, c) for x0, or None; ignored by those of DPM-Solver++, which do not clip.
        variance: "beta_tilde" or "beta", for "ddpm".
    """
    options = {
        "num_train_timesteps": schedule.num_train_timesteps,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "thresholding": False,
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }
    clipping = {"clip_sample": clip is not None, "clip_sample_range": clip[1] if clip else 1.0}
    if name == "ddpm":
        variance_type = {"beta_tilde": "fixed_small", "beta": "fixed_large"}[variance]
        made = diffusers.DDPMScheduler(variance_type=variance_type, **options, **clipping)
    elif name == "ddim":
        made = diffusers.DDIMScheduler(set_alpha_to_one=True, **options, **clipping)
    else:
        options |= {
            "lower_order_final": True,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "use_flow_sigmas": False,
            "use_dynamic_shifting": False,
            "final_sigmas_type": "zero",
        }
        if name == "dpmpp_3m":
            every_step = list(range(schedule.num_train_timesteps))
            made = diffusers.UniPCMultistepScheduler(
                solver_order=3, predict_x0=True, solver_type="bh2", disable_corrector=every_step, **options
            )
        else:
            made = diffusers.DPMSolverMultistepScheduler(
                solver_order=3 if name == "dpmpp_3m_published" else 2,
                algorithm_type="sde-dpmsolver++" if name == "dpmpp_2m_sde" else "dpmsolver++",
                solver_type="midpoint",
                euler_at_final=False,
                use_lu_lambdas=False,
                lambda_min_clipped=-float("inf"),
                variance_type=None,
                **options,
            )
    if exact:
        made.betas = torch.tensor(schedule.betas)
        made.alphas = torch.tensor(schedule.alphas)
        made.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
        made.one = made.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return made


def diffusers_trajectory(
    sampler: str,
    table: SamplerTable,
    schedule: NoiseSchedule,
    start: Tensor,
    noise: Tensor,
    network: Denoiser = denoise,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = True,
    **options: Any,
) -> Tensor:
    """Sample with diffusers, at the timesteps and with the noise of one of our trajectories.

    Args:
        sampler: see `scheduler`.
        table: our table; diffusers' own timesteps are used where its spacing gives the same ones.
        schedule: schedule of the table.
        start: [batch, ...], initial noise, float64.
        noise: [rows, batch, ...], fresh noise of every row.
        network: denoiser.
        eta: as in `sampler_table`, for "ddim".
        use_clipped_model_output: as in `sampler_table`, for "ddim".
        options: those of `scheduler`.

    Returns:
        x after each row, [rows, batch, ...].
    """
    spacing = options.pop("spacing", "trailing")
    custom = spacing in ("logsnr", "karras")  # from the log-SNR of timesteps
    made = scheduler(sampler, schedule, spacing="leading" if custom else spacing, **options)
    if sampler == "dpmpp_3m":
        set_timesteps_of_unipc(made, table.timesteps)
    elif sampler.startswith("dpmpp") or custom:  # the former have spacings of their own
        made.set_timesteps(timesteps=table.timesteps.tolist())
    else:
        made.set_timesteps(table.num_rows)
    np.testing.assert_array_equal(made.timesteps, table.timesteps)
    x, states = start, []
    for timestep, z in zip(made.timesteps, noise, strict=True):
        out = network(x, int(timestep))
        if sampler == "ddim":
            x = made.step(
                out,
                int(timestep),
                x,
                eta=eta,
                use_clipped_model_output=use_clipped_model_output,
                variance_noise=z,
                return_dict=False,
            )[0]
        elif sampler == "dpmpp_2m_sde":
            x = made.step(out, timestep, x, variance_noise=z, return_dict=False)[0]
        else:
            with mock.patch.object(scheduling_ddpm, "randn_tensor", return_value=z):
                x = made.step(out, timestep, x, return_dict=False)[0]
        states.append(x)
    return torch.stack(states)


def heun_trajectory(
    table: SamplerTable,
    schedule: NoiseSchedule,
    start: Tensor,
    network: Denoiser = denoise,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """Sample with diffusers' `HeunDiscreteScheduler` at the timesteps of a table of "heun".

    Its state is x / sqrt(A): here it is scaled to x.

    Returns:
        x after each row, [rows, batch, ...].
    """
    made = diffusers.HeunDiscreteScheduler(
        num_train_timesteps=schedule.num_train_timesteps,
        trained_betas=schedule.betas.tolist(),
        prediction_type=prediction_type,
    )
    made.set_timesteps(timesteps=[*table.timesteps[::2].tolist()])
    np.testing.assert_array_equal(made.timesteps, table.timesteps)
    state, states = start / float(np.sqrt(table.alphas_cumprod[0])), []
    for timestep, alphas_cumprod in zip(made.timesteps, table.alphas_cumprod[1:], strict=True):
        out = network(made.scale_model_input(state, timestep), int(timestep))
        state = made.step(out, timestep, state, return_dict=False)[0]
        states.append(float(np.sqrt(alphas_cumprod)) * state)
    return torch.stack(states)


def set_timesteps_of_unipc(made: Any, timesteps: NDArray[np.int64]) -> None:
    """Set timesteps of our own: `UniPCMultistepScheduler.set_timesteps` only takes their number."""
    made.set_timesteps(len(timesteps))
    sigmas = ((1.0 - made.alphas_cumprod) / made.alphas_cumprod) ** 0.5
    made.timesteps = torch.from_numpy(timesteps)
    made.sigmas = torch.cat([sigmas[made.timesteps], torch.zeros(1)])


def our_trajectory(table: SamplerTable, start: Tensor, noise: Tensor, network: Denoiser = denoise) -> Tensor:
    """x after each row of a table, [rows, batch, ...]."""
    return torch.stack([x for x, _ in trajectory(network, start, table, lambda row: noise[row])])


def shared_noise(num_rows: int, shape: tuple[int, ...] = (5, 2, 3)) -> tuple[Tensor, Tensor]:
    """Initial noise, and fresh noise of every row; 0 in the last row, where diffusers may add some."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(num_rows + 1, *shape, generator=generator, dtype=torch.float64)
    noise[-1] = 0.0
    return noise[0], noise[1:]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference in a row, divided by the largest value in it; the worst row counts."""
    axes = tuple(range(1, theirs.ndim))
    largest = torch.maximum(ours.abs(), theirs.abs()).amax(axes)
    return float(((ours - theirs).abs().amax(axes) / largest).max())
