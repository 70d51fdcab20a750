"""One trial of a sweep: inside Tune's own process, or as a group of workers that this process runs."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.training import Diverged, Progress, Training
from workflows.group import GroupFailed, Layout, run_group
from workflows.mailbox import Event
from workflows.snapshot import write_snapshot
from workflows.worker import Job


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share; it travels through Ray's object store once.

    Attributes:
        config: the config that a trial's own values are put into.
        dataset: loaded, split and normalised; for workers, a reference to it.
        layout: what a trial asks Ray for; with one worker it trains in Tune's process.
        provenance: kept with every model.
    """

    config: Config
    dataset: "Dataset | ray.ObjectRef[Dataset]"
    layout: Layout
    provenance: dict[str, Any]


def run_trial(values: dict[str, Any], context: TrialContext) -> None:
    """Train with `values` (dotted names) and report to Tune after every evaluation.

    A report holds `objective`, `updates`, `status` ("running", "pruned" or "diverged"), `reason`
    and `metrics`; with it travels a folder with the model, a picture of its samples and the
    objective example by example.
    """
    config = context.config.with_values(values)
    if reason := config.schedule.why_it_cannot_run():
        tune.report(_result(math.inf, 0, "pruned", reason))
    elif context.layout.num_workers > 1:
        _train_with_workers(config, context)
    else:
        _train_here(config, context)


def _train_here(config: Config, context: TrialContext) -> None:
    # The process served other trials before: nothing of theirs may stay.
    torch.set_num_threads(context.layout.threads)
    done = 0

    def report(progress: Progress) -> None:
        nonlocal done
        done = progress.updates
        with tempfile.TemporaryDirectory() as folder:
            write_snapshot(progress, context.provenance, Path(folder))
            _report_snapshot(progress.updates, progress.metrics, folder)

    # Ray shows a trial only the GPUs that it was given.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert isinstance(context.dataset, Dataset)
    try:
        Training(config, context.dataset.to(device), report).run()
    except Diverged as error:
        tune.report(_result(math.inf, done, "diverged", str(error)))


def _train_with_workers(config: Config, context: TrialContext) -> None:
    done = 0

    def on_event(event: Event) -> None:
        nonlocal done
        match event["kind"]:
            case "evaluated":
                done = event["updates"]
                with tempfile.TemporaryDirectory() as folder:
                    for name, content in event["files"].items():
                        (Path(folder) / name).write_bytes(content)
                    _report_snapshot(done, event["metrics"], folder)
            case "diverged":
                tune.report(_result(math.inf, done, "diverged", event["reason"]))
            case "refused" | "failed":
                raise GroupFailed(event["reason"])

    assert isinstance(context.dataset, ray.ObjectRef)
    run_group(
        Job(config, context.dataset, context.layout.threads, context.provenance), context.layout, on_event
    )


def _report_snapshot(updates: int, metrics: dict[str, float], folder: str) -> None:
    tune.report(
        _result(metrics["val/elbo_window"], updates, "running", metrics=metrics),
        checkpoint=tune.Checkpoint.from_directory(folder),
    )


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
