"""A sweep on a cluster that loses a machine while a trial trains on it.

This is a program of its own since it needs its own Ray cluster: `python dying_nodes.py FOLDER dies|drained
[FLAGS OF tune.py]`.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from workflows.environment import set_defaults

set_defaults(verbose=False)

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from workflows.tune import main as tune  # noqa: E402


def wait_for_evaluation(journal: Path) -> None:
    while not journal.exists() or "evaluated" not in journal.read_text():
        time.sleep(0.1)


def busy_node(cluster: Cluster) -> Any:
    """A machine other than the head on which a trial or one of its workers runs."""
    by_id = {node.node_id: node for node in cluster.worker_nodes}
    while True:
        for actor in ray._private.state.actors().values():
            if actor["State"] == "ALIVE" and actor["Address"]["NodeID"] in by_id:
                return by_id[actor["Address"]["NodeID"]]
        time.sleep(0.1)


def main(folder: Path, how: str, flags: list[str]) -> int:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    os.chdir(folder)

    def take_a_node_away() -> None:
        wait_for_evaluation(folder / "runs" / "spot" / "journal.jsonl")
        node = busy_node(cluster)
        if how == "drained":
            command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
            command += ["--address", cluster.address, "--node-id", node.node_id]
            command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "reclaimed"]
            command += ["--deadline-remaining-seconds", "25"]
            subprocess.run(command, check=True, capture_output=True)
            time.sleep(20)
        cluster.remove_node(node, allow_graceful=False)
        print("a node was taken away", flush=True)

    threading.Thread(target=take_a_node_away, daemon=True).start()
    try:
        return tune(["--name", "spot", "--output-dir", "runs", *flags])
    finally:
        lines = (folder / "runs" / "spot" / "journal.jsonl").read_text().splitlines()
        print("events", json.dumps([json.loads(line) for line in lines]), flush=True)
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
