"""An elastic group of one or two workers on a cluster that a second machine joins and may leave again.

This is a program of its own since it needs its own Ray cluster: `python elastic.py FOLDER stays|leaves`.
The last line that it prints is JSON: the number of workers at each start, and the metrics at the end.
"""

import json
import sys
from typing import Any

from workflows.environment import set_defaults

set_defaults(verbose=False)

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from diffusion.config import Config  # noqa: E402
from diffusion.data.dataset import load_dataset  # noqa: E402
from diffusion.presets import preset  # noqa: E402
from workflows.data.load import LoadedData  # noqa: E402
from workflows.storage.storage import Storage  # noqa: E402
from workflows.training import worker_group  # noqa: E402
from workflows.training.checkpoint_store import CheckpointStore  # noqa: E402
from workflows.training.events import Evaluated, Event, Started  # noqa: E402
from workflows.training.worker import TrainingJob  # noqa: E402
from workflows.training.worker_group import WorkerResources, run_worker_group  # noqa: E402


def small_config() -> Config:
    """At least ten seconds of training, in which a machine can join, with evaluations to resume from."""
    return preset("digits").with_values(
        {
            "training.num_updates": 20_000,
            "training.num_evaluations": 16,
            "training.batch_size": 33,
            "network.hidden_size": 16,
            "metrics.num_samples": 20,
            "metrics.num_examples": 32,
            "sampler.num_steps": 4,
        }
    )


def main(folder: str, leaves: bool) -> None:
    worker_group.SECONDS_BETWEEN_RESIZES = 1.0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, logging_level=40, log_to_driver=False)
    config = small_config()
    data = LoadedData(load_dataset(config.data))
    second_machine: Any = None
    removed = False
    sizes: list[int] = []
    metrics: dict[str, float] = {}

    def on_event(event: Event) -> None:
        nonlocal second_machine, removed
        if isinstance(event, Started):
            sizes.append(event.num_workers)
        if not isinstance(event, Evaluated):
            return
        metrics.update(event.metrics)
        if second_machine is None:
            second_machine = cluster.add_node(num_cpus=1)
        elif leaves and sizes == [1, 2] and not removed:
            cluster.remove_node(second_machine)
            removed = True

    job = TrainingJob(config, ray.put(data), 1, {}, CheckpointStore(Storage(folder), 3))
    run_worker_group(job, WorkerResources(1, 1, uses_gpus=False, max_workers=2), on_event, max_failures=5)
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps({"sizes": sizes, "metrics": metrics}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "leaves")
