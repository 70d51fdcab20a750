"""Are the file's samples as good as PyTorch's? Both from the same noise, measured against held-out data."""

import numpy as np
import torch

from diffusion.checkpoints import TrainedModel
from diffusion.data import Dataset
from diffusion.feature_fitting import with_features
from diffusion.sample_quality import SampleJudge
from export.parity import SEED, ParityCase, end_of_trajectory, torch_engine
from export.sampler import Sampler

_MOST_SAMPLES = 256  # both engines draw them


def check_samples(model: TrainedModel, onnx_file: bytes, dataset: Dataset) -> list[ParityCase]:
    """Compare `sample/distance` of both engines' samples to the validation split.

    Args:
        model: what the file was made of.
        onnx_file: on the CPU.
        dataset: that the model was trained on.

    Returns:
        One comparison: it passes where the two distances differ by less than the standard error of
        PyTorch's. Its scale is that distance.
    """
    if dataset.features is None:
        dataset = with_features(dataset, model.config.metrics.features)
    count = min(_MOST_SAMPLES, len(dataset.train))
    scale = model.config.sampler.guidance_scale
    expected = end_of_trajectory(model, model.table, scale, count, torch_engine(model))
    actual = Sampler(onnx_file, provider="cpu").sample(count, seed=SEED)
    spec, judge = model.data, SampleJudge(dataset, dataset.val[:])
    mean, std = np.array(spec.mean), np.array(spec.std)
    found = [
        judge.figures(torch.from_numpy((samples - mean) / std).float())
        for samples in (spec.denormalise(expected), actual)
    ]
    by_torch, by_onnx = (figures["distance"] for figures in found)
    error = abs(by_onnx - by_torch)
    passed = bool(error <= found[0].get("distance_se", 0.0))
    return [ParityCase(f"distance of {count} samples", error, abs(by_torch), passed, error)]
