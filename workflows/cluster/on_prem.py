"""Find problems in a cluster's YAML for machines of one's own."""

from collections.abc import Iterator, Mapping
from typing import Any

from workflows.cluster.config_file import commands
from workflows.cluster.cost import Prices
from workflows.cluster.kinds import ClusterKind

_LOCAL_AUTOSCALER = "RAY_enable_autoscaler_v2=0"


def on_prem_problems(
    _prepared: Mapping[str, Any], config: Mapping[str, Any], _prices: Prices
) -> Iterator[str]:
    """Yield one line for each problem of the YAML, `config`."""
    provider = config["provider"]
    workers = [str(each) for each in provider["worker_ips"]]
    if duplicates := {each for each in workers if workers.count(each) > 1}:
        yield f"provider.worker_ips lists {', '.join(sorted(duplicates))} twice: list each machine once"
    if str(provider["head_ip"]) in workers:
        yield f"provider.worker_ips includes the head {provider['head_ip']}: remove it there"
    for name in ("max_workers", "min_workers"):
        if config.get(name, len(workers)) > len(workers):
            yield f"{name} {config[name]} is more than the {len(workers)} machines in worker_ips: lower it"
    if not dict(config.get("auth") or {}).get("ssh_user"):
        yield "auth.ssh_user is missing: give the name of the user on the machines"
    if not any(_LOCAL_AUTOSCALER in each for each in commands(dict(config), "head_start_ray_commands")):
        yield (
            "head_start_ray_commands: with the newer autoscaler of Ray 2.60 some machines do not join: put "
            f"export {_LOCAL_AUTOSCALER}; before ray start"
        )


ON_PREM = ClusterKind(
    example="cluster/on-prem.yaml",
    provider_keys=("head_ip", "worker_ips", "external_head_ip", "use_internal_ips"),
    problems=on_prem_problems,
    starts_machines=False,
    needed_provider_keys=dict.fromkeys(("head_ip", "worker_ips"), "the machines' addresses"),
)
