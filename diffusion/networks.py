"""From a config to the network that it describes."""

from torch import nn

from diffusion.config import Config, NetworkConfig
from diffusion.errors import InputError
from diffusion.mlp import JointMLP
from diffusion.unet import UNet, levels_that_fit


def build_network(config: Config, shape: tuple[int, ...], num_classes: int = 0) -> nn.Module:
    """A fresh denoiser: (x [batch, *shape], t int64 [batch]) -> [batch, *shape].

    A conditional one, where there are classes, takes labels y int64 [batch] as well, 0 to
    num_classes - 1, and num_classes for none.

    Raises:
        InputError: the network does not fit the shape.
    """
    network = config.network
    timestep_scale = 1000.0 / config.schedule.num_train_timesteps if network.rescale_timesteps else 1.0
    if network.kind == "unet":
        _check_unet(network, shape)
        return UNet(
            shape,
            base_channels=network.base_channels,
            channel_multipliers=network.channel_multipliers,
            num_res_blocks=network.num_res_blocks,
            attention_resolutions=network.attention_resolutions,
            time_embedding_size=network.time_embedding_size,
            timestep_scale=timestep_scale,
            dropout=network.dropout,
            gradient_checkpointing=network.gradient_checkpointing,
            num_classes=num_classes,
        )
    return JointMLP(
        shape,
        hidden_size=network.hidden_size,
        num_blocks=network.num_blocks,
        time_embedding_size=network.time_embedding_size,
        data_embedding_size=network.data_embedding_size,
        data_embedding_scale=network.data_embedding_scale,
        raw_coordinates=network.raw_coordinates,
        timestep_scale=timestep_scale,
        dropout=network.dropout,
        num_classes=num_classes,
    )


def _check_unet(network: NetworkConfig, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise InputError("--network.kind unet: only images have one; use mlp for points")
    channels, height, width = shape
    levels, most = len(network.channel_multipliers), levels_that_fit(height, width)
    if min(height, width) < 8 or channels > 4:
        raise InputError(
            f"--network.kind unet: images of shape {shape}; give 8x8 or more and 1 to 4 channels"
        )
    if levels > most:
        raise InputError(
            f"--network.channel-multipliers has {levels} levels: images of {height}x{width} allow 1 to {most}"
        )
