"""A network's weights in few tensors, for operations that treat all weights alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Each operation on a tensor costs microseconds, however small it is; copying larger ones costs more.
_MAX_VALUES = 2**16
_MOMENTS = ("exp_avg", "exp_avg_sq")  # in the state of AdamW


class FlatParameters:
    """The trainable weights of a network, the small ones of each dtype as parts of one tensor.

    The network's parameters become views of these tensors, so changing either changes both.

    Args:
        network: the network, on its device.

    Attributes:
        tensors: the weights without gradients, as few tensors.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parameters = [weight for weight in network.parameters() if weight.requires_grad]
        small: dict[torch.dtype, list[int]] = {}
        self._members: list[list[int]] = []  # of each tensor: numbers of its parameters
        for number, weight in enumerate(self._parameters):
            if weight.numel() <= _MAX_VALUES:
                small.setdefault(weight.dtype, []).append(number)
            else:
                self._members.append([number])
        self._members += small.values()
        self.tensors = self.join([weight.detach() for weight in self._parameters])
        for weight, view in zip(self._parameters, self.split(self.tensors), strict=True):
            torch.utils.swap_tensors(weight, nn.Parameter(view))

    def join(self, values: Sequence[Tensor]) -> list[Tensor]:
        """One tensor each parameter, of its shape, as one each of `tensors`; large ones are not copied."""
        return [
            values[members[0]]
            if len(members) == 1
            else torch.cat([values[number].reshape(-1) for number in members])
            for members in self._members
        ]

    def split(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """What `join` joined, as views."""
        parts: list[Tensor] = list(self._parameters)
        for tensor, members in zip(joined, self._members, strict=True):
            sizes = [self._parameters[number].numel() for number in members]
            for number, part in zip(members, tensor.reshape(-1).split(sizes), strict=True):
                parts[number] = part.view(self._parameters[number].shape)
        return parts

    def take_gradients(self) -> list[Tensor]:
        """The parameters' gradients, joined and taken away from them; zeros where there is none."""
        gradients = []
        for weight in self._parameters:
            gradients.append(torch.zeros_like(weight) if weight.grad is None else weight.grad)
            weight.grad = None
        return self.join(gradients)

    def split_state(self, joined: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict of an AdamW of `tensors` as that of an AdamW of the network's parameters."""
        of_tensors = [joined["state"][number] for number in range(len(joined["state"]))]
        moments = {
            name: self.split([state[name] for state in of_tensors]) if of_tensors else [] for name in _MOMENTS
        }
        count = len(self._parameters)
        states = {
            number: {"step": of_tensors[0]["step"]} | {name: moments[name][number] for name in _MOMENTS}
            for number in range(count if of_tensors else 0)
        }
        return {"state": states, "param_groups": [joined["param_groups"][0] | {"params": list(range(count))}]}

    def join_state(self, split: Mapping[str, Any]) -> dict[str, Any]:
        """The reverse of `split_state`; a parameter without a state has had no gradient yet."""
        of_parameters, count = split["state"], len(self.tensors)
        states: dict[int, dict[str, Any]] = {number: {} for number in range(count if of_parameters else 0)}
        for name in _MOMENTS if of_parameters else ():
            values = [
                of_parameters[number][name] if number in of_parameters else torch.zeros_like(weight)
                for number, weight in enumerate(self._parameters)
            ]
            for number, value in enumerate(self.join([value.detach() for value in values])):
                states[number] |= {"step": next(iter(of_parameters.values()))["step"].clone(), name: value}
        return {"state": states, "param_groups": [split["param_groups"][0] | {"params": list(range(count))}]}
