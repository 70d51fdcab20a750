"""Construction of the network that a config describes, and how much memory it needs."""

import inspect
import math

import torch
from torch import nn

from diffusion.config import Config, NetworkConfig
from diffusion.errors import InputError
from diffusion.memory_limit import check_memory
from diffusion.registry import NETWORKS

_WEIGHT_BYTES = 4  # float32
# Weights, gradients, two moments of AdamW, and averaged weights.
_COPIES_IN_TRAINING = 5


def build_network(config: Config, shape: tuple[int, ...], num_classes: int = 0) -> nn.Module:
    """A newly initialised network: (x [batch, *shape], t int64 [batch]) -> [batch, *shape].

    If num_classes is not 0, the network is conditional and takes a third argument, labels y
    int64 [batch], from 0 to num_classes - 1, or num_classes for "no class". A super-resolution network takes
    two more, see `diffusion.networks.super_resolution`. If images are augmented, it takes `augmentation` by
    name.

    Raises:
        InputError: the network does not fit the shape, or its weights do not fit into memory.
    """
    check_network(config, shape, num_classes)
    return NETWORKS[config.network.kind](config, shape, num_classes)


def check_network(config: Config, shape: tuple[int, ...], num_classes: int = 0) -> None:
    """Check what `build_network` checks, without building the network."""
    if config.training.augment and len(shape) != 3:
        raise InputError(
            f"--training.augment {config.training.augment:g}: only images are augmented; leave it out"
        )
    _check_weights(config, shape, num_classes, 1)


def check_training_memory(
    config: Config,
    shape: tuple[int, ...],
    num_classes: int = 0,
    *,
    num_workers: int = 1,
    device: torch.device | None = None,
) -> None:
    """Check that a network and its training can fit into memory, without building it.

    Args:
        config: config of the network and its training.
        shape: shape of one example.
        num_classes: number of classes of a conditional network, else 0.
        num_workers: data-parallel workers, which share each batch.
        device: device that trains; None is this machine's CPU.

    Raises:
        InputError: the network does not fit the shape, or something does not fit into memory.
    """
    available = None
    if device is not None and device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    values = math.prod(shape)
    _check_weights(config, shape, num_classes, _COPIES_IN_TRAINING, available)
    training = config.training
    examples = -(-training.batch_size // (num_workers * training.accumulation_steps))
    # At least x_0, the noise, x_t, the output and its gradient are in memory at the same time.
    check_memory(
        5 * _WEIGHT_BYTES * examples * values,
        f"--training.batch-size {training.batch_size}: a worker's part of a batch",
        "give a smaller one, or more --training.accumulation-steps",
        available,
    )
    check_memory(
        2 * _WEIGHT_BYTES * config.metrics.num_samples * values,
        f"--metrics.num-samples {config.metrics.num_samples}: twice as many samples at the final test",
        "give fewer",
    )


def _check_weights(
    config: Config, shape: tuple[int, ...], num_classes: int, copies: int, available: int | None = None
) -> None:
    count = _num_weights(config, shape, num_classes)
    if count is not None:
        purpose = "" if copies == 1 else ", with its gradients, the optimizer's state and averaged weights,"
        check_memory(
            count * _WEIGHT_BYTES * copies,
            f"a network of {count:,} weights (--network.{_largest_flag(config.network)}){purpose}",
            "give a smaller one",
            available,
        )


def _check_augmentation(config: Config, network: nn.Module) -> None:
    if config.training.augment and "augmentation" not in inspect.signature(network.forward).parameters:
        raise InputError(
            f"--training.augment {config.training.augment:g}: the network {config.network.kind} is not told "
            "how images are augmented, and samples would be, too; leave it out"
        )


def _num_weights(config: Config, shape: tuple[int, ...], num_classes: int) -> int | None:
    """Number of weights; None for a network of another package that cannot be built without memory."""
    try:
        with torch.device("meta"):  # tensors of a shape, without values
            built = NETWORKS[config.network.kind](config, shape, num_classes)
        _check_augmentation(config, built)
        return sum(weight.numel() for weight in built.state_dict().values())
    except (NotImplementedError, RuntimeError):
        return None


def _largest_flag(network: NetworkConfig) -> str:
    """The size of the network that a user would lower first."""
    if network.kind == "unet":
        return f"base-channels {network.base_channels}"
    return f"hidden-size {network.hidden_size}, --network.num-blocks {network.num_blocks}"
