"""The function that each worker process of a training runs, on whichever machine Ray Train has started it.

A worker gets the data from Ray's object store, loads the newest checkpoint and runs
`diffusion.training.loop.Training`, while a thread polls the coordinator for signals. Rank 0 writes
checkpoints and sends events (`workflows.training.events`), which the driver receives through the coordinator.
"""

import os
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import torch as ray_torch

from diffusion.config import Config
from diffusion.devices import default_device
from diffusion.errors import InputError
from diffusion.metrics import OBJECTIVE
from diffusion.training.checkpoints import TrainedModel, TrainingState, read_checkpoint, write_checkpoint
from diffusion.training.distributed import DistributedContext
from diffusion.training.loop import EvaluationResult, Request, Training, TrainingDiverged, TrainingStopped
from workflows.data.load import LoadedData
from workflows.ray_runtime import preemption
from workflows.storage.storage import Storage, is_permanent
from workflows.training.checkpoint_store import CheckpointStore, CheckpointWriteError
from workflows.training.coordinator import Signal
from workflows.training.evaluation_files import PICTURE, UNTRAINED, untrained_picture, write_evaluation
from workflows.training.events import (
    CheckpointDamaged,
    Diverged,
    Evaluated,
    Event,
    Failed,
    Finished,
    InputRejected,
    Started,
    Stopped,
    StorageFailed,
)
from workflows.training.patient_writer import SECONDS_BETWEEN_RETRIES, PatientWriter

POLL_SECONDS = 0.5
_SECONDS_TO_REACH_COORDINATOR = 60.0
_SECONDS_TO_ANSWER_POLL = 20.0
MAX_ATTEMPTS = 3
PREEMPTED = "a machine will be taken away (SIGTERM, or a notice to Ray)"


class Preempted(RuntimeError):
    """A worker's machine will be taken away; Ray Train restarts the workers, elsewhere if necessary."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything about one training that is sent to its workers.

    Attributes:
        config: config to train with.
        data: reference to the `LoadedData` in Ray's object store.
        threads: number of CPU threads of each worker.
        provenance: origin of the model, saved with every evaluated model.
        store: store for checkpoints, or None for a training that cannot be resumed.
        initial_weights: reference to another model's weights to start from, or None.
        pictures: folder that receives the pictures of samples, or None.
        storage_retry_seconds: how long the training goes on while checkpoints cannot be written.
    """

    config: Config
    data: "ray.ObjectRef[LoadedData]"
    threads: int
    provenance: Mapping[str, Any]
    store: CheckpointStore | None = None
    initial_weights: "ray.ObjectRef[Any] | None" = None
    pictures: Storage | None = None
    storage_retry_seconds: float = 3600.0


def picture_name(updates: int) -> str:
    """Name of the file with the samples drawn after `updates` updates."""
    return f"{updates:09d}.png"


def run_worker(arguments: dict[str, Any]) -> None:
    """Train as one of a job's workers.

    Args:
        arguments: `job`, a `TrainingJob`, and `coordinator`, an actor handle.

    Raises:
        Preempted: a worker's machine will be taken away; the last checkpoint is at most seconds old.
        InputError, CheckpointWriteError: a restart cannot fix this; the error was sent to the coordinator.
    """
    job, coordinator = arguments["job"], arguments["coordinator"]
    torch.set_num_threads(job.threads)
    device = ray_torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # Ray does not know Apple's GPUs
        num_workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        device = default_device(use_cuda=False, num_workers=num_workers)
    distributed = DistributedContext.from_process_group(device)
    send_event = EventSender(coordinator, distributed.is_main)
    try:
        train(job, coordinator, send_event, distributed)
    except TrainingDiverged as error:
        send_event(Diverged(str(error)))
    except (InputError, CheckpointWriteError) as error:
        # The error may have occurred on this worker only, so it is reported whatever the rank. The other
        # workers wait for this one until the group is torn down.
        kind = InputRejected if isinstance(error, InputError) else Failed
        ray.get(coordinator.add_event.remote(kind(str(error))))
        ray.get(coordinator.request_signal.remote("abort"))
        raise
    except TrainingStopped:
        if ray.get(coordinator.poll.remote(None)) not in ("stop", "abort"):
            raise Preempted(PREEMPTED) from None


class EventSender:
    """Sends events to the coordinator on rank 0, and does nothing on the other workers.

    Args:
        coordinator: actor handle of the coordinator.
        is_main: whether this worker is rank 0.
    """

    def __init__(self, coordinator: Any, is_main: bool) -> None:
        self._coordinator, self._is_main = coordinator, is_main

    def __call__(self, event: Event) -> None:
        """Send an event."""
        if self._is_main:
            ray.get(self._coordinator.add_event.remote(event), timeout=_SECONDS_TO_REACH_COORDINATOR)


def train(
    job: TrainingJob, coordinator: Any, send_event: EventSender, distributed: DistributedContext
) -> None:
    """Train from the newest checkpoint, if there is one, to the end or until a signal to stop.

    Raises:
        TrainingDiverged, TrainingStopped: see `Training.run`.
        InputError: the data or the checkpoints cannot be used.
        CheckpointWriteError: a checkpoint or a picture could not be written.
    """
    if ray.get(coordinator.poll.remote(None)) == "abort":
        return
    data = ray.get(job.data).to(distributed.device)
    dataset = data.dataset
    resume = _load_newest_checkpoint(job, dataset.spec.fingerprint, coordinator, send_event)
    updates = resume[1].update if resume else 0
    if distributed.all_reduce_max(updates) != updates:
        raise RuntimeError("the workers do not see the same checkpoints: the storage is not shared")
    history = resume[1].history if resume else []
    attempt = ray.get(coordinator.record_start.remote(updates)) if distributed.is_main else 0
    attempt = distributed.all_reduce_max(attempt)
    send_event(Started(updates, attempt, history, str(distributed.device), distributed.world_size))
    if attempt > MAX_ATTEMPTS:
        send_event(Failed(f"the workers died {MAX_ATTEMPTS} times after update {updates}"))
        return

    writer = PatientWriter(job.store, job.storage_retry_seconds, lambda line: send_event(StorageFailed(line)))
    untrained = b""  # of a training that starts from scratch, until its first evaluation

    def report(result: EvaluationResult) -> None:
        nonlocal untrained
        files = _evaluation_files(result, job.provenance, untrained)
        untrained = b""
        if job.pictures is not None:
            # Before the checkpoint: if the driver is killed now, it finds the pictures when it resumes.
            for name, updates in ((UNTRAINED, 0), (PICTURE, result.updates)):
                if name in files:
                    _write_picture(writer, job.pictures, updates, files[name])
        send_event(Evaluated(result.updates, result.metrics, files))

    def save(model: TrainedModel, state: TrainingState) -> None:
        save_checkpoint(writer, model, state, distributed.world_size)
        client.checkpoint_attempted()

    weights = ray.get(job.initial_weights) if job.initial_weights is not None and not resume else None
    minutes = job.config.training.checkpoint_minutes if job.store else float("inf")
    with CoordinatorClient(coordinator, distributed.is_main, 60.0 * minutes) as client:
        training = Training(
            job.config,
            dataset,
            report,
            features=data.features,
            resume=resume,
            initial_weights=weights,
            save=save,
            request=client.request,
        )
        client.follow(training)
        if distributed.is_main and resume is None:
            untrained = untrained_picture(training.model, training.low_resolution)
        try:
            training.run()
        except TrainingStopped:
            writer.finish(lambda: True)
            send_event(Stopped(training.updates))
            raise
        writer.finish(lambda: client.request() == Request.STOP)
    send_event(Finished())


def save_checkpoint(writer: PatientWriter, model: TrainedModel, state: TrainingState, workers: int) -> None:
    """Save the state of a training, with the facts by which a resumed one finds and checks it.

    Raises:
        CheckpointWriteError: see `PatientWriter.save`.
    """
    last = state.history[-1] if state.history else None
    objective = last["metrics"][OBJECTIVE] if last and last["update"] == state.update else None
    facts = {
        "update": state.update,
        OBJECTIVE: objective,
        "data_fingerprint": model.data.fingerprint,
        "workers": workers,
    }
    writer.save(lambda folder: write_checkpoint(folder, model, state, facts), state.update, objective)


def _load_newest_checkpoint(
    job: TrainingJob, fingerprint: str, coordinator: Any, send_event: EventSender
) -> tuple[TrainedModel, TrainingState] | None:
    """Newest undamaged checkpoint, or None if there is none; every worker reads it.

    Raises:
        InputError: it was trained on other data, or the storage does not answer for too long.
    """
    if job.store is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        deadline = time.monotonic() + job.storage_retry_seconds
        while True:
            try:
                folder = job.store.load_newest(
                    Path(scratch), lambda line: send_event(CheckpointDamaged(line))
                )
                break
            except InputError as error:  # workers may be restarted while the storage is silent
                silent = isinstance(error.__cause__, OSError) and not is_permanent(error.__cause__)
                asked_to_end = ray.get(coordinator.poll.remote(None)) in ("stop", "abort")
                if not silent or asked_to_end or time.monotonic() > deadline:
                    raise
                send_event(StorageFailed(f"{error}; waiting for it"))
                time.sleep(min(SECONDS_BETWEEN_RETRIES, max(deadline - time.monotonic(), 0.0)))
        if folder is None:
            return None
        model, state, facts = read_checkpoint(folder)
    if facts["data_fingerprint"] != fingerprint:
        raise InputError(f"{job.store} holds checkpoints of other data: give another --name")
    return model, state


def _evaluation_files(
    result: EvaluationResult, provenance: Mapping[str, Any], untrained: bytes
) -> dict[str, bytes]:
    """Files of an evaluation, by name."""
    with tempfile.TemporaryDirectory() as folder:
        write_evaluation(result, provenance, Path(folder), untrained)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _write_picture(writer: PatientWriter, pictures: Storage, updates: int, content: bytes) -> None:
    writer.write(
        lambda: pictures.write_bytes(picture_name(updates), content),
        f"the picture with the checkpoint of update {updates} in {pictures}",
    )


class CoordinatorClient:
    """Polls the coordinator in a thread, and tells `Training` what this worker requests. A context manager.

    If the coordinator has died, so has the driver, and this process exits immediately: it must not train in
    parallel with a run that resumes from the same checkpoints.

    Args:
        coordinator: actor handle of the coordinator.
        is_main: whether this worker is rank 0, which reports progress and requests periodic checkpoints.
        seconds_between_checkpoints: time after which a checkpoint is requested.
    """

    def __init__(self, coordinator: Any, is_main: bool, seconds_between_checkpoints: float) -> None:
        self._coordinator, self._is_main = coordinator, is_main
        self._interval = seconds_between_checkpoints
        self._attempted_at = time.monotonic()
        self._signal: Signal = "continue"
        self._training: Training | None = None
        self._preemption = preemption.PreemptionNotice()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="coordinator", daemon=True)

    def __enter__(self) -> "CoordinatorClient":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._closed.set()
        self._thread.join(_SECONDS_TO_REACH_COORDINATOR)

    def follow(self, training: Training) -> None:
        """Report the progress of this training to the coordinator from now on."""
        self._training = training

    def checkpoint_attempted(self) -> None:
        """Restart the time until the next periodic checkpoint, or the next attempt."""
        self._attempted_at = time.monotonic()

    def request(self) -> Request:
        """What this worker requests of all workers at this moment."""
        if self._signal != "continue" or self._preemption.received():
            return Request.STOP
        due = self._is_main and time.monotonic() - self._attempted_at > self._interval
        return Request.CHECKPOINT if due else Request.CONTINUE

    def _poll(self) -> None:
        restart_requested = False
        while not self._closed.wait(POLL_SECONDS):
            updates = self._training.updates if self._is_main and self._training else None
            try:
                if self._preemption.received() and not restart_requested:
                    # The others may be in the middle of an evaluation, in which they see only this signal.
                    restart = self._coordinator.request_signal.remote("restart")
                    ray.get(restart, timeout=_SECONDS_TO_ANSWER_POLL)
                    restart_requested = True
                poll = self._coordinator.poll.remote(updates)
                self._signal = ray.get(poll, timeout=_SECONDS_TO_ANSWER_POLL)
            except ray.exceptions.GetTimeoutError:
                continue  # the machine is busy; a dead coordinator raises another error
            except ray.exceptions.RayError:
                if not self._closed.is_set():
                    os._exit(1)
