"""Find problems in a cluster's YAML that Ray would report late or never."""

import difflib
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from diffusion.errors import InputError
from diffusion.files import path_kind, user_path
from workflows.cluster.aws import aws_problems
from workflows.cluster.config_file import (
    commands,
    placeholder_problems,
    prepare_with_ray,
    type_problems,
)
from workflows.cluster.cost import Prices
from workflows.environment import configured_storage

_PROVIDER_KEYS = {
    "aws": {
        "type",
        "region",
        "availability_zone",
        "cache_stopped_nodes",
        "use_internal_ips",
        "key_pair",
        "security_group",
        "aws_credentials",
        "cloudwatch",
    },
    "local": {"type", "head_ip", "worker_ips", "external_head_ip", "use_internal_ips"},
}
_TOKEN = "~/.ray/auth_token"
_LOCAL_AUTOSCALER = "RAY_enable_autoscaler_v2=0"


def find_problems(config: dict[str, Any], prices: Prices) -> list[str]:
    """Return one line for each problem: what it is, why, and the remedy.

    Args:
        config: content of the YAML, with provider aws or local.
        prices: table of the known machine types.
    """
    if problems := type_problems(config) or placeholder_problems(config):
        return problems
    kind = config["provider"]["type"]
    if missing := list(_missing_keys(config, kind)):
        return missing
    try:
        prepared = prepare_with_ray(config)
    except InputError as error:
        return [str(error)]
    specific = aws_problems(prepared, config, prices) if kind == "aws" else _on_prem_problems(config)
    return [*_provider_problems(config["provider"], kind), *_common_problems(config), *specific]


def unknown_key(key: str, allowed: Iterable[str], where: str) -> str:
    """Return the line for an unknown key, which suggests the most similar allowed key if there is one."""
    similar = difflib.get_close_matches(key, list(allowed), 1)
    remedy = f"did you mean {similar[0]}?" if similar else "leave it out"
    return f"{where}.{key} is not known, and Ray would ignore it: {remedy}"


def _missing_keys(config: Mapping[str, Any], kind: str) -> Iterator[str]:
    """Yield problems that would make `prepare_with_ray` fail with an obscure error."""
    needed = ("available_node_types", "head_node_type", "max_workers") if kind == "aws" else ()
    for name in ("cluster_name", *needed, "setup_commands", "head_start_ray_commands"):
        if not config.get(name):
            yield f"{name} is missing, and Ray's default does not work for this project: copy the shipped one"
    if kind == "local":
        for name in ("head_ip", "worker_ips"):
            if not config["provider"].get(name):
                yield f"provider.{name} is missing: give the machines' addresses"


def _provider_problems(provider: Mapping[str, Any], kind: str) -> Iterator[str]:
    for key in provider:
        if key not in _PROVIDER_KEYS[kind]:
            yield unknown_key(key, _PROVIDER_KEYS[kind], "provider")


def _common_problems(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _file_problems(config)
    yield from _start_problems(config)
    setup = " ".join(commands(dict(config), "setup_commands"))
    if "cluster/install.sh" not in setup and "constraints.txt" not in setup:
        yield (
            "setup_commands do not install constraints.txt, so the machines would run other package "
            "versions than this one: add bash ~/ray-ddpm/cluster/install.sh"
        )
    storage = configured_storage(config)
    if storage is None:
        yield "metadata.storage is missing: give s3://bucket/prefix, or an absolute path that all share"
    elif not re.match(r"/|\w+://", storage):
        yield f"metadata.storage {storage}: give s3://bucket/prefix, or an absolute path that all share"


def _file_problems(config: Mapping[str, Any]) -> Iterator[str]:
    mounts = dict(config.get("file_mounts") or {})
    for remote, local in mounts.items():
        if path_kind(user_path(str(local))) is not None:
            continue
        remedy = "fix the path, or run this in the folder of a checkout or of `workflows.cluster init`"
        if str(local).endswith("auth_token"):
            remedy = "create it: ray get-auth-token --generate"
        yield f"file_mounts {remote}: {local} does not exist here: {remedy}"
    if _TOKEN not in mounts:
        yield f"file_mounts: without {_TOKEN} no worker can join the cluster: add {_TOKEN}: {_TOKEN}"
    elif path_kind(token := user_path(str(mounts[_TOKEN]))) is not None:
        if token.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            yield (
                f"{mounts[_TOKEN]} gives access to the cluster and is readable by other users: "
                f"chmod 600 {mounts[_TOKEN]}"
            )
    for name in ("ssh_private_key", "ssh_public_key"):
        key = dict(config.get("auth") or {}).get(name)
        if key is not None and path_kind(user_path(str(key))) != "file":
            yield f"auth.{name} {key} does not exist here: give the path of an existing key"


def _start_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [each for each in commands(dict(config), name) if "ray start" in each]
        if not starts:
            yield f"{name} do not contain `ray start`: copy the shipped ones"
        for start in starts:
            if "RAY_AUTH_MODE=token" not in start:
                yield (
                    f"{name}: `ray start` without RAY_AUTH_MODE=token gives access to anyone who "
                    "reaches its ports: put export RAY_AUTH_MODE=token; before it"
                )
            if name.startswith("head") and "--dashboard-host=127.0.0.1" not in start:
                yield (
                    f"{name}: the dashboard can be reached from other machines: add "
                    "--dashboard-host=127.0.0.1, and forward its port"
                )
            if name.startswith("head") and "--autoscaling-config=" not in start:
                yield (
                    f"{name}: without --autoscaling-config Ray never starts a worker: add "
                    "--autoscaling-config=~/ray_bootstrap_config.yaml"
                )


def _on_prem_problems(config: Mapping[str, Any]) -> Iterator[str]:
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
