"""From a config to the network that it describes."""

from torch import nn

from diffusion.config import Config
from diffusion.mlp import JointMLP


def build_network(config: Config, shape: tuple[int, ...]) -> nn.Module:
    """A fresh denoiser: (x [batch, *shape], t int64 [batch]) -> [batch, *shape]."""
    network = config.network
    return JointMLP(
        shape,
        hidden_size=network.hidden_size,
        num_blocks=network.num_blocks,
        time_embedding_size=network.time_embedding_size,
        data_embedding_size=network.data_embedding_size,
        data_embedding_scale=network.data_embedding_scale,
        raw_coordinates=network.raw_coordinates,
        timestep_scale=1000.0 / config.schedule.num_train_timesteps if network.rescale_timesteps else 1.0,
        dropout=network.dropout,
    )
