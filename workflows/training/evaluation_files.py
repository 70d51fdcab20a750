"""Files that describe one evaluation: the model, the bound per example and, of some, a picture of samples.

Evaluations have a picture as often as pictures take little of the training's time, and the last one has one
in any case. The first evaluation of a training also has one of what the network drew before it was trained.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.evaluation.measured_objective import MeasuredObjective
from diffusion.files import os_reason, read_json
from diffusion.manifest import MANIFEST, read_manifest
from diffusion.plots import draw_samples, samples_per_picture
from diffusion.process.generate import cycling_condition, generate
from diffusion.registry import OBJECTIVES
from diffusion.training.checkpoints import TrainedModel
from diffusion.training.loop import EvaluationResult, evaluation_points

_ELBO = "elbo_per_example.npy"
PICTURE = "samples.png"
UNTRAINED = "untrained.png"
MODEL_FILES = ("config.json", "model.safetensors", _ELBO)
PICTURES = (UNTRAINED, PICTURE)
_UNTRAINED_STEPS = 10
_FEWEST_SAMPLES = {"image": 16, "points": 500}
_EVALUATIONS_PER_UPDATE = 3  # of the network for each example: a backward pass costs as much as two forward
_PART_FOR_PICTURES = 0.1


def write_evaluation(
    result: EvaluationResult, provenance: Mapping[str, Any], folder: Path, untrained: bytes = b""
) -> None:
    """Write the `MODEL_FILES` of an evaluated model into an existing folder, and `PICTURES`.

    `PICTURE` is written at `pictured_updates` only. Its samples are those of the best evaluation so far,
    whose weights are the model that the training ends with.

    Args:
        result: the evaluation.
        provenance: origin of the model.
        folder: the folder.
        untrained: content of `UNTRAINED`, which is written unless this is empty.
    """
    provenance = {**provenance, "update": result.updates, "metrics": result.metrics}
    dataclasses.replace(result.model, provenance=provenance).save(folder)
    np.save(folder / _ELBO, result.elbo.per_example)
    model, best = result.model, result.best
    if result.updates in pictured_updates(model):
        if best.update != result.updates:
            model = model.with_weights(best.weights)
        inputs = result.low_resolution(_num_samples(model))
        _draw(model, _num_samples(model), f"{best.update} updates", inputs).save(folder / PICTURE)
    if untrained:
        (folder / UNTRAINED).write_bytes(untrained)


def pictured_updates(model: TrainedModel) -> frozenset[int]:
    """Numbers of updates whose evaluations have a picture: the last, and as many others as are cheap.

    Between two pictures, the updates take at least ten times as many network evaluations as a picture does.
    """
    training, last, pictured = model.config.training, 0, set[int]()
    for updates in evaluation_points(training):
        work = _EVALUATIONS_PER_UPDATE * training.batch_size * (updates - last)
        affordable = _PART_FOR_PICTURES * work >= _num_samples(model) * _evaluations_per_sample(model.config)
        if affordable or updates == training.num_updates:
            pictured.add(updates)
            last = updates
    return frozenset(pictured)


def _num_samples(model: TrainedModel) -> int:
    """Samples in a picture: fewer in a training so short that drawing them would take a tenth of it."""
    training, data = model.config.training, model.data
    work = _EVALUATIONS_PER_UPDATE * training.batch_size * training.num_updates
    affordable = int(_PART_FOR_PICTURES * work / _evaluations_per_sample(model.config))
    most = max(affordable, _FEWEST_SAMPLES[data.kind])
    return samples_per_picture(data.kind, data.num_classes, most)


def _evaluations_per_sample(config: Config) -> int:
    """Network evaluations for a sample; the same for all trials of a sweep, which share their noise."""
    guided = config.data.uses_labels and config.sampler.guidance_scale != 1.0
    return config.sampler.num_steps * (2 if guided else 1)


def untrained_picture(
    model: TrainedModel, low_resolution: Callable[[int], tuple[Tensor, ...]] = lambda count: ()
) -> bytes:
    """Picture of samples of a network that has not been trained, as a PNG file.

    There is little to see, so it takes a tenth of the time of a later picture: fewer samples, fewer steps.
    The noise comes from a generator of its own, so the training is the same with and without it.

    Args:
        model: the model.
        low_resolution: `diffusion.training.loop.Training.low_resolution` of its training.
    """
    sampler = dataclasses.replace(
        model.config.sampler, num_steps=min(model.config.sampler.num_steps, _UNTRAINED_STEPS)
    )
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, sampler=sampler))
    file = io.BytesIO()
    count = _FEWEST_SAMPLES[model.data.kind]
    _draw(model, count, "not trained", low_resolution(count)).save(file, "png")
    return file.getvalue()


def _draw(model: TrainedModel, count: int, title: str, inputs: Sequence[Tensor]) -> Image.Image:
    """Picture of samples by the sampler of the model's config; inputs: those after the labels."""
    data, shape = model.data, model.data.shape
    device = next(model.network.parameters()).device
    condition = cycling_condition(count, data.num_classes, model.config.sampler.guidance_scale)
    samples = generate(
        model.network,
        model.table,
        shape,
        count,
        seed=0,
        device=device,
        condition=condition,
        inputs=inputs,
    )
    pixels = data.denormalise(samples.cpu().numpy())
    return draw_samples(pixels, data.range, title=title, num_classes=data.num_classes)


def check_model_files(folder: Path) -> None:
    """Check that the `MODEL_FILES` of an evaluation are whole, by their manifest if there is one.

    Raises:
        InputError: one is missing, except for the bound per example, or damaged.
    """
    if (folder / MANIFEST).exists():
        read_manifest(folder)
    read_json(folder / "config.json", "the folder of a trial")
    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="np"):  # compares the size with that of the tensors
            pass
        path = folder / _ELBO
        if path.exists():
            np.load(path)
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({os_reason(error)}): restore it from a copy") from error


def read_objective(folder: Path, objective: str, metrics: Mapping[str, float]) -> MeasuredObjective:
    """The objective of an evaluation, per example if its files have it so.

    Args:
        folder: folder of the evaluation's files.
        objective: name of the objective.
        metrics: metrics of the evaluation.
    """
    path = folder / _ELBO
    return MeasuredObjective.of(OBJECTIVES[objective], metrics, np.load(path) if path.exists() else None)
