"""The joint MLP: timestep and data embedded, concatenated, and sent through residual blocks."""

import math

import torch
from torch import Tensor, nn

from diffusion.embeddings import sinusoidal_embedding


class ResidualBlock(nn.Module):
    """x + GELU(Linear(LayerNorm(x)))."""

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, size)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[batch, size] to the same."""
        update = nn.functional.gelu(self.linear(self.norm(x)))
        return x + nn.functional.dropout(update, self.dropout, self.training)


class JointMLP(nn.Module):
    """Predicts noise from noised data and a timestep.

    Args:
        shape: of one example. Points (D,) are embedded coordinate by coordinate; images (C, H, W)
            are flattened as they are.
        hidden_size: width of the blocks.
        num_blocks: their number.
        time_embedding_size: size of the timestep's embedding.
        data_embedding_size: size of each coordinate's embedding (points).
        data_embedding_scale: factor on the coordinates before they are embedded.
        raw_coordinates: put the coordinates beside their embedding.
        timestep_scale: factor on the timestep before it is embedded.
        dropout: share of each block's update that is dropped in training.
        num_classes: of a conditional network, which takes labels; the null label is this number.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        hidden_size: int,
        num_blocks: int,
        time_embedding_size: int,
        data_embedding_size: int,
        data_embedding_scale: float = 25.0,
        raw_coordinates: bool = True,
        timestep_scale: float = 1.0,
        dropout: float = 0.0,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.time_embedding_size = time_embedding_size
        self.data_embedding_size = data_embedding_size
        self.data_embedding_scale = data_embedding_scale
        self.raw_coordinates = raw_coordinates
        self.timestep_scale = timestep_scale
        self.num_classes = num_classes
        num_values = math.prod(shape)
        self.embeds_coordinates = len(shape) == 1
        data_size = num_values
        if self.embeds_coordinates:
            data_size = num_values * (data_embedding_size + int(raw_coordinates))
        self.label = nn.Embedding(num_classes + 1, time_embedding_size) if num_classes else None
        condition_size = time_embedding_size * (2 if num_classes else 1)
        self.inward = nn.Linear(condition_size + data_size, hidden_size)
        self.blocks = nn.Sequential(*(ResidualBlock(hidden_size, dropout) for _ in range(num_blocks)))
        self.outward = nn.Linear(hidden_size, num_values)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise in x.

        Args:
            x: float32 [batch, *shape].
            t: int64 [batch], 0-based timesteps.
            y: int64 [batch], labels, if the network is conditional.

        Returns:
            float32 [batch, *shape].
        """
        time = sinusoidal_embedding(t * self.timestep_scale, self.time_embedding_size)
        label = [self.label(y)] if self.label is not None else []
        joint = torch.cat([time, *label, *self._embed_data(x)], dim=-1)
        return self.outward(self.blocks(self.inward(joint))).reshape(x.shape)

    def _embed_data(self, x: Tensor) -> list[Tensor]:
        flat = x.flatten(1)
        if not self.embeds_coordinates:
            return [flat]
        embedded = sinusoidal_embedding(flat * self.data_embedding_scale, self.data_embedding_size).flatten(1)
        return [embedded, flat] if self.raw_coordinates else [embedded]
