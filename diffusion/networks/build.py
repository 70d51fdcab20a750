"""Construction of the network that a config describes."""

from torch import nn

from diffusion.config import Config
from diffusion.registry import NETWORKS


def build_network(config: Config, shape: tuple[int, ...], num_classes: int = 0) -> nn.Module:
    """A newly initialised network: (x [batch, *shape], t int64 [batch]) -> [batch, *shape].

    If num_classes is not 0, the network is conditional and takes a third argument, labels y
    int64 [batch], from 0 to num_classes - 1, or num_classes for "no class".

    Raises:
        InputError: the network does not fit the shape.
    """
    return NETWORKS[config.network.kind](config, shape, num_classes)
