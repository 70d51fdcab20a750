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

from collections.abc import Mapping

import onnx

from diffusion.process.samplers import COEFFICIENTS
from export.gpu_loop import step_file
from export.graph_builder import GraphBuilder, onnx_file


def step_ops(
    builder: GraphBuilder,
    row: Mapping[str, str],
    x: str,
    out: str,
    x0_previous: str,
    z: str,
    x_next: str,
    x0: str,
    x0_previous_2: str | None = None,
    variance: str | None = None,
) -> None:
    """Add `diffusion.process.samplers.step` to a graph, in the same order of sums.

    Args:
        builder: the graph.
        row: the row's coefficients, float64 scalars, by the names of its columns.
        x, out, x0_previous, z: float64 [batch, ...], as for `step`.
        x_next, x0: names of the results.
        x0_previous_2, variance: float64 [batch, ...], as for `step`, if the row has the columns e2 and g.
    """

    def times(column: str, value: str) -> str:
        return builder.op("Mul", row[column], value)

    unclipped = builder.op("Add", times("a", x), times("b", out))
    builder.op("Clip", unclipped, row["lo"], row["hi"], output=x0)
    total = builder.op("Add", times("c", x0), times("d", x))
    total = builder.op("Add", total, times("e", x0_previous))
    if x0_previous_2 is not None:
        total = builder.op("Add", total, times("e2", x0_previous_2))
    total = builder.op("Add", total, times("f", out))
    noise = times("s", z)
    if variance is not None:
        noise = builder.op("Mul", noise, builder.op("Exp", times("g", variance)))
    builder.op("Add", total, noise, output=x_next)


def step_model(*, guided: bool) -> onnx.ModelProto:
    """Build the graph of one sampling step, without or with guidance."""
    builder = GraphBuilder("step/")
    names = [*COEFFICIENTS, "guidance_scale"][: len(COEFFICIENTS) + guided]
    row = {name: builder.item("row", index) for index, name in enumerate(names)}
    out = builder.cast("out", "float64")
    if guided:
        halves = ["step/unconditional", "step/conditional"]
        builder.split("Split", out, outputs=halves, axis=0, num_outputs=2)
        difference = builder.op("Mul", row["guidance_scale"], builder.op("Sub", halves[1], halves[0]))
        out = builder.op("Add", halves[0], difference)
    step_ops(builder, row, "x", out, "x0_previous", "z", "x_next", "x0")
    x_next = builder.cast("x_next", "float32")
    builder.op("Concat", *[x_next] * (1 + guided), axis=0, output="network_input")
    state = ("float64", None)
    graph = builder.graph(
        "guided_step" if guided else "step",
        {
            "x": state,
            "out": ("float32", None),
            "x0_previous": state,
            "z": state,
            "row": ("float64", [len(COEFFICIENTS) + 1]),
        },
        {"x_next": state, "x0": state, "network_input": ("float32", None)},
    )
    return onnx_file(graph)


if __name__ == "__main__":
    for guided in (False, True):
        step_file(guided=guided).write_bytes(step_model(guided=guided).SerializeToString())
