"""Export of a model with its comparison to PyTorch: sampler.onnx and parity.json."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion.data.dataset import Dataset
from diffusion.evaluation.features import Features
from diffusion.files import replacing
from diffusion.training.checkpoints import TrainedModel
from export.parity import check_parity, check_samples, require, summary
from export.sampler import Sampler
from export.to_onnx import onnx_model
from export.torch_sampler import DrawnSamples, TorchSampler

SAMPLER = "sampler.onnx"


def write_export(
    model: TrainedModel,
    drawn: DrawnSamples,
    dataset: Dataset,
    features: Features | None,
    directory: Path,
) -> NDArray[np.float32]:
    """Write a model and its ONNX file, if that computes what PyTorch computes.

    Args:
        model: model to export.
        drawn: PyTorch's samples of the model, by seed 0.
        dataset: data that it was trained on.
        features: features by which images are compared; None for points.
        directory: folder for config.json, model.safetensors, sampler.onnx and parity.json; created if
            missing.

    Returns:
        The same samples by the file, in data units.

    Raises:
        ParityError: a comparison with PyTorch failed; nothing is written.
    """
    reference = TorchSampler.of(model, dataset)
    content = onnx_model(reference).SerializeToString()
    sampler = Sampler(content, provider="cpu")
    samples = sampler.sample(len(drawn.samples), seed=0, conditions=drawn.conditions)
    cases = check_parity(reference, sampler)
    cases += check_samples(model.data.denormalise(drawn.samples), samples, dataset, features)
    require(cases)
    model.save(directory)
    with replacing(directory / SAMPLER) as part:
        part.write_bytes(content)
    (directory / "parity.json").write_text(json.dumps(summary(cases), indent=2) + "\n")
    return samples
