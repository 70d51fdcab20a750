"""A U-Net for images from 8x8: residual blocks that see the timestep, attention at chosen sizes."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusion.embeddings import sinusoidal_embedding

_GROUPS = 8


class UNet(nn.Module):
    """Predicts noise from a noised image and a timestep.

    Args:
        shape: (C, H, W) of one image; sizes that the levels do not divide are padded and cropped.
        base_channels: channels of the first level, a multiple of 8.
        channel_multipliers: channels of each level over `base_channels`; each level after the first
            halves the image.
        num_res_blocks: residual blocks a level on the way down, and one more on the way up.
        attention_resolutions: levels whose longer (padded) side is one of these attend.
        time_embedding_size: size of the timestep's sinusoidal embedding.
        timestep_scale: factor on the timestep before it is embedded.
        dropout: share of each block's inner values that is dropped in training.
        gradient_checkpointing: compute blocks anew in the backward pass, to save memory.
        num_classes: of a conditional network, which takes labels; the null label is this number.

    Source: DDPM, arXiv:2006.11239, Appendix B; block order of arXiv:2102.09672.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        base_channels: int,
        channel_multipliers: tuple[int, ...],
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        time_embedding_size: int,
        timestep_scale: float = 1.0,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.time_embedding_size = time_embedding_size
        self.timestep_scale = timestep_scale
        self.gradient_checkpointing = gradient_checkpointing
        self.num_classes = num_classes
        stride = 2 ** (len(channel_multipliers) - 1)
        self.padding = (-width % stride, -height % stride)
        time_channels = 4 * base_channels
        self.time = nn.Sequential(
            nn.Linear(time_embedding_size, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
        )
        self.label = nn.Embedding(num_classes + 1, time_channels) if num_classes else None

        def block(inward: int, outward: int, side: int) -> _Block:
            return _Block(inward, outward, time_channels, dropout, attends=side in attention_resolutions)

        side = max(height + self.padding[1], width + self.padding[0])
        here = base_channels
        self.inward = nn.Conv2d(channels, here, 3, padding=1)
        skips = [here]
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(channel_multipliers):
            if level:
                self.down.append(nn.Conv2d(here, here, 3, stride=2, padding=1))
                skips.append(here)
                side //= 2
            for _ in range(num_res_blocks):
                self.down.append(block(here, base_channels * multiplier, side))
                here = base_channels * multiplier
                skips.append(here)
        self.middle = nn.ModuleList([block(here, here, side), block(here, here, side)])
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(channel_multipliers))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(here + skips.pop(), base_channels * multiplier, side))
                here = base_channels * multiplier
            if level:
                self.up.append(_Upsample(here))
                side *= 2
        self.norm = nn.GroupNorm(_GROUPS, here)
        self.outward = _zeroed(nn.Conv2d(here, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise in x.

        Args:
            x: float32 [batch, C, H, W].
            t: int64 [batch], 0-based timesteps.
            y: int64 [batch], labels, if the network is conditional.

        Returns:
            float32 [batch, C, H, W].
        """
        height, width = x.shape[-2:]
        embedding = sinusoidal_embedding(t * self.timestep_scale, self.time_embedding_size, dtype=x.dtype)
        time = self.time(embedding)
        if self.label is not None:
            time = time + self.label(y)
        hidden = self.inward(F.pad(x, (0, self.padding[0], 0, self.padding[1])))
        skips = [hidden]
        for module in self.down:
            hidden = self._run(module, hidden, time)
            skips.append(hidden)
        for module in self.middle:
            hidden = self._run(module, hidden, time)
        for module in self.up:
            if isinstance(module, _Block):
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = self._run(module, hidden, time)
        return self.outward(F.silu(self.norm(hidden)))[..., :height, :width]

    def _run(self, module: nn.Module, hidden: Tensor, time: Tensor) -> Tensor:
        if not isinstance(module, _Block):
            return module(hidden)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(module, hidden, time, use_reentrant=False)
        return module(hidden, time)


def levels_that_fit(height: int, width: int) -> int:
    """The most levels an image allows: each halves it, and at least 4 pixels of the shorter side stay."""
    return max(1, int(math.log2(min(height, width) / 4)) + 1)


class _Block(nn.Module):
    """Two convolutions around the timestep, and attention over all pixels where asked for."""

    def __init__(self, inward: int, outward: int, time_channels: int, dropout: float, attends: bool) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, inward)
        self.conv1 = nn.Conv2d(inward, outward, 3, padding=1)
        self.time = nn.Linear(time_channels, outward)
        self.norm2 = nn.GroupNorm(_GROUPS, outward)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(outward, outward, 3, padding=1))
        self.skip = nn.Conv2d(inward, outward, 1) if inward != outward else nn.Identity()
        self.attention = _Attention(outward) if attends else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time(F.silu(time))[..., None, None]
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return self.attention(self.skip(x) + hidden)


class _Attention(nn.Module):
    """x + attention of every pixel to every pixel, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.inward = nn.Conv2d(channels, 3 * channels, 1)
        self.outward = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # [batch, heads = 1, pixels, channels]: the ONNX exporter wants all four.
        query, key, value = self.inward(self.norm(x)).flatten(2).mT.unsqueeze(1).chunk(3, dim=-1)
        seen = F.scaled_dot_product_attention(query, key, value)
        return x + self.outward(seen.squeeze(1).mT.reshape(x.shape))


class _Upsample(nn.Module):
    """Twice as large by repetition, then smoothed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _zeroed(module: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
