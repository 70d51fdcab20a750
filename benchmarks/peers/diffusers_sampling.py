"""Sampling by diffusers' pipelines, with the weights that are exported to sampler.onnx."""

from typing import Any

import torch
from torch import nn

from benchmarks.contender import Measure
from benchmarks.sampling import samples_per_second

SIDE = 32
NUM_TRAIN_TIMESTEPS = 1000


def unet() -> nn.Module:
    """A UNet2DModel with 1.0M parameters for images of shape 1x32x32, always of the same random weights."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).eval()


def sample(
    sampler: str,
    num_steps: int,
    batch_size: int,
    compiled: bool = False,
    channels_last: bool = False,
    bf16: bool = False,
    device: str = "cpu",
) -> Measure:
    """Batches of images by DDIM or DPM-Solver++(2M), the first of which is drawn before.

    Args:
        sampler: "ddim" or "dpmpp_2m".
        num_steps: sampling steps.
        batch_size: images of a batch.
        compiled, channels_last, bf16: whether torch.compile, that layout and weights in bfloat16 are used.
        device: "cpu" or "cuda".
    """
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler

    network: Any = unet().to(device)
    if bf16:
        _in_bf16(network)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    if compiled:
        network = torch.compile(network, mode="max-autotune" if device == "cuda" else None)
    if sampler == "ddim":
        pipeline = DDIMPipeline(network, DDIMScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS))
    else:
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS, algorithm_type="dpmsolver++", solver_order=2
        )
        pipeline = DDPMPipeline(network, scheduler)  # takes any scheduler
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> None:
        pipeline(batch_size=batch_size, num_inference_steps=num_steps, output_type="np")

    return samples_per_second(draw, batch_size)


def _in_bf16(network: Any) -> None:
    """Give a UNet2DModel weights in bfloat16, and outputs in float32: pipelines convert images to numpy."""
    forward = network.to(torch.bfloat16).forward

    def with_float32_output(sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        output = forward(sample.to(torch.bfloat16), *arguments, **options)
        output.sample = output.sample.float()
        return output

    network.forward = with_float32_output
