"""Files that describe one evaluation: the model, a picture of its samples, and the bound per example.

The first evaluation of a training also has a picture of what the network drew before it was trained.
"""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.evaluation.measured_objective import MeasuredObjective
from diffusion.plots import draw_samples, samples_per_picture
from diffusion.process.generate import cycling_condition, generate
from diffusion.registry import OBJECTIVES
from diffusion.training.checkpoints import TrainedModel
from diffusion.training.loop import EvaluationResult

_ELBO = "elbo_per_example.npy"
PICTURE = "samples.png"
UNTRAINED = "untrained.png"
FILES = ("config.json", "model.safetensors", PICTURE, _ELBO)
_UNTRAINED_STEPS = 10
_UNTRAINED_SAMPLES = {"image": 16, "points": 500}


def write_evaluation(
    result: EvaluationResult, provenance: Mapping[str, Any], folder: Path, untrained: bytes = b""
) -> None:
    """Write the `FILES` of an evaluated model into an existing folder.

    Args:
        result: the evaluation.
        provenance: origin of the model.
        folder: the folder.
        untrained: content of `UNTRAINED`, which is written unless this is empty.
    """
    provenance = {**provenance, "update": result.updates, "metrics": result.metrics}
    dataclasses.replace(result.model, provenance=provenance).save(folder)
    np.save(folder / _ELBO, result.elbo.per_example)
    data = result.model.data
    count = samples_per_picture(data.kind, data.num_classes)
    _draw(result.model, count, f"{result.updates} updates").save(folder / PICTURE)
    if untrained:
        (folder / UNTRAINED).write_bytes(untrained)


def untrained_picture(model: TrainedModel) -> bytes:
    """Picture of samples of a network that has not been trained, as a PNG file.

    There is little to see, so it takes a tenth of the time of a later picture: fewer samples, fewer steps.
    The noise comes from a generator of its own, so the training is the same with and without it.
    """
    sampler = dataclasses.replace(
        model.config.sampler, num_steps=min(model.config.sampler.num_steps, _UNTRAINED_STEPS)
    )
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, sampler=sampler))
    file = io.BytesIO()
    _draw(model, _UNTRAINED_SAMPLES[model.data.kind], "not trained").save(file, "png")
    return file.getvalue()


def _draw(model: TrainedModel, count: int, title: str) -> Image.Image:
    """Picture of samples by the sampler of the model's config."""
    data, shape = model.data, model.data.shape
    device = next(model.network.parameters()).device
    condition = cycling_condition(count, data.num_classes, model.config.sampler.guidance_scale)
    samples = generate(model.network, model.table, shape, count, seed=0, device=device, condition=condition)
    pixels = data.denormalise(samples.cpu().numpy())
    return draw_samples(pixels, data.range, title=title, num_classes=data.num_classes)


def read_objective(folder: Path, objective: str, metrics: Mapping[str, float]) -> MeasuredObjective:
    """The objective of an evaluation, per example if its files have it so.

    Args:
        folder: folder of the evaluation's files.
        objective: name of the objective.
        metrics: metrics of the evaluation.
    """
    path = folder / _ELBO
    return MeasuredObjective.of(OBJECTIVES[objective], metrics, np.load(path) if path.exists() else None)
