"""The joint MLP: embeddings of timestep and data, concatenated and passed through residual blocks."""

import math

import torch
from torch import Tensor, nn

from diffusion.config import AUGMENTATION_SIZE, Config
from diffusion.errors import InputError
from diffusion.networks.embeddings import SinusoidalEmbedding


class ResidualBlock(nn.Module):
    """x + Dropout(GELU(Linear(LayerNorm(x))))."""

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, size)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map x, [batch, size], to a tensor of the same shape."""
        update = nn.functional.gelu(self.linear(self.norm(x)))
        return x + nn.functional.dropout(update, self.dropout, self.training)


class JointMLP(nn.Module):
    """MLP that predicts epsilon, x_0 or v from noisy data and a timestep.

    Args:
        shape: shape of one example. For points (D,) each coordinate is embedded; images (C, H, W) are
            flattened without an embedding.
        hidden_size: width of the residual blocks.
        num_blocks: number of residual blocks.
        time_embedding_size: size of the embedding of the timestep.
        data_embedding_size: size of the embedding of each coordinate (points only).
        data_embedding_scale: factor applied to the coordinates before they are embedded.
        raw_coordinates: whether the network also receives the coordinates themselves.
        input_activation: whether GELU is applied after the first layer.
        output_norm: whether LayerNorm is applied before the last layer.
        timestep_scale: factor applied to the timestep before it is embedded.
        dropout: dropout probability for the update of each block.
        num_classes: number of classes of a conditional network, which takes labels; this number itself
            is the label for "no class". 0: an unconditional network.
        augmentation_size: number of values that describe how an image was augmented, or 0.

    Attributes:
        static_graph: that inputs of one shape always go through the same operations.
    """

    static_graph = True

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
        input_activation: bool = False,
        output_norm: bool = False,
        timestep_scale: float = 1.0,
        dropout: float = 0.0,
        num_classes: int = 0,
        augmentation_size: int = 0,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.raw_coordinates = raw_coordinates
        self.timestep_scale = timestep_scale
        self.num_classes = num_classes
        self.embed_timestep = SinusoidalEmbedding(time_embedding_size, timestep_scale)
        num_values = math.prod(shape)
        self.embeds_coordinates = len(shape) == 1
        data_size = num_values
        if self.embeds_coordinates:
            data_size = num_values * (data_embedding_size + int(raw_coordinates))
            self.embed_data = SinusoidalEmbedding(data_embedding_size, data_embedding_scale, torch.float32)
        self.label = nn.Embedding(num_classes + 1, time_embedding_size) if num_classes else None
        # Without a bias, so that a description of zeros is the same as none.
        self.augmentation = (
            nn.Linear(augmentation_size, hidden_size, bias=False) if augmentation_size else None
        )
        condition_size = time_embedding_size * (2 if num_classes else 1)
        self.inward = nn.Linear(condition_size + data_size, hidden_size)
        self.activation = nn.GELU() if input_activation else nn.Identity()
        self.blocks = nn.Sequential(*(ResidualBlock(hidden_size, dropout) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(hidden_size) if output_norm else nn.Identity()
        self.outward = nn.Linear(hidden_size, num_values)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, augmentation: Tensor | None = None
    ) -> Tensor:
        """Compute the network's prediction.

        Args:
            x: float32 [batch, *shape].
            t: int64 [batch], 0-based timesteps.
            y: int64 [batch], labels, if the network is conditional.
            augmentation: float32 [batch, augmentation_size], how x_0 was augmented, see
                `diffusion.data.augmentation`; None is the same as zeros, which is not at all.

        Returns:
            float32 [batch, *shape].
        """
        time_embedding = self.embed_timestep(t)
        label_embedding = [self.label(y)] if self.label is not None else []
        joint = torch.cat([time_embedding, *label_embedding, *self._embed_data(x)], dim=-1)
        hidden = self.inward(joint)
        if self.augmentation is not None and augmentation is not None:
            hidden = hidden + self.augmentation(augmentation)
        hidden = self.blocks(self.activation(hidden))
        return self.outward(self.norm(hidden)).reshape(x.shape)

    def _embed_data(self, x: Tensor) -> list[Tensor]:
        flat = x.flatten(1)
        if not self.embeds_coordinates:
            return [flat]
        embedded = self.embed_data(flat).flatten(1)
        return [embedded, flat] if self.raw_coordinates else [embedded]


def build(config: Config, shape: tuple[int, ...], num_classes: int) -> JointMLP:
    """Build the MLP of a config, see `diffusion.networks.build.build_network`.

    Raises:
        InputError: the data are neither points nor images.
    """
    if len(shape) not in (1, 3):
        raise InputError(f"--network.kind mlp: data of shape {shape}; it takes points or images only")
    network = config.network
    return JointMLP(
        shape,
        hidden_size=network.hidden_size,
        num_blocks=network.num_blocks,
        time_embedding_size=network.time_embedding_size,
        data_embedding_size=network.data_embedding_size,
        data_embedding_scale=network.data_embedding_scale,
        raw_coordinates=network.raw_coordinates,
        input_activation=network.input_activation,
        output_norm=network.output_norm,
        timestep_scale=config.timestep_scale,
        dropout=network.dropout,
        num_classes=num_classes,
        augmentation_size=AUGMENTATION_SIZE if config.training.augment else 0,
    )
