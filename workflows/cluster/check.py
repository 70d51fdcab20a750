"""Find problems in a cluster's YAML that Ray would report late or never."""

import difflib
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from diffusion.errors import InputError
from diffusion.files import path_kind, user_path
from workflows.cluster.config_file import (
    commands,
    placeholder_problems,
    prepare_with_ray,
    type_problems,
)
from workflows.cluster.cost import Prices
from workflows.cluster.kinds import CLUSTER_KINDS, ClusterKind
from workflows.environment import configured_database, configured_storage
from workflows.redaction import redact
from workflows.tracking.database_server import is_database_server

_TOKEN = "~/.ray/auth_token"


def find_problems(config: dict[str, Any], prices: Prices) -> list[str]:
    """Return one line for each problem: what it is, why, and the remedy.

    Args:
        config: content of the YAML, whose provider is in `CLUSTER_KINDS`.
        prices: table of the known machine types.
    """
    if problems := type_problems(config) or placeholder_problems(config):
        return problems
    kind = CLUSTER_KINDS[config["provider"]["type"]]
    if missing := list(_missing_keys(config, kind)):
        return missing
    try:
        prepared = prepare_with_ray(config)
    except InputError as error:
        return [str(error)]
    return [
        *_provider_problems(config["provider"], kind),
        *_common_problems(config),
        *kind.problems(prepared, config, prices),
    ]


def unknown_key(key: str, allowed: Iterable[str], where: str) -> str:
    """Return the line for an unknown key, which suggests the most similar allowed key if there is one."""
    similar = difflib.get_close_matches(key, list(allowed), 1)
    remedy = f"did you mean {similar[0]}?" if similar else "leave it out"
    return f"{where}.{key} is not known, and Ray would ignore it: {remedy}"


def _missing_keys(config: Mapping[str, Any], kind: ClusterKind) -> Iterator[str]:
    """Yield problems that would make `prepare_with_ray` fail with an obscure error."""
    for name in ("cluster_name", *kind.needed_keys, "setup_commands", "head_start_ray_commands"):
        if not config.get(name):
            yield f"{name} is missing, and Ray's default does not work for this project: copy the shipped one"
    for name, remedy in kind.needed_provider_keys.items():
        if not config["provider"].get(name):
            yield f"provider.{name} is missing: give {remedy}"


def _provider_problems(provider: Mapping[str, Any], kind: ClusterKind) -> Iterator[str]:
    for key in provider:
        if key not in ("type", *kind.provider_keys):
            yield unknown_key(key, ("type", *kind.provider_keys), "provider")


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
    database = configured_database(config)
    if database is not None and not is_database_server(database):
        yield (
            f"metadata.mlflow_database {redact(database)}: give an address such as "
            "postgresql://USER:PASSWORD@HOST/DATABASE, or leave it empty"
        )


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
