"""Large batches through a network, without gradients, in portions that suit the device."""

import math

import torch
from torch import Tensor, nn

# On processors a batch whose inner values leave the caches is several times slower.
_VALUES_AT_ONCE = 2**17


def in_portions(network: nn.Module, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
    """`network(x, timesteps)` of examples that do not depend on each other.

    Args:
        network: in evaluation mode.
        x: [batch, *shape].
        timesteps: int64 [batch].
        labels: int64 [batch] for a conditional network.

    Returns:
        [batch, *shape].
    """
    portion = max(1, _VALUES_AT_ONCE // math.prod(x.shape[1:]))
    arguments = (x, timesteps) if labels is None else (x, timesteps, labels)
    if x.device.type != "cpu" or len(x) <= portion:
        return network(*arguments)
    parts = zip(*(argument.split(portion) for argument in arguments), strict=True)
    return torch.cat([network(*part) for part in parts])
