"""The end of a sweep: the best trials confirmed, the winner exported, drawn and described."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.checkpoints import TrainedModel
from diffusion.data import Dataset
from diffusion.evaluation import Evaluator
from diffusion.files import replacing
from diffusion.generation import sample_states
from diffusion.plots import PICTURED, draw_samples, plane_limits, save_animation
from diffusion.process import q_sample
from export.noise import normal_noise
from export.parity import ParityCase, summary
from export.sampler import Sampler
from export.to_onnx import ParityError, export_onnx

# Seeds that no trial was judged by.
_CONFIRMATION_SEED, _TEST_SEED = 1_000_001, 2_000_003
_FRAMES = 40


@dataclass(frozen=True)
class Champion:
    """The winner of a sweep.

    Attributes:
        trial_id: of the trial it comes from.
        metrics: its figures: `val/...` of the confirmation, `test/...` taken once.
        confirmations: `sample/distance` of each finalist, by trial id.
        data_fingerprint: of the data it was trained and tested on.
        directory: the champion's folder.
    """

    trial_id: str
    metrics: dict[str, float]
    confirmations: dict[str, float]
    data_fingerprint: str
    directory: Path


def crown(
    finalists: Mapping[str, Path],
    dataset: Dataset,
    directory: Path,
    provenance: Mapping[str, Any],
    say: Callable[[str], None],
) -> Champion:
    """Confirm the finalists on the validation split, take the winner's test figures, export it.

    A finalist that cannot be exported leaves its place to the next.

    Args:
        finalists: folders with config.json and model.safetensors by trial id.
        dataset: all three splits.
        directory: the champion's folder, made here.
        provenance: kept with the model: run id, revision of the code.
        say: told what is being done.

    Raises:
        ParityError: no finalist's ONNX file would compute what PyTorch computes.
    """
    models = {trial_id: TrainedModel.load(folder) for trial_id, folder in finalists.items()}
    confirmed = {}
    for number, (trial_id, model) in enumerate(models.items(), start=1):
        say(f"confirming trial {trial_id} with fresh seeds ({number}/{len(models)})")
        confirmed[trial_id] = _sample_metrics(model, dataset, dataset.val, _CONFIRMATION_SEED)
    distances = {trial_id: metrics["sample/distance"] for trial_id, metrics in confirmed.items()}
    ranked = sorted(models, key=lambda trial_id: distances[trial_id])
    for winner in ranked:
        say(f"measuring trial {winner} on the test split, exporting and drawing it")
        model = models[winner]
        metrics = {
            **{name.replace("sample/", "val/sample_"): value for name, value in confirmed[winner].items()},
            **_test_metrics(model, dataset),
        }
        model = dataclasses.replace(model, provenance={**provenance, "trial_id": winner, "metrics": metrics})
        try:
            exported = export_onnx(model)
        except ParityError as error:
            if winner == ranked[-1]:
                raise
            say(f"trial {winner} is passed over: {error}")
            continue
        model.save(directory)
        _write_files(model, dataset, directory, *exported)
        (directory / "model_card.md").write_text(model_card(model, metrics))
        return Champion(winner, metrics, distances, dataset.spec.fingerprint, directory)
    raise ValueError("there are no finalists")


def _test_metrics(model: TrainedModel, dataset: Dataset) -> dict[str, float]:
    on_test = dataclasses.replace(dataset, val=dataset.test)
    losses, _ = Evaluator(model.config, on_test).held_out_losses(model.network)
    samples = _sample_metrics(model, dataset, dataset.test, _TEST_SEED)
    return {
        **{name.replace("val/", "test/"): value for name, value in losses.items()},
        **{name.replace("sample/", "test/sample_"): value for name, value in samples.items()},
    }


def _write_files(
    model: TrainedModel, dataset: Dataset, directory: Path, content: bytes, cases: list[ParityCase]
) -> None:
    """Write sampler.onnx, parity.json, the samples of both engines and the animation."""
    with replacing(directory / "sampler.onnx") as part:
        part.write_bytes(content)
    (directory / "parity.json").write_text(json.dumps(summary(cases), indent=2) + "\n")

    frames = _reverse_frames(model)
    points = model.data.kind == "points"
    limits = plane_limits(dataset.raw(dataset.train)) if points else None

    def draw(x: np.ndarray, title: str) -> Any:
        return draw_samples(x, model.data.range, limits, title)

    draw(frames[-1], "samples (PyTorch)").save(directory / "samples.png")
    onnx_samples = Sampler(content, provider="cpu").sample(PICTURED[model.data.kind], seed=0)
    draw(onnx_samples, "samples (ONNX Runtime)").save(directory / "samples_onnx.png")
    reverse = [draw(frame, "reverse diffusion") for frame in _thinned(frames)]
    forward = (
        [draw(frame, "forward diffusion") for frame in _forward_frames(model, dataset)] if points else []
    )
    save_animation([*forward, *reverse], directory / "animation.gif")


def model_card(model: TrainedModel, metrics: Mapping[str, float]) -> str:
    """What the model is, what it was trained on, how good it is, in Markdown."""
    config, data = model.config, model.data
    figures = "\n".join(f"| `{name}` | {value:.6g} |" for name, value in sorted(metrics.items()))
    params = "\n".join(f"| `{name}` | {value} |" for name, value in config.flat().items())
    distance = (
        "energy distance, normalised units"
        if data.kind == "points"
        else "Frechet distance on pixels averaged to 8x8"
    )
    return f"""# A diffusion model of {data.name}

A denoising diffusion model of {data.kind} of shape {list(data.shape)}, from trial
`{model.provenance.get("trial_id")}` of a ray-ddpm sweep. `sampler.onnx` draws samples without PyTorch:
`python -m export.sampler sampler.onnx --num-samples 64 --output samples.png`.

## Data
`{data.name}`, fingerprint `{data.fingerprint}`.
Values are normalised by mean {data.mean} and deviation {data.std}.

## Figures
`val/sample_...` from the confirmation on the validation split with fresh seeds, `test/...` taken once on the
test split. `sample_distance` is the {distance}; its floor is the distance of as many training examples.

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


def _sample_metrics(
    model: TrainedModel, dataset: Dataset, reference: torch.Tensor, seed: int
) -> dict[str, float]:
    # A larger sample than in the trials, since a few models are judged once.
    count = 2 * model.config.metrics.num_samples
    return Evaluator(model.config, dataset).sample_distance(
        model.network, reference, num_samples=count, seed=seed
    )


def _reverse_frames(model: TrainedModel) -> list[np.ndarray]:
    """From noise to samples in data units, by PyTorch from the deployed noise of seed 0."""
    shape = model.data.shape
    indices = np.arange(PICTURED[model.data.kind])

    def noise(row: int) -> torch.Tensor:
        return torch.from_numpy(normal_noise(0, indices, row + 1, shape))

    start = noise(-1)
    states = sample_states(model.network, model.table, start, noise)
    return [model.data.denormalise(x.numpy()) for x in (start, *(x for x, _ in states))]


def _forward_frames(model: TrainedModel, dataset: Dataset) -> list[np.ndarray]:
    """Training points on their way to noise: the deployed timesteps, least noisy first."""
    x_0 = dataset.train[: PICTURED["points"]]
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
