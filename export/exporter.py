"""Converts trained models to ONNX files that sample by themselves, and checks them against PyTorch."""

import contextlib
import io
import logging
import warnings

import onnx
import torch

from diffusion.data.dataset import load_source
from diffusion.data.sources import open_source
from diffusion.errors import InputError
from diffusion.evaluation.features import fit_features
from diffusion.training.checkpoints import TrainedModel
from export.contract import BATCH, OPSET, Precision, SamplerSpec
from export.parity import (
    ParityCase,
    ParityError,
    check_parity,
    check_samples,
    check_storage,
    num_compared_samples,
    require,
)
from export.precision import store_in_half, with_rounded_weights
from export.sampler import Sampler
from export.torch_sampler import TorchSampler, sampler_spec
from export.whole_loop import compare_loop, whole_loop

__all__ = ["OPSET", "ParityError", "denoiser_graph", "export_onnx", "export_whole_loop", "sampler_spec"]


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


def export_whole_loop(
    sampler_file: bytes, *, in_graph_noise: bool = False, required_inputs: bool = False
) -> tuple[bytes, list[ParityCase]]:
    """Convert a sampler.onnx into a file that draws finished samples in one call: see docs/whole-loop.md.

    Args:
        sampler_file: bytes of the sampler.onnx, which `export_onnx` has compared with PyTorch.
        in_graph_noise, required_inputs: as for `export.whole_loop.whole_loop`.

    Returns:
        The file's bytes, and the comparisons with `export.Sampler`, which all passed.

    Raises:
        ParityError: a comparison failed.
        InputError: the network cannot be put into a loop.
    """
    content = whole_loop(sampler_file, in_graph_noise=in_graph_noise, required_inputs=required_inputs)
    cases = compare_loop(content, Sampler(sampler_file, provider="cpu"))
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


def compare_samples(model: TrainedModel, content: bytes, cases: list[ParityCase]) -> str | None:
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
    reference, sampler = TorchSampler.of(model, dataset), Sampler(content, provider="cpu")
    drawn = reference.draw(num_compared_samples(reference.spec))
    samples = sampler.sample(len(drawn.samples), seed=0, conditions=drawn.conditions)
    cases += check_samples(model.data.denormalise(drawn.samples), samples, dataset, features)
    require(cases)
    return None
