"""Exports a trained model: `python -m export.to_onnx runs/NAME/champion --output sampler.onnx`.

The file is written only if its outputs agree with PyTorch's.
"""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

try:
    import onnx
    import torch
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"error: this command needs {error.name}: pip install 'ray-ddpm[train]'", file=sys.stderr)
    sys.exit(2)

from diffusion.data.dataset import load_source
from diffusion.data.sources import open_source
from diffusion.errors import InputError
from diffusion.evaluation.features import fit_features
from diffusion.files import replacing
from diffusion.training.checkpoints import TrainedModel
from export.cli import OneLineParser
from export.contract import BATCH, OPSET, SamplerSpec
from export.output import check_output
from export.parity import (
    NUM_SAMPLES,
    ParityCase,
    ParityError,
    check_parity,
    check_samples,
    check_storage,
    require,
)
from export.precision import store_in_half, with_rounded_weights
from export.sampler import Sampler
from export.torch_sampler import TorchSampler, sampler_spec

__all__ = ["OPSET", "ParityError", "Precision", "denoiser_graph", "export_onnx", "sampler_spec"]

Precision = Literal["fp32", "fp16"]


def export_onnx(model: TrainedModel, precision: Precision = "fp32") -> tuple[bytes, list[ParityCase]]:
    """Export a model as an ONNX file whose metadata contains everything needed for sampling.

    Args:
        model: the model.
        precision: "fp16" stores the weights in 16 bits. The file is then compared with a PyTorch model
            that has the same rounded weights and, with a larger tolerance, with the model itself.

    Returns:
        The file's bytes, and the comparisons with PyTorch, which all passed.

    Raises:
        ParityError: a comparison failed.
        InputError: a weight is too large for float16.
    """
    stored = TorchSampler.of(with_rounded_weights(model) if precision == "fp16" else model)
    proto = onnx_model(stored)
    if precision == "fp16":
        store_in_half(proto.graph, {name for name, _ in model.network.named_parameters()})
        onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    sampler = Sampler(content, provider="cpu")
    cases = check_parity(stored, sampler)
    if precision == "fp16":
        cases += check_storage(TorchSampler.of(model), sampler)
    require(cases)
    return content, cases


def onnx_model(reference: TorchSampler) -> onnx.ModelProto:
    """Convert a model to ONNX, with its metadata.

    Raises:
        ParityError: the exporter fixed the batch size.
    """
    proto = denoiser_graph(reference.network, reference.spec)
    _strip(proto.graph)
    onnx.helper.set_model_props(proto, reference.spec.to_metadata())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def denoiser_graph(network: torch.nn.Module, spec: SamplerSpec) -> onnx.ModelProto:
    """Convert a network to ONNX, with the contract's inputs and outputs of any batch size.

    Args:
        network: network in evaluation mode, with the positional arguments `spec.graph_inputs` and the
            outputs `spec.graph_outputs`.
        spec: what sampling needs besides the network.

    Raises:
        ParityError: the exporter fixed the batch size.
    """
    # Two examples, since the exporter may take a batch of one for a constant. A tensor for each input, since
    # the exporter would merge inputs that are the same object.
    examples = {
        name: torch.zeros(2, *shape, dtype=getattr(torch, dtype))
        for name, (dtype, shape) in spec.graph_inputs.items()
    }
    batch = torch.export.Dim(BATCH)
    with _quiet():
        program = torch.onnx.export(
            network,
            tuple(examples.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(examples),
            output_names=list(spec.graph_outputs),
            dynamic_shapes=[{0: batch}] * len(examples),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for value in (*proto.graph.input, *proto.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if not first.dim_param:
            raise ParityError(f"the exporter fixed the batch size of {value.name} to {first.dim_value}")
        first.dim_param = BATCH
    return proto


def _strip(graph: onnx.GraphProto) -> None:
    """Remove stack traces, which contain local paths, and shapes that ONNX Runtime infers itself."""
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
    """Hide what torch.onnx prints, logs and warns about during an export."""
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
    """Compare samples with the data set and append the result to `cases`.

    Returns:
        None, or why the data set could not be used: it need not be on this machine.

    Raises:
        ParityError: the comparison failed.
    """
    not_compared = "samples were not compared with the data"
    try:
        source = open_source(model.config.data)
        if source.larger_than_memory:
            return f"{not_compared} ({model.data.name} is larger than data.memory_limit_gb)"
        dataset = load_source(source)
    except InputError as error:
        return f"{not_compared} ({error})"
    if dataset.spec.fingerprint != model.data.fingerprint:
        return f"{not_compared}: {model.data.name} differs from the data that the model was trained on"
    features = fit_features(dataset, model.config.metrics.features)
    samples, sampler = TorchSampler.of(model).draw(NUM_SAMPLES).samples, Sampler(content, provider="cpu")
    cases += check_samples(samples, sampler, dataset, features)
    require(cases)
    return None


def main(arguments: Sequence[str] | None = None, prog: str = "python -m export.to_onnx") -> int:
    """Run the command line, which exports one model folder, and return the exit status.

    Args:
        arguments: command-line arguments; None: those of the process.
        prog: name of the command in its help.
    """
    parser = OneLineParser(prog=prog, description="Export a trained model to ONNX.")
    parser.add_argument("model", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("--output", type=Path, default=Path("sampler.onnx"))
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="fp16: store the weights in 16 bits, which halves the file",
    )
    options = parser.parse_args(arguments)
    try:
        check_output(options.output)
        model = TrainedModel.load(options.model)
        content, cases = export_onnx(model, options.precision)
        note = _compare_samples(model, content, cases)
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
        print(
            f"error: --output {options.output} cannot be written ({error.strerror}): choose another path",
            file=sys.stderr,
        )
        return 2
    worst = max(case.max_abs_error / max(case.output_scale, 1e-6) for case in cases)
    print(f"{options.output}: {len(content) / 1e6:.2f} MB, {len(cases)} comparisons with PyTorch passed")
    print(f"largest difference: {worst:.1e}, relative to the largest output")
    if note:
        print(note)
    print(f"next: python -m export.sampler {options.output} --output samples.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
