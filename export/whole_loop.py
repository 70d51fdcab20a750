"""Builds and checks whole-loop files, which draw finished samples in one call: see docs/whole-loop.md."""

from contextlib import suppress
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from diffusion.errors import InputError
from diffusion.registry import SAMPLERS
from export.contract import BATCH, LABEL, OUTPUT, VARIANCE_OUTPUT, SamplerSpec, X
from export.graph_builder import GraphBuilder, onnx_file
from export.loop_format import (
    FIRST_INDEX,
    GUIDANCE_SCALE,
    NOISE,
    NUM_SAMPLES,
    SAMPLES,
    SEED,
    TABLE,
    loop_columns,
    loop_defaults,
    loop_feeds,
    loop_inputs,
    loop_metadata,
    loop_table,
)
from export.noise import normal_noise
from export.noise_graph import BitwiseWords
from export.noise_graph import normal_noise as noise_ops
from export.parity import ParityCase
from export.sampler import Sampler
from export.session import open_session
from export.step_graph import step_ops

TOLERANCE = 1e-4  # in standard deviations of the data

_NETWORK = "network/"  # how the names of the network's values begin
_NUM_SAMPLES, _EVALUATIONS = 8, 100  # of each sampler that is compared
_OWN_GUIDANCE, _OTHER_GUIDANCE = None, (1.0, 3.0)
_SEED = 5
_DIVERGED = 1e3  # standard deviations: such samples amplify rounding errors without bound


def whole_loop(sampler_file: bytes, *, in_graph_noise: bool = False, required_inputs: bool = False) -> bytes:
    """Convert a sampler.onnx into a file that draws finished samples in one call.

    Args:
        sampler_file: bytes of a sampler.onnx.
        in_graph_noise: whether the graph makes the noise of a seed itself, instead of having it as an input.
        required_inputs: whether `table`, `guidance_scale` and `first_index` have no default values, which
            ONNX Runtime's JavaScript and Java cannot override.

    Returns:
        The bytes of the file, which has not been compared with anything: see `compare_loop`.

    Raises:
        InputError: the bytes are no sampler.onnx, or its network cannot be put into a loop.
    """
    spec = Sampler(sampler_file, provider="cpu").spec
    network = onnx.load_from_string(sampler_file)
    if network.functions or {each.domain for each in network.opset_import} - {""}:
        raise InputError("the network has operators of its own, which a whole loop cannot take over")
    onnx.compose.add_prefix_graph(network.graph, _NETWORK, inplace=True)
    graph = _outer_graph(spec, network.graph, in_graph_noise)
    if not required_inputs:
        given = {each.name for each in graph.input}
        graph.initializer.extend(
            numpy_helper.from_array(value, name)
            for name, value in loop_defaults(spec).items()
            if name in given
        )
    model = onnx_file(graph, loop_metadata(spec, in_graph_noise=in_graph_noise))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _outer_graph(spec: SamplerSpec, network: onnx.GraphProto, in_graph_noise: bool) -> onnx.GraphProto:
    """Noise to start from, the loop over the rows of the table, and the conversion to data units."""
    builder = GraphBuilder("outer/")
    if in_graph_noise:
        words = builder.constant(2**32, "int64")
        last = builder.op("Add", FIRST_INDEX, NUM_SAMPLES)
        indices = builder.op("Range", FIRST_INDEX, last, builder.constant(1, "int64"))
        builder.cast(builder.op("Mod", indices, words), "uint32", output="sample_indices")
        seed = builder.op("Unsqueeze", builder.op("Mod", SEED, words), builder.constant([0], "int64"))
        builder.cast(seed, "uint32", output="seed_words")
        k = builder.constant(0, "uint32")
        start = noise_ops(builder, BitwiseWords(builder), "seed_words", "sample_indices", k, spec.shape)
    else:
        start = builder.cast(builder.item(NOISE, 0), "float64")
    zeros = builder.op("Mul", start, builder.constant(0.0, "float64"), output="zeros")
    builder.op("Shape", zeros, start=0, end=1, output="batch_size")
    if spec.classes:
        one, two = (builder.constant(each, "int64") for each in (1, 2))
        own_scale = builder.constant(spec.sampler["guidance_scale"], "float32")
        scale = builder.op("Where", builder.op("IsNaN", GUIDANCE_SCALE), own_scale, GUIDANCE_SCALE)
        builder.cast(scale, "float64", output="scale")
        is_one = builder.op("Equal", "scale", builder.constant(1.0, "float64"))
        # How often each sample goes through the network: without its class first, if it is guided.
        calls = builder.op("Where", is_one, one, two)
        builder.op("Unsqueeze", calls, builder.constant([0], "int64"), output="calls")
        builder.op("Mul", "calls", "batch_size", output="network_batch")
        builder.op("Sub", "network_batch", "batch_size", output="first_with_class")
    rows = _table(builder, loop_table(spec, spec.table))
    body = _body(spec, network, in_graph_noise)
    builder.split(
        "Loop",
        rows,
        "",
        start,
        zeros,
        zeros,
        outputs=["x_last", "x0_last", "x0_before_last"],
        body=body,
    )
    scaled = builder.op("Mul", "x_last", builder.constant(spec.data["std"], "float64"))
    data = builder.op("Add", scaled, builder.constant(spec.data["mean"], "float64"))
    if spec.data["range"] is not None:
        data = builder.op("Clip", data, *(builder.constant(each, "float64") for each in spec.data["range"]))
    builder.cast(data, "float32", output=SAMPLES)
    inputs = loop_inputs(spec, in_graph_noise=in_graph_noise)
    return builder.graph("whole_loop", inputs, {SAMPLES: ("float32", (BATCH, *spec.shape))})


def _table(builder: GraphBuilder, own: NDArray[np.float64]) -> str:
    """Make the value "rows", the table that is given or, if that is empty, the file's own.

    Returns:
        The number of its rows, a scalar.
    """
    zero, own_rows = builder.constant([0], "int64"), builder.constant([len(own)], "int64")
    given_rows = builder.op("Shape", TABLE, start=0, end=1)
    both = builder.op("Concat", builder.constant(own, "float64"), TABLE, axis=0)
    first = builder.op("Where", builder.op("Equal", given_rows, zero), zero, own_rows)
    builder.op("Slice", both, first, builder.op("Add", own_rows, given_rows), output="rows")
    return builder.op("Squeeze", builder.op("Shape", "rows", start=0, end=1), zero)


def _body(spec: SamplerSpec, network: onnx.GraphProto, in_graph_noise: bool) -> onnx.GraphProto:
    """One row of the table: the network, with guidance, and the step.

    The network's weights are initializers here, not in the outer graph, where ONNX Runtime would not arrange
    them in the order in which its convolutions read them.
    """
    builder = GraphBuilder("row/")
    values = builder.op("Gather", "rows", "row_index", axis=0)
    row = {name: builder.item(values, index) for index, name in enumerate(loop_columns(spec))}
    batch = "network_batch" if spec.classes else "batch_size"
    x_32 = builder.cast("x", "float32")
    inputs = {X: x_32}
    level_type, _ = spec.graph_inputs[spec.level_input]
    inputs[spec.level_input] = builder.op("Expand", builder.cast(row["level"], level_type), batch)
    for condition in spec.conditions:
        mean, std = (builder.constant(each, "float64") for each in (condition.mean, condition.std))
        centred = builder.op("Sub", builder.cast(condition.input_name, "float64"), mean)
        inputs[condition.input_name] = builder.cast(builder.op("Div", centred, std), "float32")
    if spec.classes:
        no_class = builder.op("Expand", builder.constant(len(spec.classes), "int64"), "batch_size")
        first = builder.op("Sub", "batch_size", "first_with_class")
        twice = builder.op("Mul", "batch_size", builder.constant([2], "int64"))
        labels = builder.op("Concat", no_class, LABEL, axis=0)
        inputs[LABEL] = builder.op("Slice", labels, first, twice)
        for name in (X, *(condition.input_name for condition in spec.conditions)):
            rank = len(spec.graph_inputs[name][1])
            repeats = builder.op("Concat", "calls", builder.constant([1] * rank, "int64"), axis=0)
            inputs[name] = builder.op("Tile", inputs[name], repeats)
    for name, value in inputs.items():
        builder.op("Identity", value, output=_NETWORK + name)
    builder.nodes += network.node
    builder.initializers |= {each.name: each for each in network.initializer}
    out = builder.cast(_NETWORK + OUTPUT, "float64")
    variance = builder.cast(_NETWORK + VARIANCE_OUTPUT, "float64") if spec.learned_variance else None
    if spec.classes:
        # Without guidance the two are the same, and their difference is 0.
        unconditional = builder.op("Slice", out, builder.constant([0], "int64"), "batch_size")
        conditional = builder.op("Slice", out, "first_with_class", "network_batch")
        difference = builder.op("Sub", conditional, unconditional)
        out = builder.op("Add", unconditional, builder.op("Mul", "scale", difference))
        if variance is not None:
            variance = builder.op("Slice", variance, "first_with_class", "network_batch")
    is_noisy = builder.op("Not", builder.op("Equal", row["s"], builder.constant(0.0, "float64")))
    z = builder.op("If", is_noisy, then_branch=_noise_of_row(spec, in_graph_noise), else_branch=_no_noise())
    step_ops(builder, row, "x", out, "x0_previous", z, "x_next", "x0", "x0_previous_2", variance)
    builder.op("Identity", "x0_previous", output="x0_previous_next")
    builder.op("Identity", "goes_on", output="goes_on_next")
    state = ("float64", (BATCH, *spec.shape))
    return builder.graph(
        "row",
        {
            "row_index": ("int64", ()),
            "goes_on": ("bool", ()),
            **dict.fromkeys(("x", "x0_previous", "x0_previous_2"), state),
        },
        {"goes_on_next": ("bool", ()), **dict.fromkeys(("x_next", "x0", "x0_previous_next"), state)},
    )


def _noise_of_row(spec: SamplerSpec, in_graph_noise: bool) -> onnx.GraphProto:
    builder = GraphBuilder("noise/")
    next_index = builder.op("Add", "row_index", builder.constant(1, "int64"))
    if in_graph_noise:
        k = builder.cast(next_index, "uint32")
        z = noise_ops(builder, BitwiseWords(builder), "seed_words", "sample_indices", k, spec.shape)
    else:
        z = builder.cast(builder.op("Gather", NOISE, next_index, axis=0), "float64")
    builder.op("Identity", z, output="z_drawn")
    return builder.graph("noise", {}, {"z_drawn": ("float64", (BATCH, *spec.shape))})


def _no_noise() -> onnx.GraphProto:
    builder = GraphBuilder("no_noise/")
    builder.op("Identity", "zeros", output="no_z")
    return builder.graph("no_noise", {}, {"no_z": ("float64", None)})


def compare_loop(content: bytes, sampler: Sampler) -> list[ParityCase]:
    """Compare a whole-loop file with the numpy sampler, from the same noise, in one call each.

    The comparisons are the file's own table, which is left out of the call, and every sampler of `SAMPLERS`
    over at most its `parity_steps` as an input; for a conditional model with the file's guidance scale, left
    out, and with scales 1 and 3. Samplers that diverge are left out, except the file's own.

    Args:
        content: bytes of the whole-loop file.
        sampler: the sampler.onnx that it was made of, on the CPU.

    Returns:
        Differences in standard deviations of the data; one passes if it is at most `TOLERANCE`.
    """
    spec = sampler.spec
    session, _ = open_session(content, "cpu")
    num_steps = spec.noise_schedule.num_train_timesteps
    choices: dict[str, dict[str, Any]] = {"whole loop": {}}
    for name, method in SAMPLERS.items():
        choice = {"sampler": name, "num_steps": min(method.parity_steps, num_steps)}
        with suppress(InputError):  # not possible with this model's noise levels
            sampler.table(**choice)
            choices[f"whole loop, {name}, {choice['num_steps']} steps"] = choice
    scales = [_OWN_GUIDANCE, *(_OTHER_GUIDANCE if spec.classes else ())]
    cases = []
    for case, choice in choices.items():
        for scale in scales:
            name = case + ("" if scale is None else f", guidance {scale:g}")
            expected, actual = _draw_both(session, sampler, choice, scale)
            std = np.array(spec.data["std"])
            spread = float(np.abs((expected - np.array(spec.data["mean"])) / std).max())
            if choice and not spread <= _DIVERGED:
                continue
            error = float(np.abs((actual - expected) / std).max())
            cases.append(ParityCase(name, error, 1.0, bool(error <= TOLERANCE)))
    return cases


def _draw_both(
    session: onnxruntime.InferenceSession,
    sampler: Sampler,
    choice: dict[str, Any],
    scale: float | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Samples by numpy and by the file, [count, *shape] in data units; no choice is the file's own table."""
    spec = sampler.spec
    table = sampler.table(**choice) if choice else None
    given = [each.name for each in session.get_inputs()]
    count = min(_NUM_SAMPLES, max(1, _EVALUATIONS // (table or spec.table).num_rows))
    conditions = {
        each.name: normal_noise(_SEED + 1, np.arange(count), index, each.shape) * np.array(each.std)
        + np.array(each.mean)
        for index, each in enumerate(spec.conditions)
    }
    # In float32, as the file has them, so that both get the same.
    conditions = {name: values.astype(np.float32).astype(np.float64) for name, values in conditions.items()}
    feeds = loop_feeds(
        spec,
        count,
        _SEED,
        in_graph_noise=NOISE not in given,
        required_inputs=TABLE in given,
        table=table,
        guidance_scale=scale,
        conditions=conditions,
    )
    (actual,) = session.run([SAMPLES], feeds)
    try:
        expected = sampler.sample(count, seed=_SEED, conditions=conditions, guidance_scale=scale, **choice)
    except InputError:  # it diverged
        return np.full(actual.shape, np.inf), actual.astype(np.float64)
    return expected.astype(np.float64), actual.astype(np.float64)
