"""Pictures of a model's samples, by PyTorch and by ONNX Runtime, and an animation of the diffusion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion.data.dataset import Dataset
from diffusion.evaluation.sample_metrics import nearest_training_examples
from diffusion.plots import draw_samples, plane_limits, rows_of_images, save_animation
from diffusion.process.forward import q_sample
from diffusion.training.checkpoints import TrainedModel
from export.torch_sampler import DrawnSamples

_MAX_FRAMES = {"image": 24, "points": 40}  # in each direction; frames of noisy images are large files
_MILLISECONDS = {"image": 100, "points": 60}  # for which each frame is shown
_NUM_PAIRS, _NUM_COLUMNS = 24, 8
_MAX_POINTS_FOR_LIMITS = 10_000


def write_pictures(
    model: TrainedModel, drawn: DrawnSamples, onnx_samples: np.ndarray, dataset: Dataset, directory: Path
) -> None:
    """Draw samples.png by PyTorch, samples_onnx.png by ONNX Runtime, and animation.gif.

    For images there is also nearest.png: rows of samples, each with the nearest training image below it.

    Args:
        model: model that drew the samples.
        drawn: its samples by PyTorch, with their states.
        onnx_samples: the same samples by ONNX Runtime, in data units.
        dataset: data that it was trained on.
        directory: folder into which the pictures are written.
    """
    data, max_frames = model.data, _MAX_FRAMES[model.data.kind]
    states = [data.denormalise(x) for x in _evenly_thinned(drawn.states, max_frames)]
    samples = states[-1]
    noised: list[np.ndarray] = []
    limits = None
    if data.kind == "points":
        noised = [data.denormalise(x) for x in _noised(model, dataset.train[: len(samples)], max_frames)]
        limits = plane_limits(dataset.raw(dataset.train[:_MAX_POINTS_FOR_LIMITS]))

    def draw(x: np.ndarray, title: str) -> Image.Image:
        return draw_samples(x, data.range, limits, title, data.num_classes)

    draw(samples, "samples (PyTorch)").save(directory / "samples.png")
    draw(onnx_samples[: len(samples)], "samples (ONNX Runtime)").save(directory / "samples_onnx.png")
    if data.range is not None:
        with_nearest(samples[:_NUM_PAIRS], dataset).save(directory / "nearest.png")
    forward = [draw(x, "forward diffusion") for x in noised]
    reverse = [draw(x, "reverse diffusion") for x in states]
    save_animation([*forward, *reverse], directory / "animation.gif", duration_ms=_MILLISECONDS[data.kind])


def with_nearest(samples: np.ndarray, dataset: Dataset) -> Image.Image:
    """Picture of rows of samples, images in data units, each with the nearest training image below it."""
    spec = dataset.spec
    assert spec.range is not None
    normalised = torch.from_numpy((samples - np.array(spec.mean)) / np.array(spec.std)).float()
    nearest = dataset.raw(nearest_training_examples(dataset, normalised))
    titled = {"samples": samples, "nearest training images": nearest}
    return rows_of_images(titled, spec.range, _NUM_COLUMNS)


def _noised(model: TrainedModel, x_0: torch.Tensor, max_frames: int) -> list[np.ndarray]:
    """Training examples with increasing noise, at the sampler's timesteps."""
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    frames = [x_0]
    for t in _evenly_thinned(list(model.table.timesteps[::-1]), max_frames):
        timesteps = torch.full((len(x_0),), int(t), dtype=torch.int64)
        frames.append(q_sample(model.schedule, x_0, timesteps, noise))
    return [frame.numpy() for frame in frames]


def _evenly_thinned(items: Sequence[Any], max_items: int) -> list[Any]:
    """At most `max_items` of the items, evenly spaced, with the first and the last."""
    count = min(len(items), max_items)
    indices = np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))
    return [items[index] for index in indices]
