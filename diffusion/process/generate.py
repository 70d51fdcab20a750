"""Sampling with a PyTorch denoiser."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.process.image_start import start_from
from diffusion.process.inpainting import Inpainting
from diffusion.process.samplers import SamplerTable, last_sample, trajectory

# On the CPU a batch whose activations do not fit into the caches is several times slower.
MAX_VALUES_PER_CPU_BATCH = 2**17
_MAX_VALUES_PER_GPU_BATCH = 2**18  # its memory is limited


def apply_in_batches(network: nn.Module, x: Tensor, timesteps: Tensor, *inputs: Tensor) -> Tensor:
    """Compute `network(x, timesteps, *inputs)` in batches of at most `rows_per_batch` rows.

    Args:
        network: network in evaluation mode, whose outputs do not depend on the rest of the batch.
        x: [batch, *shape].
        timesteps: int64 [batch].
        inputs: further inputs of the network, such as labels, each [batch, ...].

    Returns:
        [batch, *shape].
    """
    batch_size = rows_per_batch(x.shape[1:], x.device)
    arguments = (x, timesteps, *inputs)
    if len(x) <= batch_size:
        return network(*arguments)
    batches = zip(*(argument.split(batch_size) for argument in arguments), strict=True)
    return torch.cat([network(*batch) for batch in batches])


def rows_per_batch(shape: Sequence[int], device: torch.device) -> int:
    """Number of examples of this shape in a batch on this device, at least 1."""
    most = MAX_VALUES_PER_CPU_BATCH if device.type == "cpu" else _MAX_VALUES_PER_GPU_BATCH
    return max(1, most // math.prod(shape))


def sample_states(
    network: nn.Module,
    table: SamplerTable,
    x: Tensor,
    noise: Callable[[int], Tensor],
    condition: "Condition | None" = None,
    inpainting: Inpainting | None = None,
    inputs: Sequence[Tensor] = (),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run a sampler's table with a network, yielding (x, x0) after each row in normalised units.

    Args:
        network: network (x float32, timesteps int64) -> output, in evaluation mode.
        table: table of the sampler.
        x: [batch, ...], standard normal noise to start from. The samples keep its dtype; only the
            network's inputs are float32.
        noise: function (row index) -> standard normal noise of x's shape.
        condition: labels and guidance, only for a conditional network.
        inpainting: the known part of the samples, as tensors of x's dtype and device.
        inputs: further inputs of the network after the labels, each [batch, ...].
    """
    return trajectory(denoiser(network, condition, inputs), x, table, noise, inpainting)


def denoiser(
    network: nn.Module, condition: "Condition | None" = None, inputs: Sequence[Tensor] = ()
) -> Callable[[Tensor, int], Tensor]:
    """Function (x of any real dtype, timestep) -> the network's output in that dtype, without gradients.

    With a condition the output is guided: out_uncond + guidance_scale * (out_cond - out_uncond).

    Source: classifier-free guidance, arXiv:2207.12598, Eq. 6 with guidance_scale = 1 + w. Guidance trades
    diversity for fidelity to the class; source document 003 claims that it raises both
    (docs/source-documents.md).
    """

    @torch.no_grad()
    def denoise(x: Tensor, timestep: int) -> Tensor:
        timesteps = torch.full((len(x),), timestep, dtype=torch.int64, device=x.device)

        def output(*labels: Tensor) -> Tensor:
            return apply_in_batches(network, x.float(), timesteps, *labels, *inputs).to(x.dtype)

        if condition is None:
            return output()
        labels, scale = condition.labels.to(x.device), condition.guidance_scale
        out = output(labels)
        if scale == 1.0:
            return out
        unconditional = output(torch.full_like(labels, condition.null_label))
        return unconditional + scale * (out - unconditional)

    return denoise


@dataclass(frozen=True, eq=False)
class Condition:
    """Labels and guidance for sampling from a conditional network.

    Attributes:
        labels: int64 [batch], class of each sample.
        null_label: label that means "no class"; it equals the number of classes.
        guidance_scale: 0 ignores the class, 1 samples the class as learned, more exaggerates it.
    """

    labels: Tensor
    null_label: int
    guidance_scale: float = 1.0


def cycling_condition(num_samples: int, num_classes: int, guidance_scale: float) -> Condition | None:
    """Condition whose labels cycle through all classes; None if there are no classes."""
    if not num_classes:
        return None
    return Condition(cycling_labels(num_samples, num_classes), num_classes, guidance_scale)


def cycling_labels(num_samples: int, num_classes: int) -> Tensor:
    """Labels, int64 [num_samples], that cycle through the classes: sample i has class i % num_classes."""
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
    inputs: Sequence[Tensor] = (),
    rows: slice = slice(None),
    inpainting: Inpainting | None = None,
    x_0: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Draw samples, float32 [num_samples, *shape] in normalised units, or those of `rows` alone.

    The noise comes from a `torch.Generator` on the CPU with the given seed, so that it is the same on
    every device. The condition, the further inputs of the network, the known part and `x_0` are those of the
    rows that are drawn.

    Args:
        network, table, condition, inputs, inpainting: as for `sample_states`.
        shape: shape of one sample.
        num_samples: number of samples.
        seed: seed of the noise.
        device: device of the network.
        rows: which of the samples to draw.
        x_0: samples to start from instead of pure noise, [batch, *shape], normalised.
        strength: with x_0, the fraction of the steps that run, see `diffusion.process.image_start`.

    Raises:
        ValueError: strength is not in (0, 1].
    """
    generator = torch.Generator().manual_seed(seed)

    def fresh_noise(_row: int) -> Tensor:
        return torch.randn(num_samples, *shape, generator=generator)[rows].to(device)

    noise: Callable[[int], Tensor] = fresh_noise
    if x_0 is not None:
        table, noise = start_from(x_0, strength, table, fresh_noise)
    return last_sample(sample_states(network, table, noise(-1), noise, condition, inpainting, inputs))
