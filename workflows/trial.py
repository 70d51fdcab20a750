"""One trial of a sweep: inside Tune's own process, or as a group of workers that this process runs."""

import math
import queue
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.errors import InputError
from diffusion.training import Diverged, Progress, Training
from workflows.group import GroupFailed, Layout, run_group
from workflows.mailbox import Event
from workflows.places import mark_of
from workflows.records import OUT_OF_MEMORY
from workflows.snapshot import write_snapshot
from workflows.worker import Job

_SECONDS_TO_END = 150.0


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
    """Train with `values` (dotted names) in this process and report to Tune after every evaluation.

    A report holds `objective`, `updates`, `status` ("running", "pruned", "diverged" or "out of memory", on
    a GPU that it shares), `reason`
    and `metrics`; with it travels a folder with the model, a picture of its samples and the
    objective example by example.
    """
    config, reason = _config(values, context)
    if reason:
        tune.report(_result(math.inf, 0, "pruned", reason))
    else:
        _train_here(config, context)


class WorkersTrial(tune.Trainable):
    """The same with several workers, which this process drives and, when Tune stops it, ends.

    Tune's other kind of trial, a function, is killed where it stands when it is stopped: the workers'
    place would never be freed, and the next trial would wait for it for ever.
    """

    def setup(self, values: dict[str, Any], context: TrialContext) -> None:
        """Start the workers."""
        self._results: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
        self._files: dict[str, bytes] = {}
        self._stop = threading.Event()
        arguments = (*_config(values, context), context)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """The next evaluation's report."""
        result = self._results.get()
        if isinstance(result, Exception):
            raise result
        self._files = result.pop("files")
        return result

    def save_checkpoint(self, folder: str) -> None:
        """Write what belongs to the last report."""
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    def load_checkpoint(self, folder: Any) -> None:
        """Trials are not gone on with."""

    def cleanup(self) -> None:
        """End the workers, and wait until their place is free."""
        self._stop.set()
        self._thread.join(_SECONDS_TO_END)

    def _run(self, config: Config, reason: str, context: TrialContext) -> None:
        done = 0

        def on_event(event: Event) -> None:
            nonlocal done
            match event["kind"]:
                case "evaluated":
                    done, metrics = event["updates"], event["metrics"]
                    result = _result(metrics["objective"], done, "running", metrics=metrics)
                    finished = done == config.training.num_updates
                    self._results.put(result | {"files": event["files"], "done": finished})
                case "diverged":
                    last = _result(math.inf, done, "diverged", event["reason"])
                    self._results.put(last | {"files": {}, "done": True})
                case "refused" | "failed":
                    raise GroupFailed(event["reason"])

        try:
            if reason:
                pruned = _result(math.inf, 0, "pruned", reason)
                self._results.put(pruned | {"files": {}, "done": True})
                return
            assert isinstance(context.dataset, ray.ObjectRef)
            job = Job(config, context.dataset, context.layout.threads, context.provenance)
            run_group(job, context.layout, on_event, stop=self._stop.is_set, mark=mark_of(self.trial_id))
        except Exception as error:
            self._results.put(error)


def _config(values: dict[str, Any], context: TrialContext) -> tuple[Config, str]:
    """The trial's config, and why it cannot run, if so."""
    try:
        config = context.config.with_values(values)
    except InputError as error:  # values that do not go together
        return context.config, str(error)
    return config, config.why_it_cannot_run() or ""


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
    except torch.OutOfMemoryError:
        if context.layout.gpus_per_worker == 1.0:
            raise
        torch.cuda.empty_cache()  # which the other trials on this GPU wait for
        tune.report(_result(math.inf, 0, OUT_OF_MEMORY))


def _report_snapshot(updates: int, metrics: dict[str, float], folder: str) -> None:
    tune.report(
        _result(metrics["objective"], updates, "running", metrics=metrics),
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
