"""The champion's config trained anew, longer and on more machines, before it is handed over."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from diffusion.checkpoints import TrainedModel, read_checkpoint
from diffusion.data import Dataset
from workflows.checkpoint_store import CheckpointStore
from workflows.group import GroupFailed, plan_layout, run_group
from workflows.mailbox import Event
from workflows.ray_session import start_ray
from workflows.storage import Storage
from workflows.worker import Job

_MOST_RESTARTS = 20
_CHECKPOINTS = 2


@dataclass(frozen=True)
class FinalTraining:
    """How a sweep's champion is trained anew.

    Attributes:
        num_epochs: passes over the training data.
        num_workers: processes that share each batch.
        folder: for checkpoints; a sweep that goes on finds them there.
        log: takes metrics and the updates after which they were taken.
        say: told what is being done.
        verbose: show Ray's logs.
    """

    num_epochs: float
    num_workers: int
    folder: Storage
    log: Callable[[dict[str, float], int], None]
    say: Callable[[str], None]
    verbose: bool

    def run(self, model: TrainedModel, dataset: Dataset, provenance: Mapping[str, Any]) -> TrainedModel:
        """The config of `model` trained anew, from fresh weights.

        Raises:
            GroupFailed: the workers died too often, or training diverged.
        """
        longer = {"training.num_epochs": self.num_epochs}
        config = model.config.with_values(longer).for_examples(len(dataset.train))
        updates = config.training.num_updates
        self.say(f"training the champion's config for {updates} updates ({self.num_workers} workers)")

        def on_event(event: Event) -> None:
            match event["kind"]:
                case "evaluated":
                    metrics = event["metrics"]
                    self.log({f"final/{name}": value for name, value in metrics.items()}, event["updates"])
                    self.say(f"  update {event['updates']}/{updates}: objective {metrics['objective']:.4f}")
                case "diverged" | "failed" | "refused":
                    raise GroupFailed(event["reason"])

        store = CheckpointStore(self.folder, _CHECKPOINTS)
        start_ray(self.verbose)
        try:
            layout = plan_layout(self.num_workers, "--final-workers")
            job = Job(config, ray.put(dataset), layout.threads, dict(provenance), store)
            run_group(job, layout, on_event, max_failures=_MOST_RESTARTS)
        finally:
            ray.shutdown()
        with tempfile.TemporaryDirectory() as scratch:
            found = store.load_newest(Path(scratch) / "checkpoint", self.say)
            assert found is not None, "a finished training has a checkpoint"
            return read_checkpoint(found)[0]
