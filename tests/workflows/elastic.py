"""A group of one or two workers on a cluster that a second machine joins, and leaves again if told to.

A program of its own, since it needs a Ray cluster of its own: `python elastic.py FOLDER stays|leaves`. Its
last line is JSON: the number of workers at each start, and the figures at the end.
"""

import json
import sys
from typing import Any

from workflows.environment import set_defaults

set_defaults(verbose=False)

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from diffusion.config import Config  # noqa: E402
from diffusion.data import load_dataset  # noqa: E402
from diffusion.presets import preset  # noqa: E402
from workflows import group  # noqa: E402
from workflows.checkpoint_store import CheckpointStore  # noqa: E402
from workflows.group import Layout, run_group  # noqa: E402
from workflows.storage import Storage  # noqa: E402
from workflows.worker import Job  # noqa: E402


def small_config() -> Config:
    """Some ten seconds of training, with many evaluations to go on from."""
    return preset("digits").with_values(
        {
            "training.num_updates": 8000,
            "training.num_evaluations": 16,
            "training.batch_size": 33,
            "network.hidden_size": 16,
            "metrics.num_samples": 20,
            "metrics.num_examples": 32,
            "sampler.num_steps": 4,
        }
    )


def main(folder: str, leaves: bool) -> None:
    group._SECONDS_BETWEEN_RESIZES = 1.0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, logging_level=40, log_to_driver=False)
    config = small_config()
    machine: list[Any] = []
    sizes: list[int] = []
    metrics: dict[str, float] = {}

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "started":
            sizes.append(event["num_workers"])
        if event["kind"] != "evaluated":
            return
        metrics.update(event["metrics"])
        if not machine:
            machine.append(cluster.add_node(num_cpus=1))
        elif leaves and sizes == [1, 2] and len(machine) == 1:
            machine.append(cluster.remove_node(machine[0]))

    job = Job(config, ray.put(load_dataset(config.data)), 1, {}, CheckpointStore(Storage(folder), 3))
    run_group(job, Layout(1, 1, uses_gpus=False, most_workers=2), listen, max_failures=5)
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps({"sizes": sizes, "metrics": metrics}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "leaves")
