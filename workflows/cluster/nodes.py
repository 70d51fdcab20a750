"""Machines that a cluster has or can grow to."""

import ray

from workflows.cluster.kinds import CLUSTER_KINDS
from workflows.environment import cluster_config

_HEAD_RESOURCE = "node:__internal_head__"  # Ray adds one such resource to each head node


def possible_nodes() -> list[dict[str, float]]:
    """Resources of each machine: of those that run and, on a cloud, of those that may still be started.

    A cloud cluster has no worker machines while it is idle. Which ones it can start is in the file that
    RAY_DDPM_CLUSTER_CONFIG names, which `ray up` leaves on the head node. A kind of cluster that is not
    registered here is taken for a cloud.
    """
    alive: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = cluster_config()
    if config is None:
        return alive
    kind = config["provider"]["type"]
    if kind in CLUSTER_KINDS and not CLUSTER_KINDS[kind].starts_machines:
        return alive
    workers = [
        node["resources"]
        for name, node in config["available_node_types"].items()
        if name != config["head_node_type"]
        for _ in range(node["max_workers"])
    ]
    heads = [node for node in alive if _HEAD_RESOURCE in node]
    return [*heads, *workers[: config["max_workers"]]]
