"""Pictures of a model's samples, by PyTorch and by ONNX Runtime, and an animation of the diffusion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffusion.data.dataset import Dataset
from diffusion.evaluation.sample_metrics import nearest_training_examples
from diffusion.plots import draw_samples, image_grid, plane_limits, samples_per_picture, save_animation
from diffusion.process.forward import q_sample
from diffusion.training.checkpoints import TrainedModel
from export.sampler import Sampler
from export.torch_sampler import TorchSampler
from workflows.publishing.export import SAMPLER

_MAX_FRAMES = {"image": 24, "points": 40}  # in each direction; frames of noisy images are large files
_MILLISECONDS = {"image": 100, "points": 60}  # for which each frame is shown
_NUM_PAIRS, _NUM_COLUMNS = 24, 8
_MAX_POINTS_FOR_LIMITS = 10_000


def write_pictures(model: TrainedModel, dataset: Dataset, directory: Path) -> None:
    """Draw samples.png by PyTorch, samples_onnx.png by ONNX Runtime, and animation.gif.

    For images there is also nearest.png: rows of samples, each with the nearest training image below it.

    Args:
        model: model that draws the samples.
        dataset: data that it was trained on.
        directory: folder of its sampler.onnx, into which the pictures are written.
    """
    count = samples_per_picture(model.data.kind, model.data.num_classes)
    frames = [model.data.denormalise(x) for x in TorchSampler.of(model).states(count)]
    is_points = model.data.kind == "points"
    limits = plane_limits(dataset.raw(dataset.train[:_MAX_POINTS_FOR_LIMITS])) if is_points else None

    def draw(x: np.ndarray, title: str) -> Any:
        return draw_samples(x, model.data.range, limits, title, model.data.num_classes)

    draw(frames[-1], "samples (PyTorch)").save(directory / "samples.png")
    if not is_points:
        _nearest_pairs(model, dataset, frames[-1][:_NUM_PAIRS]).save(directory / "nearest.png")
    onnx_samples = Sampler(directory / SAMPLER, provider="cpu").sample(count, seed=0)
    draw(onnx_samples, "samples (ONNX Runtime)").save(directory / "samples_onnx.png")
    reverse = [draw(frame, "reverse diffusion") for frame in _evenly_thinned(frames, model.data.kind)]
    forward = (
        [draw(frame, "forward diffusion") for frame in _forward_frames(model, dataset)] if is_points else []
    )
    duration = _MILLISECONDS[model.data.kind]
    save_animation([*forward, *reverse], directory / "animation.gif", duration_ms=duration)


def _nearest_pairs(model: TrainedModel, dataset: Dataset, samples: np.ndarray) -> Image.Image:
    """Picture of rows of samples, in data units, each with the nearest training image below it."""
    spec = model.data
    normalised = torch.from_numpy((samples - np.array(spec.mean)) / np.array(spec.std)).float()
    nearest = dataset.raw(nearest_training_examples(dataset, normalised))
    assert spec.range is not None
    rows = []
    for start in range(0, len(samples), _NUM_COLUMNS):
        for images, title in ((samples, "samples"), (nearest, "nearest training images")):
            row = image_grid(images[start : start + _NUM_COLUMNS], spec.range, columns=_NUM_COLUMNS)
            rows.append(_titled(row, title))
    picture = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    return picture


def _titled(picture: Image.Image, title: str) -> Image.Image:
    """A picture below its title."""
    height = max(12, picture.width // 32)
    titled = Image.new("RGB", (picture.width, picture.height + 3 * height // 2), "white")
    ImageDraw.Draw(titled).text((4, height // 4), title, fill="black", font_size=height)
    titled.paste(picture, (0, 3 * height // 2))
    return titled


def _forward_frames(model: TrainedModel, dataset: Dataset) -> list[np.ndarray]:
    """Training points with increasing noise, at the sampler's timesteps, in data units."""
    x_0 = dataset.train[: samples_per_picture("points")]
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    frames = [x_0]
    for t in _evenly_thinned(list(model.table.timesteps[::-1]), model.data.kind):
        timesteps = torch.full((len(x_0),), int(t), dtype=torch.int64)
        frames.append(q_sample(model.schedule, x_0, timesteps, noise))
    return [model.data.denormalise(frame.numpy()) for frame in frames]


def _evenly_thinned(items: Sequence[Any], kind: str) -> list[Any]:
    """At most `_MAX_FRAMES` of the items, evenly spaced, with the first and the last."""
    count = min(len(items), _MAX_FRAMES[kind])
    indices = np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))
    return [items[index] for index in indices]
