"""Stores weights in 16 bits, which halves the file. The network still computes in 32 bits."""

import copy
import dataclasses
from collections.abc import Collection

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from diffusion.errors import InputError
from diffusion.training.checkpoints import TrainedModel

_MAX_FLOAT16 = float(np.finfo(np.float16).max)


def with_rounded_weights(model: TrainedModel) -> TrainedModel:
    """Copy a model with its weights rounded to the nearest float16 numbers, but stored as float32.

    Raises:
        InputError: a weight is too large for float16.
    """
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            largest = float(weight.abs().max())
            if not largest <= _MAX_FLOAT16:
                raise InputError(
                    f"--precision fp16: the weights {name} reach {largest:.3g}, but float16 holds at most "
                    f"{_MAX_FLOAT16:.0f}; use fp32"
                )
            weight.copy_(weight.half().float())
    return dataclasses.replace(model, network=network)


def store_in_half(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Store initializers as float16, each followed by a Cast to float32.

    Args:
        graph: the graph, which is modified in place.
        names: names of the initializers; names that the graph does not contain are ignored. Name only
            weights: other constants, such as the frequencies of the time embedding, need full precision.
    """
    casts = []
    for tensor in graph.initializer:
        if tensor.name in names and tensor.data_type == TensorProto.FLOAT:
            weight, name = numpy_helper.to_array(tensor), tensor.name
            tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float16), f"{name}.fp16"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    # ONNX requires nodes in the order of execution.
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
