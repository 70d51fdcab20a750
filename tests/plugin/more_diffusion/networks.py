"""A denoising network."""

import math

import torch
from torch import Tensor, nn

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.networks.embeddings import sinusoidal_embedding


class PlainMLP(nn.Module):
    """Linear layers over the flattened data, with embeddings of the timestep and the class added."""

    def __init__(self, config: Config, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.embedding_size = config.network.time_embedding_size
        self.timestep_scale = config.timestep_scale
        size, hidden = math.prod(shape), config.network.hidden_size
        self.inward = nn.Linear(size, hidden)
        self.time = nn.Linear(self.embedding_size, hidden)
        self.label = nn.Embedding(num_classes + 1, hidden) if num_classes else None
        self.outward = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, size))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Map x [batch, *shape] and t [batch], and labels y [batch] if conditional, to [batch, *shape]."""
        embedding = sinusoidal_embedding(t * self.timestep_scale, self.embedding_size)
        hidden = self.inward(torch.flatten(x, 1)) + self.time(embedding)
        if self.label is not None:
            hidden = hidden + self.label(y)
        return self.outward(hidden).reshape(x.shape)


def build(config: Config, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build the network of a config, after checking that it fits the data."""
    if math.prod(shape) > 4096:
        raise InputError(f"--network.kind plain: data of shape {shape}; it takes up to 4096 values")
    return PlainMLP(config, shape, num_classes)
