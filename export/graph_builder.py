"""Builds ONNX graphs node by node, for the parts of a sampler that are computed beside the network."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from export.contract import OPSET

IR_VERSION = 10

# Element types by numpy's names.
TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "uint32": TensorProto.UINT32,
    "bool": TensorProto.BOOL,
}


class GraphBuilder:
    """A graph that grows by one operator at a time. Values are known by their names.

    Args:
        prefix: how the names of all values that the builder makes begin. Graphs that are nested in, or
            merged with, each other need different ones.
    """

    def __init__(self, prefix: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._prefix = prefix
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def op(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add an operator with one output, and return the output's name, which may be given."""
        name = output or f"{self._prefix}{len(self.nodes)}_{operator}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def split(self, operator: str, *inputs: str, outputs: Sequence[str], **attributes: Any) -> None:
        """Add an operator with several outputs, whose names are given; an empty one is left out."""
        self.nodes.append(helper.make_node(operator, inputs, outputs, **attributes))

    def constant(self, value: ArrayLike, dtype: str) -> str:
        """A constant; equal ones are one."""
        array = np.asarray(value, dtype=dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"{self._prefix}constant_{len(self._constants)}"
            self.initializers[name] = numpy_helper.from_array(array, name)
            self._constants[key] = name
        return self._constants[key]

    def cast(self, value: str, dtype: str, output: str | None = None) -> str:
        """Convert a value to another element type."""
        return self.op("Cast", value, to=TYPES[dtype], output=output)

    def item(self, vector: str, index: int) -> str:
        """One element of a vector, as a scalar."""
        return self.op("Gather", vector, self.constant(index, "int64"), axis=0)

    def graph(
        self,
        name: str,
        inputs: Mapping[str, tuple[str, Sequence[Any] | None]],
        outputs: Mapping[str, tuple[str, Sequence[Any] | None]],
    ) -> onnx.GraphProto:
        """The graph with these inputs and outputs: their element types, and shapes or None."""
        declared = [
            [
                helper.make_tensor_value_info(each, TYPES[dtype], shape)
                for each, (dtype, shape) in values.items()
            ]
            for values in (inputs, outputs)
        ]
        return helper.make_graph(self.nodes, name, *declared, list(self.initializers.values()))


def onnx_file(graph: onnx.GraphProto, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """A model with one graph."""
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="ray-ddpm"
    )
    helper.set_model_props(model, dict(metadata or {}))
    return model
