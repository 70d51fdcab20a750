"""Sampling with a PyTorch denoiser."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    network: nn.Module,
    table: SamplerTable,
    x: Tensor,
    noise: Callable[[int], Tensor],
    condition: "Condition | None" = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the table with a network, yielding (x, x0) after each row in normalised units.

    Args:
        network: (x float32, timesteps int64) -> output, in evaluation mode.
        table: the sampler.
        x: [batch, ...] standard normal start. Its dtype is kept between the network's calls.
        noise: row index -> standard normal noise of x's shape.
        condition: for a conditional network.
    """
    return trajectory(denoiser(network, condition), x, table, noise)


def denoiser(network: nn.Module, condition: "Condition | None" = None) -> Callable[[Tensor, int], Tensor]:
    """(x of any real dtype, timestep) -> the network's output in that dtype, without gradients.

    With a condition it is the guided one: out_uncond + guidance_scale * (out_cond - out_uncond).

    Source: classifier-free guidance, arXiv:2207.12598, Eq. 6 with guidance_scale = 1 + w. It trades
    diversity for likeness to the class; seed 003 has it that guidance raises diversity.
    """

    @torch.no_grad()
    def denoise(x: Tensor, timestep: int) -> Tensor:
        timesteps = torch.full((len(x),), timestep, dtype=torch.int64, device=x.device)
        if condition is None:
            return in_portions(network, x.float(), timesteps).to(x.dtype)
        labels, scale = condition.labels.to(x.device), condition.guidance_scale
        out = in_portions(network, x.float(), timesteps, labels).to(x.dtype)
        if scale == 1.0:
            return out
        null = torch.full_like(labels, condition.null_label)
        unconditional = in_portions(network, x.float(), timesteps, null).to(x.dtype)
        return unconditional + scale * (out - unconditional)

    return denoise


@dataclass(frozen=True, eq=False)
class Condition:
    """What a conditional network is asked for.

    Attributes:
        labels: int64 [batch].
        null_label: the number of classes, which stands for no label.
        guidance_scale: 1 is the class as learned, 0 no class, more exaggerates it.
    """

    labels: Tensor
    null_label: int
    guidance_scale: float = 1.0


def condition_in_turn(num_samples: int, num_classes: int, guidance_scale: float) -> Condition | None:
    """What a picture of a model's samples asks for: its classes in turn; nothing of an unconditional one."""
    if not num_classes:
        return None
    return Condition(classes_in_turn(num_samples, num_classes), num_classes, guidance_scale)


def classes_in_turn(num_samples: int, num_classes: int) -> Tensor:
    """Labels int64 [num_samples], spread evenly: sample i has class i modulo their number."""
    return torch.arange(num_samples) % num_classes


def generate(
    network: nn.Module,
    table: SamplerTable,
    shape: tuple[int, ...],
    num_samples: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    condition: Condition | None = None,
) -> Tensor:
    """Draw samples from torch's own generator: [num_samples, *shape], normalised, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def noise(_row: int) -> Tensor:
        return torch.randn(num_samples, *shape, generator=generator).to(device)

    return last_sample(sample_states(network, table, noise(-1), noise, condition))
