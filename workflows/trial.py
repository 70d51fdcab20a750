"""One trial of a sweep, inside Tune's own process."""

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune

from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.generation import generate
from diffusion.plots import PICTURED, draw_samples
from diffusion.training import Diverged, Progress, train


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share; it travels through Ray's object store once.

    Attributes:
        config: the config that a trial's own values are put into.
        dataset: loaded, split and normalised.
        threads: processor threads of one trial.
        provenance: kept with every model.
    """

    config: Config
    dataset: Dataset
    threads: int
    provenance: dict[str, Any]


def run_trial(values: dict[str, Any], context: TrialContext) -> None:
    """Train with `values` (dotted names) and report to Tune after every evaluation.

    A report holds `objective`, `updates`, `status` ("running", "pruned" or "diverged"), `reason`
    and `metrics`; with it travels a folder with the model, a picture of its samples and the
    objective example by example.
    """
    # The process served other trials before: nothing of theirs may stay.
    torch.set_num_threads(context.threads)
    config = context.config.with_values(values)
    done = 0

    def report(progress: Progress) -> None:
        nonlocal done
        done = progress.updates
        with tempfile.TemporaryDirectory() as folder:
            _save(progress, context, Path(folder))
            tune.report(
                _result(progress.metrics["val/elbo_window"], done, "running", metrics=progress.metrics),
                checkpoint=tune.Checkpoint.from_directory(folder),
            )

    if reason := config.schedule.why_it_cannot_run():
        tune.report(_result(math.inf, 0, "pruned", reason))
        return
    try:
        train(config, context.dataset.to(_device()), report)
    except Diverged as error:
        tune.report(_result(math.inf, done, "diverged", str(error)))


def _save(progress: Progress, context: TrialContext, folder: Path) -> None:
    model = progress.model
    provenance = {**context.provenance, "metrics": progress.metrics}
    dataclasses.replace(model, provenance=provenance).save(folder)
    np.save(folder / "elbo_per_example.npy", progress.elbo.per_example)
    count, shape = PICTURED[model.data.kind], model.data.shape
    samples = generate(model.network, model.table, shape, count, seed=0, device=_device())
    pixels = model.data.denormalise(samples.cpu().numpy())
    draw_samples(pixels, model.data.range, title=f"{progress.updates} updates").save(folder / "samples.png")


def _device() -> str:
    """Ray shows a trial only the GPUs that it was given."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _result(
    objective: float, updates: int, status: str, reason: str = "", metrics: dict[str, float] | None = None
) -> dict[str, Any]:
    return {
        "objective": objective,
        "updates": updates,
        "status": status,
        "reason": reason,
        "metrics": metrics or {},
    }
