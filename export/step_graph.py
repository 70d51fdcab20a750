"""Writes the two ONNX graphs of one sampling step, which run next to the denoiser on a GPU.

    python -m export.step_graph

`step.onnx` computes `diffusion.process.samplers.step` in float64; `guided_step.onnx` first combines the two
halves of a guided batch. Both files are part of the repository, since the sampler runs without the onnx
package.

    inputs   x, x0_previous, z    float64 [batch, ...]
             out                  float32 [batch, ...]; guided: [2 * batch, ...], outputs without class first
             row                  float64 [10]: the `COEFFICIENTS` of a row of the table, guidance scale
    outputs  x_next, x0           float64 [batch, ...]
             network_input        float32, shape of `out`: x_next; guided: x_next twice
"""

import onnx
from onnx import TensorProto, helper

from diffusion.process.samplers import COEFFICIENTS
from export.contract import OPSET
from export.gpu_loop import step_file

_IR_VERSION = 10


def step_model(*, guided: bool) -> onnx.ModelProto:
    """Build the graph of one sampling step, without or with guidance."""
    nodes = [
        helper.make_node("Constant", [], [f"place_{index}"], value_int=index)
        for index in range(len(COEFFICIENTS) + guided)
    ]
    names = [*COEFFICIENTS, "guidance_scale"][: len(nodes)]
    nodes += [
        helper.make_node("Gather", ["row", f"place_{index}"], [name], axis=0)
        for index, name in enumerate(names)
    ]

    def add(operator: str, inputs: list[str], name: str, **attributes: int) -> str:
        nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    add("Cast", ["out"], "out_64", to=TensorProto.DOUBLE)
    output = "out_64"
    if guided:
        nodes.append(
            helper.make_node("Split", ["out_64"], ["unconditional", "conditional"], axis=0, num_outputs=2)
        )
        add("Sub", ["conditional", "unconditional"], "difference")
        add("Mul", ["guidance_scale", "difference"], "scaled_difference")
        output = add("Add", ["unconditional", "scaled_difference"], "guided_out")
    add("Mul", ["a", "x"], "ax")
    add("Mul", ["b", output], "bout")
    add("Add", ["ax", "bout"], "unclipped")
    add("Clip", ["unclipped", "lo", "hi"], "x0")
    terms = [("c", "x0"), ("d", "x"), ("e", "x0_previous"), ("f", output), ("s", "z")]
    products = [add("Mul", [name, value], f"{name}_term") for name, value in terms]
    total = products[0]
    for index, product in enumerate(products[1:], start=1):
        total = add("Add", [total, product], "x_next" if index == len(products) - 1 else f"sum_{index}")
    add("Cast", ["x_next"], "x_next_32", to=TensorProto.FLOAT)
    add("Concat", ["x_next_32"] * (1 + guided), "network_input", axis=0)

    def value(name: str, kind: int, shape: list[int] | None = None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes,
        "guided_step" if guided else "step",
        [
            value("x", TensorProto.DOUBLE),
            value("out", TensorProto.FLOAT),
            value("x0_previous", TensorProto.DOUBLE),
            value("z", TensorProto.DOUBLE),
            value("row", TensorProto.DOUBLE, [len(COEFFICIENTS) + 1]),
        ],
        [
            value("x_next", TensorProto.DOUBLE),
            value("x0", TensorProto.DOUBLE),
            value("network_input", TensorProto.FLOAT),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)


if __name__ == "__main__":
    for guided in (False, True):
        step_file(guided=guided).write_bytes(step_model(guided=guided).SerializeToString())
