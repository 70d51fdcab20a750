"""A model as it is handed over: its figures on unseen data, the ONNX file, pictures and a card."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.checkpoints import TrainedModel
from diffusion.data import Dataset
from diffusion.evaluation import Evaluator
from diffusion.files import replacing
from diffusion.generation import condition_in_turn, sample_states
from diffusion.plots import draw_samples, num_pictured, plane_limits, save_animation
from diffusion.process import q_sample
from export.noise import normal_noise
from export.parity import summary
from export.sampler import Sampler
from export.to_onnx import export_onnx

_TEST_SEED = 2_000_003  # which no training was judged by
_FRAMES = 40
_MOST_FOR_LIMITS = 10_000


def sample_metrics(
    model: TrainedModel, dataset: Dataset, reference: torch.Tensor, seed: int
) -> dict[str, float]:
    """`sample/distance` and what belongs to it, by twice as many samples as in training."""
    count = 2 * model.config.metrics.num_samples
    return Evaluator(model.config, dataset).sample_distance(
        model.network, reference, num_samples=count, seed=seed
    )


def figures_on_test(model: TrainedModel, dataset: Dataset) -> dict[str, float]:
    """Figures on the test split under `test/...`; to be taken once, of a model that is settled on."""
    on_test = dataclasses.replace(dataset, val=dataset.test)
    losses, _ = Evaluator(model.config, on_test).held_out_losses(model.network)
    samples = sample_metrics(model, dataset, dataset.test[:], _TEST_SEED)
    return {
        **{name.replace("val/", "test/"): value for name, value in losses.items()},
        **{name.replace("sample/", "test/sample_"): value for name, value in samples.items()},
    }


def write_product(model: TrainedModel, dataset: Dataset, directory: Path) -> None:
    """Write the model, sampler.onnx, parity.json, both engines' samples, the animation and the card.

    Raises:
        ParityError: the ONNX file would not compute what PyTorch computes; nothing is written.
    """
    content, cases = export_onnx(model)
    model.save(directory)
    with replacing(directory / "sampler.onnx") as part:
        part.write_bytes(content)
    (directory / "parity.json").write_text(json.dumps(summary(cases), indent=2) + "\n")

    frames = _reverse_frames(model)
    points = model.data.kind == "points"
    limits = plane_limits(dataset.raw(dataset.train[:_MOST_FOR_LIMITS])) if points else None

    def draw(x: np.ndarray, title: str) -> Any:
        return draw_samples(x, model.data.range, limits, title, model.data.num_classes)

    draw(frames[-1], "samples (PyTorch)").save(directory / "samples.png")
    onnx_samples = Sampler(content, provider="cpu").sample(_num_pictured(model), seed=0)
    draw(onnx_samples, "samples (ONNX Runtime)").save(directory / "samples_onnx.png")
    reverse = [draw(frame, "reverse diffusion") for frame in _thinned(frames)]
    forward = (
        [draw(frame, "forward diffusion") for frame in _forward_frames(model, dataset)] if points else []
    )
    save_animation([*forward, *reverse], directory / "animation.gif")
    (directory / "model_card.md").write_text(model_card(model))


def model_card(model: TrainedModel) -> str:
    """What the model is, what it was trained on, how good it is, in Markdown."""
    config, data = model.config, model.data
    metrics: Mapping[str, float] = model.provenance.get("metrics", {})
    trial = model.provenance.get("trial_id")
    origin = f"trial `{trial}` of a ray-ddpm sweep" if trial else "a ray-ddpm training"
    figures = "\n".join(f"| `{name}` | {value:.6g} |" for name, value in sorted(metrics.items()))
    params = "\n".join(f"| `{name}` | {value} |" for name, value in config.flat().items())
    distance = (
        "energy distance, normalised units"
        if data.kind == "points"
        else "Frechet distance on pixels averaged to 8x8"
    )
    return f"""# A diffusion model of {data.name}

A denoising diffusion model of {data.kind} of shape {list(data.shape)}, from
{origin}. `sampler.onnx` draws samples without PyTorch:
`python -m export.sampler sampler.onnx --num-samples 64 --output samples.png`.

## Data
`{data.name}`, fingerprint `{data.fingerprint}`.
Values are normalised by mean {data.mean} and deviation {data.std}.

## Figures
`val/...` on the validation split (a sweep's with fresh seeds), `test/...` taken once on the test split.
`sample_distance` is the {distance}; its floor is the distance of as many training examples.

| figure | value |
|---|---|
{figures}

## Limits
It reproduces the training data's distribution, errors and gaps included, and can come close to single
training examples. Nothing here measures copying.

## Parameters
| name | value |
|---|---|
{params}
"""


def _num_pictured(model: TrainedModel) -> int:
    return num_pictured(model.data.kind, model.data.num_classes)


def _reverse_frames(model: TrainedModel) -> list[np.ndarray]:
    """From noise to samples in data units, by PyTorch from the deployed noise of seed 0."""
    shape = model.data.shape
    count, num_classes = _num_pictured(model), model.data.num_classes
    indices = np.arange(count)
    condition = condition_in_turn(count, num_classes, model.config.sampler.guidance_scale)

    def noise(row: int) -> torch.Tensor:
        return torch.from_numpy(normal_noise(0, indices, row + 1, shape))

    start = noise(-1)
    states = sample_states(model.network, model.table, start, noise, condition)
    return [model.data.denormalise(x.numpy()) for x in (start, *(x for x, _ in states))]


def _forward_frames(model: TrainedModel, dataset: Dataset) -> list[np.ndarray]:
    """Training points on their way to noise: the deployed timesteps, least noisy first."""
    x_0 = dataset.train[: num_pictured("points")]
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    frames = [x_0]
    for t in _thinned(list(model.table.timesteps[::-1])):
        timesteps = torch.full((len(x_0),), int(t), dtype=torch.int64)
        frames.append(q_sample(model.schedule, x_0, timesteps, noise))
    return [model.data.denormalise(frame.numpy()) for frame in frames]


def _thinned(frames: Sequence[Any]) -> list[Any]:
    """At most `_FRAMES` of them, evenly, the first and the last included."""
    picked = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _FRAMES)).round().astype(int))
    return [frames[index] for index in picked]
