"""The contract of a whole-loop file: an ONNX file that draws finished samples in one call.

docs/whole-loop.md specifies it for programs in other languages; a change here is a change there.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion.errors import InputError
from diffusion.process.samplers import COEFFICIENTS, SamplerTable
from export.conditions import resolve_conditions
from export.contract import BATCH, LABEL, SPEC_KEY, WHOLE_LOOP_KEY, SamplerSpec
from export.labels import Labels, resolve_labels
from export.noise import normal_noise

VERSION = "1"

# Names in the graph. Labels and conditions have those of sampler.onnx.
NOISE, TABLE, GUIDANCE_SCALE, SAMPLES = "noise", "table", "guidance_scale", "samples"
NUM_SAMPLES, SEED, FIRST_INDEX = "num_samples", "seed", "first_index"

LEVEL = "level"  # the table's first column: what the network receives as its timestep or noise level


def loop_columns(spec: SamplerSpec) -> tuple[str, ...]:
    """Columns of the input `table`: the level, those of a sampler, and `g` if the variance is learned."""
    return (LEVEL, *COEFFICIENTS, "e2", *(("g",) if spec.learned_variance else ()))


def loop_table(spec: SamplerSpec, table: SamplerTable) -> NDArray[np.float64]:
    """The input `table` of a whole-loop file for a sampler, such as `Sampler.table` computes.

    Args:
        spec: the model's metadata.
        table: the sampler.

    Returns:
        float64 [rows, columns], with the columns of `loop_columns`.

    Raises:
        InputError: the table needs a variance that the network does not have.
    """
    columns = loop_columns(spec)
    missing = [name for name in table.columns if name not in columns]
    if missing:
        raise InputError(f"the table has the columns {', '.join(missing)}, which this model's loop lacks")
    levels = np.asarray(table.network_levels, dtype=np.float64)
    return np.column_stack([levels, *(table.column(name) for name in columns[1:])])


def loop_metadata(spec: SamplerSpec, *, in_graph_noise: bool) -> dict[str, str]:
    """Entries for the metadata_props of a whole-loop file."""
    content = {
        "version": VERSION,
        "columns": list(loop_columns(spec)),
        "rows": spec.table.num_rows,
        "noise": "in the graph" if in_graph_noise else "input",
    }
    return {WHOLE_LOOP_KEY: json.dumps(content), SPEC_KEY: spec.to_metadata()[SPEC_KEY]}


def loop_inputs(spec: SamplerSpec, *, in_graph_noise: bool) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Type and shape of each input of the graph, in order; a name stands for a size that is not fixed."""
    shape = spec.shape
    noise: dict[str, tuple[str, tuple[Any, ...]]] = {NOISE: ("float32", ("rows_and_1", BATCH, *shape))}
    if in_graph_noise:
        noise = {name: ("int64", ()) for name in (NUM_SAMPLES, SEED, FIRST_INDEX)}
    return {
        **noise,
        TABLE: ("float64", ("rows", len(loop_columns(spec)))),
        **({LABEL: ("int64", (BATCH,)), GUIDANCE_SCALE: ("float32", ())} if spec.classes else {}),
        **{each.input_name: ("float32", (BATCH, *each.shape)) for each in spec.conditions},
    }


def loop_defaults(spec: SamplerSpec) -> dict[str, NDArray[Any]]:
    """Values by which each input that may be left out stands for what the file has itself."""
    return {
        TABLE: np.zeros((0, len(loop_columns(spec)))),
        GUIDANCE_SCALE: np.array(np.nan, dtype=np.float32),
        FIRST_INDEX: np.array(0),
    }


def loop_feeds(
    spec: SamplerSpec,
    num_samples: int,
    seed: int = 0,
    *,
    in_graph_noise: bool = False,
    required_inputs: bool = False,
    table: SamplerTable | None = None,
    labels: Labels | None = None,
    guidance_scale: float | None = None,
    conditions: Mapping[str, ArrayLike] | None = None,
) -> dict[str, NDArray[Any]]:
    """Inputs with which a whole-loop file draws what `export.Sampler.sample` draws from sampler.onnx.

        feeds = loop_feeds(sampler.spec, 16, seed=0)
        samples = onnxruntime.InferenceSession("whole-loop.onnx").run(["samples"], feeds)[0]

    Args:
        spec: metadata of the sampler.onnx.
        num_samples, seed, labels, conditions: as for `export.Sampler.sample`.
        in_graph_noise, required_inputs: as the file was written.
        table: the sampler; None for the file's own.
        guidance_scale: as for `sample`; None for the file's own.
    """
    indices, rows = np.arange(num_samples), table or spec.table
    feeds: dict[str, NDArray[Any]] = {}
    if required_inputs:
        inputs = loop_inputs(spec, in_graph_noise=in_graph_noise)
        feeds = {name: value for name, value in loop_defaults(spec).items() if name in inputs}
    if in_graph_noise:
        feeds |= {NUM_SAMPLES: np.array(num_samples), SEED: np.array(seed)}
    else:
        # Rows without fresh noise do not read theirs.
        num_noises = rows.num_rows + 1 if rows.column("s").any() else 1
        feeds[NOISE] = np.stack(
            [normal_noise(seed, indices, k, spec.shape).astype(np.float32) for k in range(num_noises)]
        )
    if table is not None:
        feeds[TABLE] = loop_table(spec, table)
    label_numbers = resolve_labels(labels, num_samples, spec.classes)
    if label_numbers is not None:
        feeds[LABEL] = label_numbers
    if guidance_scale is not None:
        feeds[GUIDANCE_SCALE] = np.array(guidance_scale, dtype=np.float32)
    resolve_conditions(conditions, num_samples, spec.conditions)  # checks them
    for each in spec.conditions:
        values = np.asarray((conditions or {})[each.name], dtype=np.float32)
        feeds[each.input_name] = np.broadcast_to(values, (num_samples, *each.shape))
    return feeds
