"""Weights stored in 16 bits: half the file. The network computes in 32, so nothing else changes."""

import copy
import dataclasses
from collections.abc import Collection

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from diffusion.checkpoints import TrainedModel
from diffusion.errors import InputError

_LARGEST = float(np.finfo(np.float16).max)


def with_rounded_weights(model: TrainedModel) -> TrainedModel:
    """The model whose weights are the 16-bit numbers nearest to the given model's, in float32.

    Raises:
        InputError: a weight is too large for 16 bits.
    """
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            largest = float(weight.abs().max())
            if not largest <= _LARGEST:
                raise InputError(
                    f"--precision fp16: the weights {name} reach {largest:.3g}, and 16 bits hold at most "
                    f"{_LARGEST:.0f}; give fp32"
                )
            weight.copy_(weight.half().float())
    return dataclasses.replace(model, network=network)


def store_in_half(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Store these initializers in 16 bits, each with a Cast to float32 behind it.

    Only weights are named: a table of frequencies would be ruined by rounding.

    Args:
        graph: changed in place.
        names: of float32 initializers, of those that there are.
    """
    casts = []
    for tensor in graph.initializer:
        if tensor.name in names and tensor.data_type == TensorProto.FLOAT:
            weight, name = numpy_helper.to_array(tensor), tensor.name
            tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float16), f"{name}.fp16"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    # Nodes stand in the order in which they run.
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
