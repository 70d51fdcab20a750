"""What an evaluation leaves in a folder: the model, a picture of its samples, the bound by example."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.generation import generate
from diffusion.plots import PICTURED, draw_samples
from diffusion.training import Progress

FILES = ("config.json", "model.safetensors", "samples.png", "elbo_per_example.npy")


def write_snapshot(progress: Progress, provenance: Mapping[str, Any], folder: Path) -> None:
    """Write `FILES` of an evaluated model into an existing folder."""
    model = progress.model
    provenance = {**provenance, "metrics": progress.metrics}
    dataclasses.replace(model, provenance=provenance).save(folder)
    np.save(folder / "elbo_per_example.npy", progress.elbo.per_example)
    count, shape = PICTURED[model.data.kind], model.data.shape
    device = next(model.network.parameters()).device
    samples = generate(model.network, model.table, shape, count, seed=0, device=device)
    pixels = model.data.denormalise(samples.cpu().numpy())
    draw_samples(pixels, model.data.range, title=f"{progress.updates} updates").save(folder / "samples.png")
