"""Exponential moving average of the weights, which are the ones that are evaluated and shipped."""

from copy import deepcopy

from torch import nn

from diffusion.config import TrainingConfig
from diffusion.training.flat_parameters import FlatParameters


class WeightAverage:
    """A copy of a network whose weights are an exponential moving average of the network's.

    It computes what `torch.optim.swa_utils.AveragedModel` does. That one walks through all modules at
    every update, which takes a tenth of the training of a small network, and keeps its counter in a
    tensor, which makes the host wait for a GPU.

    Args:
        network: the network in training.
        weights: its weights.
        training: its training; see `ema_decay`.

    Attributes:
        network: the copy, without gradients. Buffers are those of the network in training.
        num_averaged: number of updates in the average.
    """

    def __init__(self, network: nn.Module, weights: FlatParameters, training: TrainingConfig) -> None:
        self._training = training
        self.network = deepcopy(network)
        self.num_averaged = 0
        self._weights, self._averages = weights.tensors, FlatParameters(self.network).tensors
        self.network.requires_grad_(False)
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    def update(self) -> None:
        """Take the network's weights into the average; the first ones are copied."""
        if self.num_averaged == 0:
            for average, weight in zip(self._averages, self._weights, strict=True):
                average.copy_(weight)
        else:
            decay = ema_decay(self._training, self.num_averaged)
            for average, weight in zip(self._averages, self._weights, strict=True):
                average.lerp_(weight, 1.0 - decay)
        for copy, buffer in self._buffers:
            copy.copy_(buffer)
        self.num_averaged += 1


def ema_decay(training: TrainingConfig, num_averaged: int) -> float:
    """Decay of the averaged weights after `num_averaged` averaging steps.

    A constant 0.9999 would leave most of the initial weights in a short training, so the average reaches
    back over a twentieth of the planned updates at most, and over fewer at the start.
    """
    horizon = max(1.0, training.num_updates / 20.0)
    return min(training.ema_decay, 1.0 - 1.0 / horizon, (1.0 + num_averaged) / (10.0 + num_averaged))
