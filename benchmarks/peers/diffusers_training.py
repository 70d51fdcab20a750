"""diffusers' UNet2DModel in a plain loop with the settings of its script for unconditional training.

From that script: AdamW with betas 0.95 and 0.999 and weight decay 1e-6, a cosine learning rate after 500
updates of warm-up, gradients clipped to norm 1, noise by DDPMScheduler, a DataLoader, the loss fetched in
every update; learning rate and batch size are those that we train with, since the losses are compared. At its
best, batches are cut from one tensor, AdamW is fused, nothing is logged.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contender import Measure
from benchmarks.training_data import held_out_loss, load, updates_in_blocks

_WARMUP_UPDATES = 500
_AdamW = {"betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}


def unet(shape: tuple[int, ...], base_channels: int, channel_multipliers: tuple[int, ...]) -> nn.Module:
    """UNet2DModel of the parameters and FLOPs of our U-Net with one residual block a level.

    Both have attention at the lowest resolution only, with one head; ours has it once more, in the second
    block of the middle: 1.5% more parameters, 2% more FLOPs.
    """
    from diffusers import UNet2DModel

    rest = len(channel_multipliers) - 1
    return UNet2DModel(
        sample_size=shape[-1],
        in_channels=shape[0],
        out_channels=shape[0],
        layers_per_block=1,
        block_out_channels=tuple(base_channels * each for each in channel_multipliers),
        down_block_types=("DownBlock2D",) * rest + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * rest,
        norm_num_groups=8,
        attention_head_dim=base_channels * channel_multipliers[-1],
    )


def train_images(
    data: str,
    num_updates: int,
    horizon: int,
    batch_size: int,
    learning_rate: float,
    base_channels: int,
    channel_multipliers: tuple[int, ...],
    as_its_script: bool = True,
    compiled: bool = False,
    channels_last: bool = False,
    bf16: bool = False,
    device: str = "cpu",
) -> Measure:
    """Updates on images, a block of them at each measurement; the first block is over before.

    Args:
        data: as for `training_data.load`; the images as our training normalises them, so that losses mean
            the same.
        num_updates: of a block.
        horizon: updates over which the learning rate decays.
        batch_size, learning_rate: of AdamW.
        base_channels, channel_multipliers: as for `unet`.
        as_its_script: with DataLoader and fetched losses, else with batches cut and AdamW fused.
        compiled, channels_last, bf16: whether torch.compile, that layout and autocast are used.
        device: "cpu" or "cuda".
    """
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup

    torch.manual_seed(0)
    dataset = load(data).to(torch.device(device))
    x_0 = dataset.train[:]
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    network = unet(tuple(x_0.shape[1:]), base_channels, tuple(channel_multipliers)).to(device)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x_0 = x_0.to(memory_format=torch.channels_last)
    forward: Callable[..., Any] = (
        torch.compile(network, mode="reduce-overhead" if device == "cuda" else None) if compiled else network
    )
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=learning_rate, fused=None if as_its_script else True, **_AdamW
    )
    decay = get_cosine_schedule_with_warmup(optimizer, min(_WARMUP_UPDATES, horizon // 10), horizon)
    batches = _loaded(x_0, batch_size) if as_its_script else _cut(x_0, batch_size)
    losses = []

    def update() -> None:
        clean = next(batches)
        noise = torch.randn(clean.shape, device=device)
        timesteps = torch.randint(0, 1000, (len(clean),), device=device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            out = forward(noisy, timesteps).sample
        loss = nn.functional.mse_loss(out.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        if as_its_script:
            losses.append(loss.detach().item())

    def run(count: int) -> None:
        network.train()
        for _ in range(count):
            update()
        if device == "cuda":
            torch.cuda.synchronize()

    def judged() -> float:
        network.eval()
        return held_out_loss(lambda x, t: network(x, t).sample, dataset, scheduler.alphas_cumprod)

    return updates_in_blocks(run, num_updates, judged)


def _loaded(x_0: Tensor, batch_size: int) -> Iterator[Tensor]:
    loader = torch.utils.data.DataLoader(x_0, batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def _cut(x_0: Tensor, batch_size: int) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(len(x_0), device=x_0.device)
        yield from (x_0[part] for part in order.split(batch_size) if len(part) == batch_size)
