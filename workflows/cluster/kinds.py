"""The kinds of clusters: what the checks know of a provider of Ray's cluster launcher, and their registry."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusion.registry import Registry
from workflows.cluster.cost import Prices


@dataclass(frozen=True, kw_only=True)
class ClusterKind:
    """A provider of Ray's cluster launcher.

    Attributes:
        example: name of a YAML file for it, for messages.
        provider_keys: keys that Ray knows under `provider`, besides `type`.
        problems: function (content of the YAML with the defaults that Ray fills in, content as it is, table
            of the known machine types) -> one line for each problem that other kinds do not have.
        needed_keys: keys of the YAML that have to be there because Ray's defaults do not work for this
            project.
        needed_provider_keys: keys under `provider` that have to be there, and what to give for each.
        hourly_cost: function (content with Ray's defaults, table of the known machine types) -> lines about
            what the cluster costs; None if it costs nothing by the hour.
        starts_machines: whether Ray starts machines of the `available_node_types` as they are needed. A run
            then counts on those that do not run yet.
    """

    example: str
    provider_keys: Collection[str]
    problems: Callable[[Mapping[str, Any], Mapping[str, Any], Prices], Iterable[str]]
    needed_keys: tuple[str, ...] = ()
    needed_provider_keys: Mapping[str, str] = field(default_factory=dict)
    hourly_cost: Callable[[Mapping[str, Any], Prices], Iterable[str]] | None = None
    starts_machines: bool = True


CLUSTER_KINDS: Registry[ClusterKind] = Registry(
    "cluster kind",
    "ray_ddpm.cluster_kinds",
    {"aws": "workflows.cluster.aws:AWS", "local": "workflows.cluster.on_prem:ON_PREM"},
)
"""Cluster kinds by `provider.type` of the YAML."""
