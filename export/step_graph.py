"""Writes the ONNX graphs that run beside the network on a GPU; they are part of the repository.

    python -m export.step_graph

`step.onnx` and `labelled_step.onnx` are no models but parts of one: `export.gpu_loop.with_step` puts them
behind a network's graph, so that a row of a table is one launch. They compute
`diffusion.process.samplers.step` in float64 from the network's `model_output`; for a model with labels they
first combine the two halves of a guided batch, whose outputs without class come first. All names but
`model_output` begin with `gpu_loop.STEP`.

    inputs   x, x0, x0_previous, z  float64 [samples, ...]: x, x0 of the row before and of that before, noise
             row                    float64 [11]: `gpu_loop.ROW`
    outputs  x_next, x0_next, x0_previous_next  float64 [samples, ...]
             network_input          float32 [samples or 2 * samples, ...]: x_next, once or twice

`noise.onnx` is a model: noise of `export.noise` by operators that ONNX Runtime has on a GPU.

    inputs   seeds, indices  uint32 [samples];  k  uint32 [1];  pairs  uint32 [pairs]: 0, 1, ...
    output   z               float64 [samples, pairs, 2]
"""

from collections.abc import Mapping

import onnx

from export.contract import OUTPUT
from export.gpu_loop import ROW, STEP, noise_file, step_file
from export.graph_builder import GraphBuilder, onnx_file
from export.noise_graph import TableWords, normal_pairs

_NOISE_INPUTS: dict[str, str | int] = {"seeds": "samples", "indices": "samples", "k": 1, "pairs": "pairs"}


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


def step_part(*, labelled: bool) -> onnx.ModelProto:
    """Build the step as a part of a model, for networks without or with labels."""
    builder = GraphBuilder(STEP)
    x, x0, x0_previous, z, values = (STEP + name for name in ("x", "x0", "x0_previous", "z", "row"))
    row = {name: builder.item(values, index) for index, name in enumerate(ROW)}
    out = builder.cast(OUTPUT, "float64")
    sizes = {}
    if labelled:
        # A network's batch that is not twice as large is not guided: both parts are then the same.
        sizes = {name: builder.op("Shape", value, start=0, end=1) for name, value in (("x", x), ("out", out))}
        zero = builder.constant([0], "int64")
        unconditional = builder.op("Slice", out, zero, sizes["x"])
        conditional = builder.op("Slice", out, builder.op("Sub", sizes["out"], sizes["x"]), sizes["out"])
        difference = builder.op("Sub", conditional, unconditional)
        out = builder.op("Add", unconditional, builder.op("Mul", row["guidance_scale"], difference))
    names = [f"{STEP}{name}_next" for name in ("x", "x0", "x0_previous")]
    step_ops(builder, row, x, out, x0, z, names[0], names[1], x0_previous)
    builder.op("Identity", x0, output=names[2])
    network_input = builder.cast(names[0], "float32")
    if labelled:
        twice = builder.op("Concat", network_input, network_input, axis=0)
        network_input = builder.op("Slice", twice, builder.constant([0], "int64"), sizes["out"])
    builder.op("Identity", network_input, output=STEP + "network_input")
    state: tuple[str, None] = ("float64", None)
    graph = builder.graph(
        "",
        {**dict.fromkeys((x, x0, x0_previous, z), state), values: ("float64", [len(ROW)])},
        {**dict.fromkeys(names, state), STEP + "network_input": ("float32", None)},
    )
    graph.ClearField("name")
    # Without a version: that of the network's file is the model's.
    return onnx.ModelProto(graph=graph)


def noise_model() -> onnx.ModelProto:
    """Build the graph of noise."""
    builder = GraphBuilder("noise/")
    z = normal_pairs(builder, TableWords(builder), "seeds", "indices", "k", "pairs")
    builder.op("Identity", z, output="z")
    inputs = {name: ("uint32", [size]) for name, size in _NOISE_INPUTS.items()}
    return onnx_file(builder.graph("noise", inputs, {"z": ("float64", ["samples", "pairs", 2])}))


def main() -> None:
    """Write the files."""
    for labelled in (False, True):
        step_file(labelled=labelled).write_bytes(step_part(labelled=labelled).SerializeToString())
    noise_file().write_bytes(noise_model().SerializeToString())


if __name__ == "__main__":
    main()
