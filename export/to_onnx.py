"""From a trained model to sampler.onnx: `python -m export.to_onnx runs/NAME/champion --output sampler.onnx`.

Nothing is written unless the file computes what PyTorch computes.
"""

import contextlib
import dataclasses
import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Literal, get_args

import onnx
import torch

from diffusion.checkpoints import TrainedModel
from diffusion.data import load_dataset
from diffusion.errors import InputError
from diffusion.files import replacing
from diffusion.sources import needs_streaming
from export.arguments import OneLineParser
from export.output import check_output
from export.parity import ParityCase, ParityError, check_parity, check_storage, require
from export.precision import store_in_half, with_rounded_weights
from export.sample_parity import check_samples
from export.spec import SamplerSpec

__all__ = ["OPSET", "ParityError", "Precision", "export_onnx", "sampler_spec"]

OPSET = 20
Precision = Literal["fp32", "fp16"]


def export_onnx(model: TrainedModel, precision: Precision = "fp32") -> tuple[bytes, list[ParityCase]]:
    """Export a model, with everything that is needed to sample in the file's metadata.

    Args:
        model: to export.
        precision: "fp16" stores the weights in 16 bits. The file is then held to a PyTorch model with
            the same rounded weights, and, less strictly, to the model itself.

    Returns:
        The file's bytes, and the comparisons with PyTorch, all passed.

    Raises:
        ParityError: a comparison failed.
        InputError: a weight is too large for 16 bits.
    """
    stored = with_rounded_weights(model) if precision == "fp16" else model
    proto = _denoiser_graph(stored)
    _strip(proto.graph)
    if precision == "fp16":
        store_in_half(proto.graph, {name for name, _ in model.network.named_parameters()})
    onnx.helper.set_model_props(proto, sampler_spec(model).to_metadata())
    onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    cases = check_parity(stored, content)
    if precision == "fp16":
        cases += check_storage(model, content)
    require(cases)
    return content, cases


def sampler_spec(model: TrainedModel) -> SamplerSpec:
    """The metadata of a model's file."""
    data, sampler, schedule = model.data, model.config.sampler, model.config.schedule
    return SamplerSpec(
        data={
            "kind": data.kind,
            "shape": list(data.shape),
            "mean": data.mean,
            "std": data.std,
            "range": data.range,
            "columns": data.columns,
            **({"classes": list(data.classes)} if data.classes else {}),
        },
        schedule={**dataclasses.asdict(schedule), "betas": model.schedule.betas.tolist()},
        prediction_type=model.config.prediction_type,
        sampler={
            "name": sampler.name,
            "num_steps": len(model.table.timesteps),
            "eta": sampler.eta,
            "variance": sampler.variance,
            "spacing": sampler.spacing,
            "clip": list(data.clip) if sampler.clip else None,
            "guidance_scale": sampler.guidance_scale,
        },
        provenance={
            "run_id": model.provenance.get("run_id"),
            "git_revision": model.provenance.get("git_revision"),
            "data_fingerprint": data.fingerprint,
            "metrics": model.provenance.get("metrics", {}),
        },
        table=model.table,
    )


def _denoiser_graph(model: TrainedModel) -> onnx.ModelProto:
    # Two examples: a batch of one may be taken for a constant.
    x = torch.zeros(2, *model.data.shape)
    # Timesteps and labels are two tensors: one given twice would become one input.
    t, y = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    names = ["x", "t"] + (["y"] if model.data.num_classes else [])
    batch = torch.export.Dim("batch")
    with _quiet():
        program = torch.onnx.export(
            model.network,
            (x, t, y)[: len(names)],
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["model_output"],
            dynamic_shapes=[{0: batch}] * len(names),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for value in (*proto.graph.input, *proto.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if not first.dim_param:
            raise ParityError(f"the exporter fixed the batch of {value.name} to {first.dim_value}")
        first.dim_param = "batch"
    return proto


def _strip(graph: onnx.GraphProto) -> None:
    """Drop stack traces, which name local paths, and shapes that ONNX Runtime infers anyway."""
    del graph.value_info[:]
    del graph.metadata_props[:]
    graph.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """torch.onnx reports its stages on standard output and its caveats as warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _compare_samples(model: TrainedModel, content: bytes, cases: list[ParityCase]) -> str | None:
    """Add the comparison of samples, or say why there is none: the data may not be on this machine."""
    try:
        if needs_streaming(model.config.data):
            return f"samples were not held to the data ({model.data.name} is too large to be read at once)"
        dataset = load_dataset(model.config.data)
    except InputError as error:
        return f"samples were not held to the data ({error})"
    if dataset.spec.fingerprint != model.data.fingerprint:
        return f"samples were not held to the data: {model.data.name} is not what the model was trained on"
    cases += check_samples(model, content, dataset)
    require(cases)
    return None


def main(arguments: list[str] | None = None) -> int:
    """The command line: export one model folder."""
    parser = OneLineParser(prog="python -m export.to_onnx", description="Export a trained model to ONNX.")
    parser.add_argument("model", type=Path, help="a folder with config.json and model.safetensors")
    parser.add_argument("--output", type=Path, default=Path("sampler.onnx"))
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="fp32", help="fp16: weights in half the space"
    )
    options = parser.parse_args(arguments)
    try:
        check_output(options.output)
        model = TrainedModel.load(options.model)
        content, cases = export_onnx(model, options.precision)
        unseen = _compare_samples(model, content, cases)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        with replacing(options.output) as part:
            part.write_bytes(content)
    except OSError as error:
        print(f"error: --output {options.output} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    worst = max(case.max_abs_error / max(case.output_scale, 1e-6) for case in cases)
    print(f"{options.output}: {len(content) / 1e6:.2f} MB, {len(cases)} comparisons with PyTorch passed")
    print(f"largest difference {worst:.1e} of the output's scale")
    if unseen:
        print(unseen)
    print(f"next: python -m export.sampler {options.output} --output samples.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
