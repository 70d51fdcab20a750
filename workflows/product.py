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
from diffusion.plots import draw_samples, image_grid, num_pictured, plane_limits, save_animation
from diffusion.process import q_sample
from diffusion.sample_quality import copies, nearest_training_examples
from export.noise import normal_noise
from export.parity import require, summary
from export.sample_parity import check_samples
from export.sampler import Sampler
from export.to_onnx import export_onnx

_TEST_SEED = 2_000_003  # which no training was judged by
_FRAMES = 40
_PAIRS, _COLUMNS = 32, 16
_MOST_FOR_LIMITS = 10_000


def sample_metrics(
    model: TrainedModel, dataset: Dataset, reference: torch.Tensor, seed: int
) -> dict[str, float]:
    """`sample/distance` and what belongs to it, by twice as many samples as in training."""
    count = 2 * model.config.metrics.num_samples
    return Evaluator(model.config, dataset).samples(model.network, reference, num_samples=count, seed=seed)


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

    Of images also nearest.png: samples, each with the training image nearest to it on its right.

    Raises:
        ParityError: the ONNX file would not compute what PyTorch computes; nothing is written.
    """
    content, cases = export_onnx(model)
    cases += check_samples(model, content, dataset)
    require(cases)
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
    if not points:
        spec, pictured = model.data, frames[-1][:_PAIRS]
        samples = torch.from_numpy((pictured - np.array(spec.mean)) / np.array(spec.std)).float()
        beside = dataset.raw(nearest_training_examples(dataset, samples))
        pairs = np.stack([pictured, beside], axis=1).reshape(-1, *spec.shape)
        assert spec.range is not None
        image_grid(pairs, spec.range, columns=_COLUMNS).save(directory / "nearest.png")
    onnx_samples = Sampler(content, provider="cpu").sample(_num_pictured(model), seed=0)
    draw(onnx_samples, "samples (ONNX Runtime)").save(directory / "samples_onnx.png")
    reverse = [draw(frame, "reverse diffusion") for frame in _thinned(frames)]
    forward = (
        [draw(frame, "forward diffusion") for frame in _forward_frames(model, dataset)] if points else []
    )
    save_animation([*forward, *reverse], directory / "animation.gif")
    (directory / "model_card.md").write_text(model_card(model))


def copying(metrics: Mapping[str, float]) -> str:
    """What the figures on the test split say about copied training examples, in a sentence."""
    prefix = "test/sample_"
    if f"{prefix}copied" not in metrics:
        return "Whether it copies training examples was not measured."
    share, chance = (100.0 * metrics[f"{prefix}{name}"] for name in ("copied", "copied_floor"))
    said = "It copies training examples" if copies(dict(metrics), prefix) else "No sign of copying"
    return (
        f"{said}: {share:.1f}% of its samples lie less than a third as far from the nearest training example "
        f"as from the next, of held-out examples {chance:.1f}%."
    )


def model_card(model: TrainedModel) -> str:
    """What the model is, what it was trained on, how good it is, in Markdown."""
    config, data = model.config, model.data
    metrics: Mapping[str, float] = model.provenance.get("metrics", {})
    trial = model.provenance.get("trial_id")
    origin = f"trial `{trial}` of a ray-ddpm sweep" if trial else "a ray-ddpm training"
    figures = "\n".join(f"| `{name}` | {value:.6g} |" for name, value in sorted(metrics.items()))
    params = "\n".join(f"| `{name}` | {value} |" for name, value in config.flat().items())
    features = config.metrics.features
    distance = (
        "energy distance, normalised units"
        if data.kind == "points"
        else f"kernel distance (KID) below 5,000 samples, else the Frechet distance, on {features} features"
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
It reproduces the training data's distribution, errors and gaps included.
{copying(metrics)}

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
