"""What an evaluation leaves in a folder: the model, a picture of its samples, the bound by example."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.generation import condition_in_turn, generate
from diffusion.plots import draw_samples, num_pictured
from diffusion.training import Progress

FILES = ("config.json", "model.safetensors", "samples.png", "elbo_per_example.npy")


def write_snapshot(progress: Progress, provenance: Mapping[str, Any], folder: Path) -> None:
    """Write `FILES` of an evaluated model into an existing folder."""
    model = progress.model
    provenance = {**provenance, "metrics": progress.metrics}
    dataclasses.replace(model, provenance=provenance).save(folder)
    np.save(folder / "elbo_per_example.npy", progress.elbo.per_example)
    data, shape = model.data, model.data.shape
    count = num_pictured(data.kind, data.num_classes)
    device = next(model.network.parameters()).device
    condition = condition_in_turn(count, data.num_classes, model.config.sampler.guidance_scale)
    samples = generate(model.network, model.table, shape, count, seed=0, device=device, condition=condition)
    pixels = data.denormalise(samples.cpu().numpy())
    picture = draw_samples(
        pixels, data.range, title=f"{progress.updates} updates", num_classes=data.num_classes
    )
    picture.save(folder / "samples.png")
