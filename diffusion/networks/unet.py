"""A U-Net for images of at least 8x8 pixels: residual blocks, and attention at selected resolutions."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusion.config import AUGMENTATION_SIZE, Config, NetworkConfig
from diffusion.errors import InputError
from diffusion.networks.embeddings import SinusoidalEmbedding
from diffusion.networks.super_resolution import super_resolution_network

_GROUPS = 8


class UNet(nn.Module):
    """U-Net that predicts epsilon, x_0 or v from a noisy image and a timestep.

    Args:
        shape: (C, H, W) of one image. Images whose size is not divisible by 2^(levels - 1) are padded, and
            the output is cropped.
        base_channels: channels of the first level, a multiple of 8.
        channel_multipliers: channels of each level, divided by `base_channels`. Each level after the
            first halves the image.
        num_res_blocks: residual blocks per level on the way down; there is one more on the way up.
        attention_resolutions: levels with attention, given by the longer side of their (padded) images.
        time_embedding_size: size of the sinusoidal embedding of the timestep.
        timestep_scale: factor applied to the timestep before it is embedded.
        dropout: dropout probability in each block.
        gradient_checkpointing: whether blocks are recomputed in the backward pass to save memory.
        num_classes: number of classes of a conditional network, which takes labels; this number itself
            is the label for "no class". 0: an unconditional network.
        in_channels: channels of the input, if there are more than those of an image.
        context_size: number of values that the network is told besides; see `forward`.

    Source: DDPM, arXiv:2006.11239, Appendix B; order of the blocks from arXiv:2102.09672.
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
        in_channels: int | None = None,
        context_size: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.timestep_scale = timestep_scale
        self.gradient_checkpointing = gradient_checkpointing
        self.num_classes = num_classes
        stride = 2 ** (len(channel_multipliers) - 1)
        self.padding = (-width % stride, -height % stride)
        self.embed_timestep = SinusoidalEmbedding(time_embedding_size, timestep_scale)
        time_channels = 4 * base_channels
        self.time = nn.Sequential(
            nn.Linear(time_embedding_size, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
        )
        self.label = nn.Embedding(num_classes + 1, time_channels) if num_classes else None
        # Without a bias, so that a context of zeros is the same as none.
        self.context = nn.Linear(context_size, time_channels, bias=False) if context_size else None

        def block(in_channels: int, out_channels: int, side: int) -> UNetBlock:
            has_attention = side in attention_resolutions
            return UNetBlock(in_channels, out_channels, time_channels, dropout, has_attention)

        side = max(height + self.padding[1], width + self.padding[0])
        current = base_channels
        self.inward = nn.Conv2d(in_channels or channels, current, 3, padding=1)
        skip_channels = [current]
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(channel_multipliers):
            if level:
                self.down.append(nn.Conv2d(current, current, 3, stride=2, padding=1))
                skip_channels.append(current)
                side //= 2
            for _ in range(num_res_blocks):
                self.down.append(block(current, base_channels * multiplier, side))
                current = base_channels * multiplier
                skip_channels.append(current)
        self.middle = nn.ModuleList([block(current, current, side), block(current, current, side)])
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(channel_multipliers))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(current + skip_channels.pop(), base_channels * multiplier, side))
                current = base_channels * multiplier
            if level:
                self.up.append(_Upsample(current))
                side *= 2
        self.norm = nn.GroupNorm(_GROUPS, current)
        self.outward = _zeroed(nn.Conv2d(current, channels, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        augmentation: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Compute the network's prediction.

        Args:
            x: float32 [batch, in_channels, H, W].
            t: int64 [batch], 0-based timesteps.
            y: int64 [batch], labels, if the network is conditional.
            augmentation: float32 [batch, AUGMENTATION_SIZE], how x_0 was augmented, see
                `diffusion.data.augmentation`; None is the same as zeros, which is not at all.
            context: float32 [batch, at most context_size], in place of `augmentation`.

        Returns:
            float32 [batch, C, H, W].
        """
        height, width = x.shape[-2:]
        time_embedding = self.time(self.embed_timestep(t))
        if self.label is not None:
            time_embedding = time_embedding + self.label(y)
        context = augmentation if context is None else context
        if self.context is not None and context is not None:
            weight = self.context.weight[:, : context.shape[1]]  # what is left out is 0
            time_embedding = time_embedding + F.linear(context, weight)
        hidden = self.inward(F.pad(x, (0, self.padding[0], 0, self.padding[1])))
        skips = [hidden]
        for module in self.down:
            hidden = self._run(module, hidden, time_embedding)
            skips.append(hidden)
        for module in self.middle:
            hidden = self._run(module, hidden, time_embedding)
        for module in self.up:
            if isinstance(module, UNetBlock):
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = self._run(module, hidden, time_embedding)
        return self.outward(F.silu(self.norm(hidden)))[..., :height, :width]

    def _run(self, module: nn.Module, hidden: Tensor, time_embedding: Tensor) -> Tensor:
        if not isinstance(module, UNetBlock):
            return module(hidden)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(module, hidden, time_embedding, use_reentrant=False)
        return module(hidden, time_embedding)


def max_levels(height: int, width: int) -> int:
    """Largest number of levels for an image: each halves it, and the shorter side keeps at least 4 pixels."""
    return max(1, int(math.log2(min(height, width) / 4)) + 1)


def build(config: Config, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build the U-Net of a config, see `diffusion.networks.build.build_network`.

    Raises:
        InputError: the U-Net does not fit the shape.
    """
    network = config.network
    _check_shape(network, shape)
    low_resolution = config.data.low_resolution
    augmentation_size = AUGMENTATION_SIZE if config.training.augment else 0
    unet = UNet(
        shape,
        base_channels=network.base_channels,
        channel_multipliers=network.channel_multipliers,
        num_res_blocks=network.num_res_blocks,
        attention_resolutions=network.attention_resolutions,
        time_embedding_size=network.time_embedding_size,
        timestep_scale=config.timestep_scale,
        dropout=network.dropout,
        gradient_checkpointing=network.gradient_checkpointing,
        num_classes=num_classes,
        in_channels=2 * shape[0] if low_resolution else None,
        context_size=augmentation_size + (1 if low_resolution else 0),
    )
    if low_resolution is None:
        return unet
    return super_resolution_network(unet, shape[-1] // low_resolution, num_classes)


def _check_shape(network: NetworkConfig, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise InputError("--network.kind unet: only images can use it; use mlp for points")
    channels, height, width = shape
    levels, allowed = len(network.channel_multipliers), max_levels(height, width)
    if min(height, width) < 8 or channels > 4:
        raise InputError(
            f"--network.kind unet: images of shape {shape}; use at least 8x8 pixels and 1 to 4 channels"
        )
    if levels > allowed:
        raise InputError(
            f"--network.channel-multipliers has {levels} levels: images of {height}x{width} allow 1 to "
            f"{allowed}"
        )


class UNetBlock(nn.Module):
    """Residual block of two convolutions, with the timestep added between them, and optional attention."""

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, dropout: float, has_attention: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(_GROUPS, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same_channels = in_channels == out_channels
        self.skip = nn.Identity() if same_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = _Attention(out_channels) if has_attention else nn.Identity()

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time(F.silu(time_embedding))[..., None, None]
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return self.attention(self.skip(x) + hidden)


class _Attention(nn.Module):
    """x + single-head self-attention over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.inward = nn.Conv2d(channels, 3 * channels, 1)
        self.outward = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # [batch, heads = 1, pixels, channels]: the ONNX exporter needs all four dimensions.
        query, key, value = self.inward(self.norm(x)).flatten(2).mT.unsqueeze(1).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.outward(attended.squeeze(1).mT.reshape(x.shape))


class _Upsample(nn.Module):
    """Upsampling by 2 with nearest neighbours, followed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _zeroed(module: nn.Conv2d) -> nn.Conv2d:
    """The convolution with weights and bias set to zero, so that its branch starts without effect."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
