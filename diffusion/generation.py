"""Sampling with a PyTorch denoiser."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from diffusion.config import SamplerConfig
from diffusion.portions import in_portions
from diffusion.sampling import PredictionType, SamplerTable, last_sample, sampler_table, trajectory
from diffusion.schedules import NoiseSchedule


def deployed_table(
    sampler: SamplerConfig,
    schedule: NoiseSchedule,
    clip: tuple[float, float],
    prediction_type: PredictionType,
) -> SamplerTable:
    """The table of the configured sampler; a schedule shorter than its steps uses every timestep."""
    return sampler_table(
        schedule,
        sampler.name,
        min(sampler.num_steps, schedule.num_train_timesteps),
        prediction_type=prediction_type,
        eta=sampler.eta,
        variance=sampler.variance,
        spacing=sampler.spacing,
        clip=clip if sampler.clip else None,
    )


def sample_states(
    network: nn.Module, table: SamplerTable, x: Tensor, noise: Callable[[int], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the table with a network, yielding (x, x0) after each row in normalised units.

    Args:
        network: (x float32, timesteps int64) -> output, in evaluation mode.
        table: the sampler.
        x: [batch, ...] standard normal start. Its dtype is kept between the network's calls.
        noise: row index -> standard normal noise of x's shape.
    """

    return trajectory(denoiser(network), x, table, noise)


def denoiser(network: nn.Module) -> Callable[[Tensor, int], Tensor]:
    """(x of any real dtype, timestep) -> the network's output in that dtype, without gradients."""

    @torch.no_grad()
    def denoise(x: Tensor, timestep: int) -> Tensor:
        timesteps = torch.full((len(x),), timestep, dtype=torch.int64, device=x.device)
        return in_portions(network, x.float(), timesteps).to(x.dtype)

    return denoise


def generate(
    network: nn.Module,
    table: SamplerTable,
    shape: tuple[int, ...],
    num_samples: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw samples from torch's own generator: [num_samples, *shape], normalised, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def noise(_row: int) -> Tensor:
        return torch.randn(num_samples, *shape, generator=generator).to(device)

    return last_sample(sample_states(network, table, noise(-1), noise))
