"""What each worker of a training runs, on whichever machine Ray Train put it.

The leading worker posts these events to the mailbox, each a dictionary with `kind`:
    started: `updates`, `attempt`, `history` (of the checkpoint it goes on from), `device`, `num_workers`.
    evaluated: `updates`, `metrics`, and `files`: name -> bytes as `workflows.snapshot` writes them.
    stopped: `updates`, after a checkpoint was written because someone asked.
    diverged, failed: `reason`, one line.
    refused: `reason`, one line: what the user gave cannot be used.
    damaged: `reason`: a checkpoint that was passed over.
    finished: nothing more.
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

from diffusion.checkpoints import TrainedModel, TrainingState, read_checkpoint, write_checkpoint
from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.ranks import Ranks
from diffusion.training import Diverged, Progress, Request, Stopped, Training
from workflows import preemption
from workflows.checkpoint_store import CheckpointNotWritten, CheckpointStore
from workflows.mailbox import Wish
from workflows.snapshot import write_snapshot
from workflows.storage import Storage

_SECONDS_BETWEEN_EXCHANGES = 0.5
_SECONDS_TO_REACH_MAILBOX = 60.0
_MOST_ATTEMPTS = 3


class Preempted(RuntimeError):
    """A worker's machine is about to go; Ray Train starts the workers anew elsewhere."""


@dataclass(frozen=True)
class Job:
    """One training, as it travels to its workers.

    Attributes:
        config: what to train.
        dataset: reference to the loaded data in Ray's object store.
        threads: processor threads of each worker.
        provenance: kept with every model.
        store: where checkpoints go, or None for a training that is not to be resumed.
        pictures: where samples are drawn at each evaluation, one file each, or None.
        initial_weights: reference to another model's weights to start from, or None.
    """

    config: Config
    dataset: "ray.ObjectRef[Any]"
    threads: int
    provenance: Mapping[str, Any]
    store: CheckpointStore | None = None
    initial_weights: "ray.ObjectRef[Any] | None" = None
    pictures: Storage | None = None


def picture_name(updates: int) -> str:
    """Of the file with the samples drawn after so many updates."""
    return f"{updates:09d}.png"


def run_worker(arguments: dict[str, Any]) -> None:
    """Train as one of the job's workers: `arguments` holds `job` and `mailbox`.

    Raises:
        Preempted: a worker was told to end; the last checkpoint is at most seconds old.
        InputError, CheckpointNotWritten: what no new start mends; the mailbox knows.
    """
    job, mailbox = arguments["job"], arguments["mailbox"]
    torch.set_num_threads(job.threads)
    device = ray_torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks.of(device)
    post = _Post(mailbox, ranks.leads)
    try:
        _train(job, mailbox, post, ranks)
    except Diverged as error:
        post("diverged", reason=str(error))
    except (InputError, CheckpointNotWritten) as error:
        # On this worker alone, perhaps: the others wait for it until the group is torn down.
        kind = "refused" if isinstance(error, InputError) else "failed"
        ray.get(mailbox.post.remote({"kind": kind, "reason": str(error)}))
        ray.get(mailbox.want.remote("give up"))
        raise
    except Stopped:
        if ray.get(mailbox.exchange.remote(None)) not in ("stop", "give up"):
            raise Preempted("a worker was told to end (SIGTERM)") from None


class _Post:
    """Posts events on the leading worker, and nothing on the others."""

    def __init__(self, mailbox: Any, leads: bool) -> None:
        self._mailbox, self._leads = mailbox, leads

    def __call__(self, kind: str, **rest: Any) -> None:
        if self._leads:
            event = {"kind": kind, **rest}
            ray.get(self._mailbox.post.remote(event), timeout=_SECONDS_TO_REACH_MAILBOX)


def _train(job: Job, mailbox: Any, post: _Post, ranks: Ranks) -> None:
    if ray.get(mailbox.exchange.remote(None)) == "give up":
        return
    dataset = ray.get(job.dataset).to(ranks.device)
    resume = _resume_point(job, dataset.spec.fingerprint, post)
    updates = resume[1].update if resume else 0
    if ranks.highest(updates) != updates:
        raise RuntimeError("the workers do not see the same checkpoints: the storage is not shared")
    history = resume[1].history if resume else []
    attempt = ray.get(mailbox.begin.remote(updates)) if ranks.leads else 0
    attempt = ranks.highest(attempt)
    post(
        "started",
        updates=updates,
        attempt=attempt,
        history=history,
        device=str(ranks.device),
        num_workers=ranks.world_size,
    )
    if attempt > _MOST_ATTEMPTS:
        post("failed", reason=f"the workers died {_MOST_ATTEMPTS} times after update {updates}")
        return

    def report(progress: Progress) -> None:
        files = _snapshot_files(progress, job.provenance)
        if job.pictures is not None:
            # Before the checkpoint: a driver that is killed now finds it when the training goes on.
            _keep_picture(job.pictures, progress.updates, files["samples.png"])
        post("evaluated", updates=progress.updates, metrics=progress.metrics, files=files)

    def save(model: TrainedModel, state: TrainingState) -> None:
        if job.store is None:
            return
        last = state.history[-1] if state.history else None
        objective = None
        if last and last["update"] == state.update:
            objective = last["metrics"]["objective"]
        facts = {
            "update": state.update,
            "objective": objective,
            "data_fingerprint": dataset.spec.fingerprint,
            "workers": ranks.world_size,
        }
        job.store.save(lambda folder: write_checkpoint(folder, model, state, facts), state.update, objective)
        watch.saved()

    weights = ray.get(job.initial_weights) if job.initial_weights is not None and not resume else None
    minutes = job.config.training.checkpoint_minutes if job.store else float("inf")
    with _Watch(mailbox, ranks.leads, 60.0 * minutes) as watch:
        training = Training(
            job.config,
            dataset,
            report,
            resume=resume,
            initial_weights=weights,
            save=save,
            request=watch.request,
        )
        watch.follow(training)
        try:
            training.run()
        except Stopped:
            post("stopped", updates=training.updates)
            raise
    post("finished")


def _resume_point(job: Job, fingerprint: str, post: _Post) -> tuple[TrainedModel, TrainingState] | None:
    """The newest checkpoint that is whole; every worker reads it.

    Raises:
        InputError: it was trained on other data.
    """
    if job.store is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        found = job.store.load_newest(Path(folder), lambda line: post("damaged", reason=line))
        if found is None:
            return None
        model, state, facts = read_checkpoint(found)
    if facts["data_fingerprint"] != fingerprint:
        raise InputError(f"{job.store} holds checkpoints of other data: give another --name")
    return model, state


def _snapshot_files(progress: Progress, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_snapshot(progress, provenance, Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _keep_picture(pictures: Storage, updates: int, content: bytes) -> None:
    try:
        pictures.write_bytes(picture_name(updates), content)
    except OSError as error:
        raise CheckpointNotWritten(
            f"the picture with the checkpoint of update {updates} was not written to {pictures} "
            f"({error.strerror or error}): free or mend that place, or give another; the checkpoints before "
            "it stand"
        ) from error


class _Watch:
    """Hears from the mailbox what is wanted, and keeps the time of checkpoints; a context manager.

    Where the mailbox has died, whoever ran this worker is gone, and the process ends at once: it must
    not train beside the run that takes its place.
    """

    def __init__(self, mailbox: Any, leads: bool, seconds_between_checkpoints: float) -> None:
        self._mailbox, self._leads = mailbox, leads
        self._interval = seconds_between_checkpoints
        self._saved_at = time.monotonic()
        self._heard: Wish = "go on"
        self._training: Training | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="mailbox", daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join(_SECONDS_TO_REACH_MAILBOX)

    def follow(self, training: Training) -> None:
        """Tell the mailbox from now on how far this training is."""
        self._training = training

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved_at = time.monotonic()

    def request(self) -> Request:
        """What this worker wants now."""
        if self._heard != "go on" or preemption.was_terminated():
            return Request.STOP
        late = self._leads and time.monotonic() - self._saved_at > self._interval
        return Request.CHECKPOINT if late else Request.GO_ON

    def _listen(self) -> None:
        told = False
        while not self._over.wait(_SECONDS_BETWEEN_EXCHANGES):
            updates = self._training.updates if self._leads and self._training else None
            try:
                if preemption.was_terminated() and not told:
                    # The leading worker may be in the midst of an evaluation: it hears it this way.
                    ray.get(self._mailbox.want.remote("start anew"), timeout=20.0)
                    told = True
                self._heard = ray.get(self._mailbox.exchange.remote(updates), timeout=20.0)
            except ray.exceptions.GetTimeoutError:
                continue  # a busy machine; a mailbox that is gone says so
            except ray.exceptions.RayError:
                if not self._over.is_set():
                    os._exit(1)
