"""A cluster on Google Cloud."""

from collections.abc import Iterator, Mapping
from typing import Any

from workflows.cluster.cost import Prices
from workflows.cluster.kinds import ClusterKind


def gcp_problems(prepared: Mapping[str, Any], config: Mapping[str, Any], prices: Prices) -> Iterator[str]:
    """Yield one line for each problem: what it is, why, and the remedy."""
    for name, node in prepared["available_node_types"].items():
        if "machineType" not in node["node_config"]:
            where = f"available_node_types.{name}.node_config"
            yield f"{where}.machineType is missing: give a machine such as n1-standard-8"


GCP = ClusterKind(
    example="gcp.yaml",
    provider_keys=("region", "availability_zone", "project_id", "cache_stopped_nodes", "use_internal_ips"),
    problems=gcp_problems,
    needed_keys=("available_node_types", "head_node_type", "max_workers"),
    needed_provider_keys={"project_id": "the id of your project"},
)
