"""Files that describe one evaluation: the model, a picture of its samples, and the bound per example."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.evaluation.measured_objective import MeasuredObjective
from diffusion.plots import draw_samples, samples_per_picture
from diffusion.process.generate import cycling_condition, generate
from diffusion.registry import OBJECTIVES
from diffusion.training.loop import EvaluationResult

_ELBO = "elbo_per_example.npy"
FILES = ("config.json", "model.safetensors", "samples.png", _ELBO)


def write_evaluation(result: EvaluationResult, provenance: Mapping[str, Any], folder: Path) -> None:
    """Write the `FILES` of an evaluated model into an existing folder."""
    model = result.model
    provenance = {**provenance, "update": result.updates, "metrics": result.metrics}
    dataclasses.replace(model, provenance=provenance).save(folder)
    np.save(folder / _ELBO, result.elbo.per_example)
    data, shape = model.data, model.data.shape
    count = samples_per_picture(data.kind, data.num_classes)
    device = next(model.network.parameters()).device
    condition = cycling_condition(count, data.num_classes, model.config.sampler.guidance_scale)
    samples = generate(model.network, model.table, shape, count, seed=0, device=device, condition=condition)
    pixels = data.denormalise(samples.cpu().numpy())
    picture = draw_samples(
        pixels, data.range, title=f"{result.updates} updates", num_classes=data.num_classes
    )
    picture.save(folder / "samples.png")


def read_objective(folder: Path, objective: str, metrics: Mapping[str, float]) -> MeasuredObjective:
    """The objective of an evaluation, per example if its files have it so.

    Args:
        folder: folder of the evaluation's files.
        objective: name of the objective.
        metrics: metrics of the evaluation.
    """
    path = folder / _ELBO
    return MeasuredObjective.of(OBJECTIVES[objective], metrics, np.load(path) if path.exists() else None)
