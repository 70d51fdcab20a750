"""Final training of a sweep: the best config trained again, for longer and with more workers.

`champion.choose_champion` runs it before the export if --final-epochs was given.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from diffusion.metrics import BEST_UPDATE, FINAL_PREFIX, OBJECTIVE, metrics_of_best, with_prefix
from diffusion.training.checkpoints import TrainedModel, best_model, read_checkpoint
from workflows.data.load import LoadedData
from workflows.ray_runtime.session import start_ray, stop_ray
from workflows.storage.storage import Storage
from workflows.training.checkpoint_store import CheckpointStore
from workflows.training.events import Evaluated, EventHandler, Failed
from workflows.training.worker import TrainingJob
from workflows.training.worker_group import MAX_RESTARTS, WorkerGroupError, plan_workers, run_worker_group

_CHECKPOINTS_TO_KEEP = 2


@dataclass(frozen=True)
class FinalTraining:
    """Settings of the final training.

    Attributes:
        num_epochs: passes over the training data.
        num_workers: number of workers that share each batch.
        folder: storage for checkpoints; a resumed sweep continues from those it finds there.
        log: receives metrics and the number of updates at which they were computed.
        notify: receives progress messages of one line.
        verbose: whether to show Ray's logs.
    """

    num_epochs: float
    num_workers: int
    folder: Storage
    log: Callable[[dict[str, float], int], None]
    notify: Callable[[str], None]
    verbose: bool

    def run(self, model: TrainedModel, data: LoadedData, provenance: Mapping[str, Any]) -> TrainedModel:
        """Train the config of `model` from newly initialised weights, and return the best ones.

        Raises:
            WorkerGroupError: workers died too often, or the training diverged.
        """
        longer = {"training.num_epochs": self.num_epochs}
        config = model.config.with_values(longer).resolve_epochs(len(data.dataset.train))
        num_updates = config.training.num_updates
        self.notify(f"training the champion's config for {num_updates} updates ({self.num_workers} workers)")

        store = CheckpointStore(self.folder, _CHECKPOINTS_TO_KEEP)
        start_ray(self.verbose)
        try:
            resources = plan_workers(self.num_workers, "--final-workers")
            job = TrainingJob(config, ray.put(data), resources.threads, dict(provenance), store)
            handler = _FinalTrainingHandler(self, num_updates)
            run_worker_group(job, resources, handler.on_event, max_failures=MAX_RESTARTS)
        finally:
            stop_ray()
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = store.load_newest(Path(scratch) / "checkpoint", self.notify)
            assert checkpoint is not None, "a finished training has a checkpoint"
            model, state, _ = read_checkpoint(checkpoint)
            best = best_model(model, state)
            history = {entry["update"]: entry["metrics"] for entry in state.history}
            metrics = metrics_of_best(history)
            return replace(best, provenance={"update": metrics[BEST_UPDATE], "metrics": metrics})


class _FinalTrainingHandler(EventHandler):
    """Logs the evaluations of a final training."""

    def __init__(self, training: FinalTraining, num_updates: int) -> None:
        self._training, self._num_updates = training, num_updates

    def evaluated(self, event: Evaluated) -> None:
        """Log the metrics and print the objective."""
        metrics, updates = event.metrics, event.updates
        self._training.log(with_prefix(metrics, "", FINAL_PREFIX), updates)
        self._training.notify(f"  update {updates}/{self._num_updates}: objective {metrics[OBJECTIVE]:.4f}")

    def failed(self, event: Failed) -> None:
        """End the workers."""
        raise WorkerGroupError(event.reason)
