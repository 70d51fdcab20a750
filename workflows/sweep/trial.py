"""One trial of a sweep: trains one config and reports to Ray Tune after every evaluation.

`tuner` has Tune call `run_trial`, which trains inside Tune's own process, or with several workers per trial
a `WorkersTrial`, whose process drives a group of workers. Both report the same result, and a checkpoint
folder that `tuner.SweepCallback` copies into the trial's records.
"""

import math
import queue
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from diffusion.config import Config
from diffusion.devices import default_device
from diffusion.errors import InputError
from diffusion.metrics import BEST_OBJECTIVE, OBJECTIVE
from diffusion.training.loop import EvaluationResult, Training, TrainingDiverged
from workflows.data.load import LoadedData
from workflows.ray_runtime.placement_groups import memory_tag
from workflows.status import OUT_OF_MEMORY, TrialStatus
from workflows.training.evaluation_files import untrained_picture, write_evaluation
from workflows.training.events import Diverged, Evaluated, EventHandler, Failed
from workflows.training.worker import TrainingJob
from workflows.training.worker_group import WorkerGroupError, WorkerResources, run_worker_group

_CLEANUP_TIMEOUT_SECONDS = 150.0


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share; sent through Ray's object store once.

    Attributes:
        config: the sweep's config, which each trial's own values override.
        data: the data, loaded, split and normalised; with several workers, a reference to it.
        resources: resources of a trial; with one worker it trains in Tune's process.
        provenance: origin of the models, saved with each of them.
    """

    config: Config
    data: "LoadedData | ray.ObjectRef[LoadedData]"
    resources: WorkerResources
    provenance: dict[str, Any]


def run_trial(values: dict[str, Any], context: TrialContext) -> None:
    """Train a trial in this process and report to Tune after every evaluation.

    A report holds `objective`, `updates`, `status`, `reason` and `metrics`. The objective is that of the
    best evaluation so far, whose weights are the trial's model. The status is "running", "pruned",
    "diverged", or "out of memory" on a shared GPU. The checkpoint that comes with status "running" is a
    folder with the model as it was evaluated, a picture of its samples and the objective of each example.

    Args:
        values: the trial's own values by dotted name.
        context: what all trials share.
    """
    config, infeasible = _trial_config(values, context)
    if infeasible:
        tune.report(_result(math.inf, 0, "pruned", infeasible))
    else:
        _train_in_process(config, context)


class WorkersTrial(tune.Trainable):
    """A trial with several workers, which this process starts, drives and ends.

    It is a class, since Tune kills a function trainable to stop it: the resources of its workers would never
    be freed, and the next trial would wait for them forever. Reports are those of `run_trial`.
    """

    def setup(self, values: dict[str, Any], context: TrialContext) -> None:
        """Start the workers."""
        self._results: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
        self._files: dict[str, bytes] = {}
        self._stop = threading.Event()
        arguments = (*_trial_config(values, context), context)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation and return its report."""
        result = self._results.get()
        if isinstance(result, Exception):
            raise result
        self._files = result.pop("files")
        return result

    def save_checkpoint(self, folder: str) -> None:
        """Write the files of the last report."""
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    def load_checkpoint(self, folder: Any) -> None:
        """Do nothing: an unfinished trial starts from scratch."""

    def cleanup(self) -> None:
        """End the workers, and wait until their resources are free."""
        self._stop.set()
        self._thread.join(_CLEANUP_TIMEOUT_SECONDS)

    def _run(self, config: Config, infeasible: str, context: TrialContext) -> None:
        try:
            if infeasible:
                pruned = _result(math.inf, 0, "pruned", infeasible)
                self._results.put(pruned | {"files": {}, "done": True})
                return
            assert isinstance(context.data, ray.ObjectRef)
            job = TrainingJob(config, context.data, context.resources.threads, context.provenance)
            run_worker_group(
                job,
                context.resources,
                _TrialHandler(config.training.num_updates, self._results.put).on_event,
                stop=self._stop.is_set,
                extra_resources=memory_tag(self.trial_id),
            )
        except Exception as error:
            self._results.put(error)


class _TrialHandler(EventHandler):
    """Turns the events of a trial with several workers into reports for Tune.

    Args:
        num_updates: number of updates of a complete training.
        report: receives the reports, with the keys `files` and `done` beside those of `run_trial`.
    """

    def __init__(self, num_updates: int, report: Callable[[dict[str, Any]], None]) -> None:
        self._num_updates, self._report = num_updates, report
        self._updates = 0

    def evaluated(self, event: Evaluated) -> None:
        """Report the metrics and the files."""
        self._updates = event.updates
        result = _result(event.metrics[BEST_OBJECTIVE], event.updates, "running", metrics=event.metrics)
        self._report(result | {"files": event.files, "done": event.updates == self._num_updates})

    def diverged(self, event: Diverged) -> None:
        """Report that the trial cannot continue."""
        result = _result(math.inf, self._updates, "diverged", event.reason)
        self._report(result | {"files": {}, "done": True})

    def failed(self, event: Failed) -> None:
        """End the workers and fail the trial."""
        raise WorkerGroupError(event.reason)


def _trial_config(values: dict[str, Any], context: TrialContext) -> tuple[Config, str]:
    """The trial's config, and the reason if it cannot be trained, else ""."""
    try:
        config = context.config.with_values(values)
    except InputError as error:  # values that contradict each other
        return context.config, str(error)
    return config, config.infeasible_reason() or ""


def _train_in_process(config: Config, context: TrialContext) -> None:
    # Tune reuses the process, so an earlier trial may have changed this setting.
    torch.set_num_threads(context.resources.threads)
    updates, untrained = 0, b""

    def report(evaluation: EvaluationResult) -> None:
        nonlocal updates
        with tempfile.TemporaryDirectory() as folder:
            first = untrained if updates == 0 else b""
            write_evaluation(evaluation, context.provenance, Path(folder), first)
            updates = evaluation.updates
            _report_evaluation(evaluation.updates, evaluation.metrics, folder)

    device = default_device()  # Ray lets a trial see only the GPUs that it was assigned
    assert isinstance(context.data, LoadedData)
    data = context.data.to(device)
    try:
        training = Training(config, data.dataset, report, features=data.features)
        untrained = untrained_picture(training.model)
        training.run()
    except TrainingDiverged as error:
        tune.report(_result(math.inf, updates, "diverged", str(error)))
    except torch.OutOfMemoryError:
        if context.resources.gpus_per_worker == 1.0:
            raise
        torch.cuda.empty_cache()  # other trials on this GPU need the memory
        tune.report(_result(math.inf, 0, OUT_OF_MEMORY))


def _report_evaluation(updates: int, metrics: dict[str, float], folder: str) -> None:
    tune.report(
        _result(metrics[BEST_OBJECTIVE], updates, "running", metrics=metrics),
        checkpoint=tune.Checkpoint.from_directory(folder),
    )


def _result(
    objective: float,
    updates: int,
    status: TrialStatus,
    reason: str = "",
    metrics: dict[str, float] | None = None,
) -> dict[str, Any]:
    return {
        OBJECTIVE: objective,
        "updates": updates,
        "status": status,
        "reason": reason,
        "metrics": metrics or {},
    }
