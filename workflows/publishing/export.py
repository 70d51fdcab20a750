"""Export of a model with its comparison to PyTorch: sampler.onnx and parity.json."""

import json
from pathlib import Path

from diffusion.data.dataset import Dataset
from diffusion.evaluation.features import Features
from diffusion.files import replacing
from diffusion.training.checkpoints import TrainedModel
from export.parity import check_samples, require, summary
from export.to_onnx import export_onnx
from export.torch_sampler import TorchSampler

SAMPLER = "sampler.onnx"


def write_export(model: TrainedModel, dataset: Dataset, features: Features | None, directory: Path) -> None:
    """Write a model and its ONNX file, if that computes what PyTorch computes.

    Args:
        model: model to export.
        dataset: data that it was trained on.
        features: features by which images are compared; None for points.
        directory: folder for config.json, model.safetensors, sampler.onnx and parity.json; created if
            missing.

    Raises:
        ParityError: a comparison with PyTorch failed; nothing is written.
    """
    content, cases = export_onnx(model)
    cases += check_samples(TorchSampler.of(model), content, dataset, features)
    require(cases)
    model.save(directory)
    with replacing(directory / SAMPLER) as part:
        part.write_bytes(content)
    (directory / "parity.json").write_text(json.dumps(summary(cases), indent=2) + "\n")
