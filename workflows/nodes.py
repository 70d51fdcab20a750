"""The machines that a cluster has, or may grow to."""

import json
import os
from pathlib import Path
from typing import Any

import ray

_HEAD = "node:__internal_head__"  # a resource that Ray gives every head
CONFIG_VARIABLE = "RAY_DDPM_CLUSTER_CONFIG"


def possible_nodes() -> list[dict[str, float]]:
    """What each machine has, resources by name: those that run and, on a cloud, those it may still start.

    A cluster on a cloud has no workers while nothing waits: what may come is said by the file that
    RAY_DDPM_CLUSTER_CONFIG names, as `ray up` left it on the head.
    """
    alive: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = _cluster_config()
    if config is None:
        return alive
    workers = [
        node["resources"]
        for name, node in config["available_node_types"].items()
        if name != config["head_node_type"]
        for _ in range(node["max_workers"])
    ]
    heads = [node for node in alive if _HEAD in node]
    return [*heads, *workers[: config["max_workers"]]]


def _cluster_config() -> dict[str, Any] | None:
    """What `ray up` wrote, None where this is no cluster on a cloud."""
    path = os.environ.get(CONFIG_VARIABLE)
    if not path or "RAY_ADDRESS" not in os.environ:
        return None
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text())
        return config if config["provider"]["type"] != "local" else None
    except (OSError, ValueError, KeyError):
        return None
