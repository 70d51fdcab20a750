"""What is wrong with a cluster's YAML that Ray would find out late, or never."""

import difflib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion.errors import InputError
from workflows.cluster_aws import aws_problems
from workflows.cluster_cost import Prices
from workflows.cluster_file import commands, prepared_by_ray, settings_left_open, storage_of

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
    """One line for each thing to mend: what it is, why, the remedy.

    Args:
        config: tree of the YAML, of provider aws or local.
        prices: the types of machines that are known.
    """
    if open_ := settings_left_open(config):
        return open_
    kind = config["provider"]["type"]
    if missing := list(_missing(config, kind)):
        return missing
    try:
        prepared = prepared_by_ray(config)
    except InputError as error:
        return [str(error)]
    own = aws_problems(prepared, config, prices) if kind == "aws" else _on_prem_problems(config)
    return [*_provider_problems(config["provider"], kind), *_common_problems(config), *own]


def unknown_key(key: str, allowed: Iterable[str], where: str) -> str:
    """The line for a key that is none, with the one that was meant where there is one like it."""
    like = difflib.get_close_matches(key, list(allowed), 1)
    remedy = f"did you mean {like[0]}?" if like else "leave it out"
    return f"{where}.{key} is not known, and Ray would ignore it: {remedy}"


def _missing(config: Mapping[str, Any], kind: str) -> Iterator[str]:
    """What Ray's own preparation would stumble over."""
    needed = ("available_node_types", "head_node_type", "max_workers") if kind == "aws" else ()
    for name in ("cluster_name", *needed, "setup_commands", "head_start_ray_commands"):
        if not config.get(name):
            yield f"{name} is missing, and Ray's default is not what this project needs: copy the shipped one"
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
            "setup_commands do not install constraints.txt, so the machines would run other versions than "
            "this one: add bash ~/ray-ddpm/cluster/install.sh"
        )
    storage = storage_of(dict(config))
    if storage is None:
        yield "setup_commands set no RAY_DDPM_STORAGE, a place that all machines see: copy metadata.storage"
    elif "://" not in storage and not storage.startswith("/"):
        yield f"RAY_DDPM_STORAGE={storage}: give s3://bucket/prefix, or an absolute path that all see"


def _file_problems(config: Mapping[str, Any]) -> Iterator[str]:
    mounts = dict(config.get("file_mounts") or {})
    for remote, local in mounts.items():
        path = Path(os.path.expanduser(str(local)))
        if path.exists():
            continue
        remedy = "mend the path, or start in the project's folder"
        if str(local).endswith("auth_token"):
            remedy = "make it: ray get-auth-token --generate"
        yield f"file_mounts {remote}: {local} does not exist here: {remedy}"
    if _TOKEN not in mounts:
        yield f"file_mounts lack {_TOKEN}, without which no worker can join: add {_TOKEN}: {_TOKEN}"
    elif (token := Path(os.path.expanduser(str(mounts[_TOKEN])))).exists():
        if token.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            yield f"{mounts[_TOKEN]} can be read by others, and opens the cluster: chmod 600 {mounts[_TOKEN]}"
    for name in ("ssh_private_key", "ssh_public_key"):
        key = dict(config.get("auth") or {}).get(name)
        if key is not None and not Path(os.path.expanduser(str(key))).is_file():
            yield f"auth.{name} {key} does not exist here: give the path of a key"


def _start_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [each for each in commands(dict(config), name) if "ray start" in each]
        if not starts:
            yield f"{name} have no `ray start`: copy the shipped ones"
        for start in starts:
            if "RAY_AUTH_MODE=token" not in start:
                yield (
                    f"{name}: `ray start` without RAY_AUTH_MODE=token lets in whoever reaches its ports: put "
                    "export RAY_AUTH_MODE=token; before it"
                )
            if name.startswith("head") and "--dashboard-host=127.0.0.1" not in start:
                yield (
                    f"{name}: the dashboard is not bound to the machine itself: add "
                    "--dashboard-host=127.0.0.1, and forward its port"
                )
            if name.startswith("head") and "--autoscaling-config=" not in start:
                yield (
                    f"{name}: without --autoscaling-config no worker is ever started: add "
                    "--autoscaling-config=~/ray_bootstrap_config.yaml"
                )


def _on_prem_problems(config: Mapping[str, Any]) -> Iterator[str]:
    provider = config["provider"]
    workers = [str(each) for each in provider["worker_ips"]]
    if twice := {each for each in workers if workers.count(each) > 1}:
        yield f"provider.worker_ips names {', '.join(sorted(twice))} twice: name each machine once"
    if str(provider["head_ip"]) in workers:
        yield f"provider.worker_ips names the head {provider['head_ip']} as well: leave it out there"
    for name in ("max_workers", "min_workers"):
        if config.get(name, len(workers)) > len(workers):
            yield f"{name} {config[name]} is more than the {len(workers)} machines in worker_ips: lower it"
    if not dict(config.get("auth") or {}).get("ssh_user"):
        yield "auth.ssh_user is missing: give the user's name on the machines"
    if not any(_LOCAL_AUTOSCALER in each for each in commands(dict(config), "head_start_ray_commands")):
        yield (
            "head_start_ray_commands: with Ray 2.60's newer autoscaler not all machines join: put "
            f"export {_LOCAL_AUTOSCALER}; before ray start"
        )
