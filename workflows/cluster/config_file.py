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
from diffusion.files import read_file
from diffusion.json_values import short_repr
from workflows.cluster.kinds import CLUSTER_KINDS

_MAX_BYTES, _MAX_VALUES = 2**18, 20_000
_WORDS: dict[Any, str] = {
    dict: "keys with values",
    list: "a list",
    str: "text",
    int: "a whole number, without quotes",
    (int, float): "a number, without quotes",
    bool: "true or false",
}
_NODE_CONFIG = {
    "InstanceType": str,
    "ImageId": str,
    "SecurityGroupIds": [str],
    "BlockDeviceMappings": [{"Ebs": {"*": object}, "*": object}],
    "*": object,
}
# Types of the values that the checks read; see `_type_problems`.
_SHAPE: dict[str, Any] = {
    "metadata": {"storage": str, "mlflow_database": str, "*": object},
    "provider": {
        "head_ip": str,
        "worker_ips": [str],
        "region": str,
        "availability_zone": str,
        "use_internal_ips": bool,
        "*": object,
    },
    "auth": {"ssh_user": str, "ssh_private_key": str, "ssh_public_key": str, "*": object},
    "file_mounts": {"*": str},
    "cluster_name": str,
    "head_node_type": str,
    "max_workers": int,
    "min_workers": int,
    "idle_timeout_minutes": (int, float),
    "available_node_types": {
        "*": {
            "node_config": _NODE_CONFIG,
            "resources": {"*": (int, float)},
            "min_workers": int,
            "max_workers": int,
            "*": object,
        }
    },
    **dict.fromkeys(
        (
            "initialization_commands",
            "setup_commands",
            "head_setup_commands",
            "worker_setup_commands",
            "head_start_ray_commands",
            "worker_start_ray_commands",
        ),
        [str],
    ),
    "*": object,
}
_PLACEHOLDER = re.compile(r"[^\s'=]*YOUR[-/][A-Z0-9/-]*")


def read_cluster_file(path: Path) -> dict[str, Any]:
    """Read a cluster's YAML, with its anchors resolved.

    Raises:
        InputError: the file cannot be read, is not YAML, is too large once its aliases are resolved, or its
            provider is not in `CLUSTER_KINDS`.
    """
    content = read_file(path, "the path of a cluster's YAML", _MAX_BYTES)
    try:
        tree = _load(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    # ValueError, OverflowError: values such as dates that do not exist; RecursionError: nested too deeply.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error)[:200]
        raise InputError(f"{path} is not valid YAML{where}: {problem}") from error
    provider = tree.get("provider") if isinstance(tree, dict) else None
    kind = provider.get("type") if isinstance(provider, dict) else None
    if not isinstance(kind, str) or kind not in CLUSTER_KINDS:
        choices = " or ".join(f"{name} (as in {each.example})" for name, each in CLUSTER_KINDS.items())
        raise InputError(f"{path}: provider.type {kind}: give {choices}")
    return tree


def type_problems(config: dict[str, Any]) -> list[str]:
    """Return one line for each value of another type than the other checks, and Ray, expect."""
    return list(_type_problems(config, _SHAPE))


def _load(content: bytes) -> Any:
    """Parse YAML whose aliases may repeat a part so often that it would fill the memory."""
    loader = yaml.SafeLoader(content)
    try:
        node = loader.get_single_node()
        _check_expanded_size(node)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _check_expanded_size(root: yaml.Node | None) -> None:
    """Check how many values a document has once every alias is replaced by what it stands for.

    Raises:
        InputError: there are too many, or a value contains itself.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_VALUES  # of a node that is found inside itself
            parts = node.value if not isinstance(node, yaml.ScalarNode) else []
            flat = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(map(size, flat))
        return sizes[id(node)]

    if root is not None and size(root) > _MAX_VALUES:
        raise InputError(
            f"it has more than {_MAX_VALUES} values once its aliases (*name) are resolved: leave "
            "repeated ones out"
        )


def _type_problems(value: object, shape: Any, where: str = "") -> Iterator[str]:
    """Yield one line for each value of another type than the checks, and Ray, expect.

    Args:
        value: a value of the file; None is as good as missing.
        shape: a type; [shape] for a list of such values; or a mapping from names to shapes, in which "*" is
            any other name.
        where: dotted path of the value, for messages.
    """
    expected = type(shape) if isinstance(shape, (dict, list)) else shape
    if value is None or expected is object:
        return
    is_bool = isinstance(value, bool) and expected is not bool
    if not isinstance(value, expected) or is_bool:
        words = "text in quotes" if expected is str else _WORDS.get(expected, "another type of value")
        yield f"{where} {short_repr(value)}: give {words}"
    elif isinstance(shape, list) and isinstance(value, list):
        for index, each in enumerate(value):
            if each is None:
                yield f"{where}.{index} is empty: give a value, or leave it out"
            yield from _type_problems(each, shape[0], f"{where}.{index}")
    elif isinstance(shape, dict) and isinstance(value, dict):
        for name, each in value.items():
            path = f"{where}.{name}" if where else str(name)
            if not isinstance(name, str):
                yield f"{path}: the name {name!r} is not text: put it in quotes"
            else:
                yield from _type_problems(each, shape.get(name, shape.get("*", object)), path)


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
