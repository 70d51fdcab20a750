"""A cluster's YAML file: read, and compared with what Ray itself allows."""

import contextlib
import copy
import io
import logging
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from diffusion.errors import InputError

PROVIDERS = {
    "aws": "ray_cluster.yaml",
    "local": "cluster/on-prem.yaml",
}
_PLACEHOLDER = re.compile(r"[^\s'=]*YOUR[-/][A-Z0-9/-]*")
_STORAGE = re.compile(r"RAY_DDPM_STORAGE=([^\s'\"]+)")


def read_cluster_file(path: Path) -> dict[str, Any]:
    """The tree of a cluster's YAML, its anchors filled in.

    Raises:
        InputError: it cannot be read, is no YAML, or its provider is neither aws nor local.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give the path of a cluster's YAML"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise InputError(f"{path} is no YAML{where}: {getattr(error, 'problem', error)}") from error
    provider = tree.get("provider") if isinstance(tree, dict) else None
    kind = provider.get("type") if isinstance(provider, dict) else None
    if kind not in PROVIDERS:
        known = " or ".join(f"{name} (as in {example})" for name, example in PROVIDERS.items())
        raise InputError(f"{path}: provider.type {kind}: give {known}")
    return tree


def settings_left_open(config: dict[str, Any]) -> list[str]:
    """One line for each value under `metadata` that still is a placeholder."""
    lines = []
    for name, value in dict(config.get("metadata") or {}).items():
        for text in value if isinstance(value, list) else [value]:
            if found := _PLACEHOLDER.search(str(text)):
                lines.append(f"metadata.{name} still says {found[0]}: put your own value there")
    return lines


def prepared_by_ray(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of the file before it asks any cloud.

    Raises:
        InputError: Ray would refuse it.
    """
    from ray.autoscaler._private.util import logger, prepare_config, validate_config

    logger.setLevel(logging.ERROR)  # it tells of each default that it fills in
    spoken = io.StringIO()
    try:
        with contextlib.redirect_stdout(spoken), contextlib.redirect_stderr(spoken):
            prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
            validate_config(prepared)
    except (Exception, SystemExit) as error:  # of the schema's library, of Ray, or an exit after a message
        where = ".".join(str(each) for each in getattr(error, "absolute_path", ()))
        last = (re.sub(r"\x1b\[[0-9;]*m", "", spoken.getvalue()).strip().splitlines() or [""])[-1]
        reason = last if isinstance(error, SystemExit) else getattr(error, "message", str(error))
        reason = textwrap.shorten(reason or repr(error), 200, placeholder=" ...")
        raise InputError(f"{where or 'the file'}: {reason} (Ray's schema)") from error
    return prepared


def storage_of(config: dict[str, Any]) -> str | None:
    """What the setup commands put into RAY_DDPM_STORAGE, None if nothing."""
    found = [_STORAGE.search(command) for command in commands(config, "setup_commands")]
    return next((match[1] for match in found if match), None)


def commands(config: dict[str, Any], name: str) -> Iterator[str]:
    """The commands of a list in the file, none where it is not there."""
    yield from (str(command) for command in config.get(name) or [])
