"""One trial of a sweep: trains one config and reports to Ray Tune after every evaluation.

`tuner` has Tune call `run_trial`, which trains inside Tune's own process, or with several workers per trial
a `WorkersTrial`, whose process drives a group of workers. Both report the same result, and a checkpoint
folder that `tuner.SweepCallback` copies into the trial's records.
"""

import json
import math
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
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
from diffusion.training.checkpoints import TrainedModel, TrainingState, read_checkpoint
from diffusion.training.loop import EvaluationResult, Request, Training, TrainingDiverged, TrainingStopped
from workflows.data.load import LoadedData
from workflows.ray_runtime.placement_groups import memory_tag
from workflows.ray_runtime.preemption import PreemptionNotice
from workflows.status import OUT_OF_MEMORY, TrialStatus
from workflows.storage.storage import Storage, retry
from workflows.training.checkpoint_store import CheckpointStore, CheckpointWriteError
from workflows.training.evaluation_files import untrained_picture, write_evaluation
from workflows.training.events import Diverged, Evaluated, EventHandler, Failed
from workflows.training.patient_writer import PatientWriter
from workflows.training.worker import MAX_ATTEMPTS, PREEMPTED, Preempted, TrainingJob, save_checkpoint
from workflows.training.worker_group import (
    MAX_RESTARTS,
    WorkerGroupError,
    WorkerResources,
    one_line,
    run_worker_group,
)

_CLEANUP_TIMEOUT_SECONDS = 150.0
_STARTS = "starts.json"


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share; sent through Ray's object store once.

    Attributes:
        config: the sweep's config, which each trial's own values override.
        data: the data, loaded, split and normalised; with several workers, a reference to it.
        resources: resources of a trial; with one worker it trains in Tune's process.
        provenance: origin of the models, saved with each of them.
        checkpoints: storage in which running trials keep checkpoints, so that one whose node has died goes on
            from its last one on another; None on a single machine, with which everything would die.
        storage_retry_seconds: how long a trial tries to write what the storage does not take.
    """

    config: Config
    data: "LoadedData | ray.ObjectRef[LoadedData]"
    resources: WorkerResources
    provenance: dict[str, Any]
    checkpoints: Storage | None = None
    storage_retry_seconds: float = 3600.0

    def store(self, tune_id: str) -> CheckpointStore | None:
        """Store of the checkpoints of the trial that Tune knows by this ID."""
        folder = self.checkpoints and self.checkpoints.child(f"{tune_id}/checkpoints")
        return CheckpointStore(folder, keep=1) if folder else None


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
        return
    progress = _Progress(context, tune.get_context().get_trial_id() if context.checkpoints else "")
    try:
        _train_in_process(config, context, progress)
    except (Preempted, OSError):
        raise
    except Exception as error:
        if isinstance(error, CheckpointWriteError) and error.__cause__ is not None:
            raise error.__cause__ from error
        if context.checkpoints is None:
            raise
        # Tune runs a trial that raises again, which is worth the time only if its node or storage failed.
        reason = f"{type(error).__name__}: {one_line(error)}"
        tune.report(_result(math.inf, progress.updates, "failed", reason))
    progress.delete()


class WorkersTrial(tune.Trainable):
    """A trial with several workers, which this process starts, drives and ends.

    It is a class, since Tune kills a function trainable to stop it: the resources of its workers would never
    be freed, and the next trial would wait for them forever. Reports are those of `run_trial`.
    """

    def setup(self, values: dict[str, Any], context: TrialContext) -> None:
        """Start the workers."""
        self._results: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
        self._files: dict[str, bytes] = {}
        self._stop, self._context = threading.Event(), context
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
        """Do nothing: the workers go on from their own checkpoints."""

    def cleanup(self) -> None:
        """End the workers, and wait until their resources are free."""
        self._stop.set()
        self._thread.join(_CLEANUP_TIMEOUT_SECONDS)
        _Progress(self._context, self.trial_id).delete()

    def _run(self, config: Config, infeasible: str, context: TrialContext) -> None:
        try:
            if infeasible:
                pruned = _result(math.inf, 0, "pruned", infeasible)
                self._results.put(pruned | {"files": {}, "done": True})
                return
            assert isinstance(context.data, ray.ObjectRef)
            store = context.store(self.trial_id)
            job = TrainingJob(
                config,
                context.data,
                context.resources.threads,
                context.provenance,
                store,
                storage_retry_seconds=context.storage_retry_seconds,
            )
            run_worker_group(
                job,
                context.resources,
                _TrialHandler(config.training.num_updates, self._results.put).on_event,
                stop=self._stop.is_set,
                max_failures=MAX_RESTARTS if store else 0,
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


class _Progress:
    """How far a trial that trains in Tune's process is, kept in its checkpoints if it has any.

    Args:
        context: what all trials share.
        tune_id: ID by which Tune knows the trial, the same when it runs again.

    Attributes:
        updates: number of updates at the last evaluation.
    """

    def __init__(self, context: TrialContext, tune_id: str) -> None:
        self._context, self._tune_id = context, tune_id
        self._folder = context.checkpoints.child(tune_id) if context.checkpoints else None
        self._store = context.store(tune_id)
        self._writer = PatientWriter(self._store, context.storage_retry_seconds, lambda line: None)
        self._seconds = 60.0 * context.config.training.checkpoint_minutes
        self._attempted_at = time.monotonic()
        self._preemption = PreemptionNotice()
        self.updates = 0

    def load(self) -> tuple[TrainedModel, TrainingState] | None:
        """Newest checkpoint, or None if there is none.

        Raises:
            OSError: the storage does not answer.
            WorkerGroupError: the trial has begun from it too often.
        """
        if self._store is None:
            return None
        return retry(self._load, self._context.storage_retry_seconds)

    def _load(self) -> tuple[TrainedModel, TrainingState] | None:
        assert self._store is not None, "it has checkpoints"
        with tempfile.TemporaryDirectory() as scratch:
            try:
                folder = self._store.load_newest(Path(scratch), lambda line: None)
            except InputError as error:
                raise error.__cause__ or error from None
            loaded = read_checkpoint(folder)[:2] if folder else None
        update = loaded[1].update if loaded else 0
        if self._count_start(update) > MAX_ATTEMPTS:
            raise WorkerGroupError(f"its process died {MAX_ATTEMPTS} times after update {update}")
        if loaded:
            self.updates = max((entry["update"] for entry in loaded[1].history), default=0)
        return loaded

    def save(self, model: TrainedModel, state: TrainingState) -> None:
        """Write a checkpoint."""
        save_checkpoint(self._writer, model, state, workers=1)
        self._attempted_at = time.monotonic()

    def request(self) -> Request:
        """What `Training` is to do now."""
        if self._store is None:
            return Request.CONTINUE
        if self._preemption.received():
            return Request.STOP
        due = time.monotonic() - self._attempted_at > self._seconds
        return Request.CHECKPOINT if due else Request.CONTINUE

    def finish(self) -> None:
        """Write the last checkpoint if it has been missed, within seconds."""
        self._writer.finish(lambda: True)

    def delete(self) -> None:
        """Delete the checkpoints, which nothing will go on from."""
        if self._context.checkpoints is not None:
            with suppress(OSError):  # the sweep deletes those of all trials when it ends
                self._context.checkpoints.delete(self._tune_id)

    def _count_start(self, update: int) -> int:
        """How many times in a row the trial has started from this number of updates."""
        assert self._folder is not None, "it has checkpoints"
        earlier = json.loads(self._folder.read_text(_STARTS) or "[]")
        starts = [each for each in earlier if each == update] + [update]
        self._folder.write_text(_STARTS, json.dumps(starts))
        return len(starts)


def _train_in_process(config: Config, context: TrialContext, progress: _Progress) -> None:
    # Tune reuses the process, so an earlier trial may have changed this setting.
    torch.set_num_threads(context.resources.threads)
    untrained = b""

    def report(evaluation: EvaluationResult) -> None:
        with tempfile.TemporaryDirectory() as folder:
            first = untrained if progress.updates == 0 else b""
            write_evaluation(evaluation, context.provenance, Path(folder), first)
            progress.updates = evaluation.updates
            retry(
                lambda: _report_evaluation(evaluation.updates, evaluation.metrics, folder),
                context.storage_retry_seconds,
            )

    device = default_device()  # Ray lets a trial see only the GPUs that it was assigned
    assert isinstance(context.data, LoadedData)
    data = context.data.to(device)
    try:
        resume = progress.load()
        training = Training(
            config,
            data.dataset,
            report,
            features=data.features,
            resume=resume,
            save=progress.save if context.checkpoints else None,
            request=progress.request,
        )
        if resume is None:
            untrained = untrained_picture(training.model, training.low_resolution)
        training.run()
    except TrainingStopped:
        progress.finish()
        raise Preempted(PREEMPTED) from None
    except TrainingDiverged as error:
        tune.report(_result(math.inf, progress.updates, "diverged", str(error)))
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
        # As pairs: of each number in a dictionary Tune would keep a history, half a megabyte for a trial.
        "metrics": list((metrics or {}).items()),
    }
