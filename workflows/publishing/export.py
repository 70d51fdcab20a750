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
from export.torch_sampler import TorchSampler

SAMPLER = "sampler.onnx"


def write_export(
    model: TrainedModel,
    samples: NDArray[np.float64],
    dataset: Dataset,
    features: Features | None,
    directory: Path,
) -> None:
    """Write a model and its ONNX file, if that computes what PyTorch computes.

    Args:
        model: model to export.
        samples: PyTorch's samples of the model, see `export.parity.check_samples`.
        dataset: data that it was trained on.
        features: features by which images are compared; None for points.
        directory: folder for config.json, model.safetensors, sampler.onnx and parity.json; created if
            missing.

    Raises:
        ParityError: a comparison with PyTorch failed; nothing is written.
    """
    reference = TorchSampler.of(model, dataset)
    content = onnx_model(reference).SerializeToString()
    sampler = Sampler(content, provider="cpu")
    cases = check_parity(reference, sampler)
    cases += check_samples(samples, sampler, dataset, features, reference.conditions)
    require(cases)
    model.save(directory)
    with replacing(directory / SAMPLER) as part:
        part.write_bytes(content)
    (directory / "parity.json").write_text(json.dumps(summary(cases), indent=2) + "\n")
