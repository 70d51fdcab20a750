"""Read a cluster's YAML file, and validate it as Ray does."""

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


def read_cluster_file(path: Path) -> dict[str, Any]:
    """Read a cluster's YAML, with its anchors resolved.

    Raises:
        InputError: the file cannot be read, is not YAML, or its provider is neither aws nor local.
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
        raise InputError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', error)}") from error
    provider = tree.get("provider") if isinstance(tree, dict) else None
    kind = provider.get("type") if isinstance(provider, dict) else None
    if kind not in PROVIDERS:
        choices = " or ".join(f"{name} (as in {example})" for name, example in PROVIDERS.items())
        raise InputError(f"{path}: provider.type {kind}: give {choices}")
    return tree


def placeholder_problems(config: dict[str, Any]) -> list[str]:
    """Return one line for each value under `metadata` that is still a placeholder."""
    lines = []
    for name, value in dict(config.get("metadata") or {}).items():
        for text in value if isinstance(value, list) else [value]:
            if match := _PLACEHOLDER.search(str(text)):
                lines.append(f"metadata.{name} is still {match[0]}: replace it with your own value")
    return lines


def prepare_with_ray(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in defaults and validate as `ray up` does, before it contacts any cloud.

    Raises:
        InputError: Ray would refuse the file.
    """
    from ray.autoscaler._private.util import logger, prepare_config, validate_config

    logger.setLevel(logging.ERROR)  # it logs every default that it fills in
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
            validate_config(prepared)
    except (Exception, SystemExit) as error:  # from the schema library, from Ray, or an exit after a message
        where = ".".join(str(each) for each in getattr(error, "absolute_path", ()))
        last_line = (re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue()).strip().splitlines() or [""])[-1]
        reason = last_line if isinstance(error, SystemExit) else getattr(error, "message", str(error))
        reason = textwrap.shorten(reason or repr(error), 200, placeholder=" ...")
        raise InputError(f"{where or 'the file'}: {reason} (Ray's schema)") from error
    return prepared


def commands(config: dict[str, Any], name: str) -> Iterator[str]:
    """Yield the commands of a list in the file, none if the list is missing."""
    yield from (str(command) for command in config.get(name) or [])
