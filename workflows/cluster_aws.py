"""What is wrong with a cluster's YAML for AWS, found without asking AWS."""

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from workflows.cluster_cost import Prices
from workflows.cluster_file import storage_of

_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")
_IMAGE = re.compile(r"ami-[0-9a-f]{8,17}")
_GROUP = re.compile(r"sg-[0-9a-f]{8,17}")
_SMALLEST_DISK_GB = 60  # the system, CUDA's libraries, PyTorch
_KINDS = {
    "structure": (dict, "keys with values"),
    "list": (list, "a list"),
    "string": (str, "text"),
    "integer": (int, "a whole number, without quotes"),
    "boolean": (bool, "true or false"),
}
_ASKED_FOR_BY_RAY = ("MinCount", "MaxCount")


def aws_problems(prepared: Mapping[str, Any], config: Mapping[str, Any], prices: Prices) -> Iterator[str]:
    """One line for each thing to mend.

    Args:
        prepared: the file as Ray prepares it.
        config: the file as it is.
        prices: the types of machines that are known.
    """
    provider = config["provider"]
    region = str(provider.get("region"))
    if not _REGION.fullmatch(region):
        yield f"provider.region {region}: give a region's name, such as us-west-2"
    for zone in str(provider.get("availability_zone") or region).split(","):
        if not zone.strip().startswith(region):
            yield f"provider.availability_zone {zone.strip()} is not in {region}: give {region}a or so"
    if provider.get("cache_stopped_nodes") is not False:
        yield (
            "provider.cache_stopped_nodes is not false: machines would be stopped, not ended, and their "
            "disks go on billing; set it to false"
        )
    if not prepared["idle_timeout_minutes"] > 0:
        yield f"idle_timeout_minutes {prepared['idle_timeout_minutes']}: give 1 or more"
    head, profiles = prepared["head_node_type"], []
    for name, node in prepared["available_node_types"].items():
        where = f"available_node_types.{name}"
        yield from _size_problems(where, node, prepared["max_workers"], is_head=name == head)
        yield from _machine_problems(where, node, prices)
        yield from _launch_problems(f"{where}.node_config", node["node_config"])
        profiles.append("IamInstanceProfile" in node["node_config"])
        if name == head:
            yield from _head_problems(where, node)
        elif not profiles[-1] and str(storage_of(dict(config))).startswith("s3:"):
            yield (
                f"{where}.node_config has no IamInstanceProfile, so its machines cannot reach "
                f"{storage_of(dict(config))}: give them the profile that cluster/aws-account.yaml makes"
            )
    if any(profiles) and "IamInstanceProfile" not in prepared["available_node_types"][head]["node_config"]:
        yield (
            f"available_node_types.{head}.node_config has no IamInstanceProfile: with Ray's own "
            "the head must not give the workers theirs, and none would start; give it the one of "
            "cluster/aws-account.yaml"
        )


def _size_problems(where: str, node: Mapping[str, Any], max_workers: int, *, is_head: bool) -> Iterator[str]:
    if node["max_workers"] > max_workers:
        yield f"{where}.max_workers {node['max_workers']} is more than max_workers {max_workers}: lower it"
    if node["min_workers"] > node["max_workers"]:
        yield (
            f"{where}.min_workers {node['min_workers']} is more than its max_workers {node['max_workers']}: "
            "lower it"
        )
    if is_head and node["max_workers"]:
        yield f"{where}.max_workers {node['max_workers']}: the head is one machine; leave it out"


def _machine_problems(where: str, node: Mapping[str, Any], prices: Prices) -> Iterator[str]:
    kind = node["node_config"].get("InstanceType")
    machine = prices.machines.get(str(kind))
    if machine is None:
        like = difflib.get_close_matches(str(kind), list(prices.machines), 1)
        meant = f"did you mean {like[0]}? If not, " if like else ""
        yield (
            f"{where}.node_config.InstanceType {kind} is not in {prices.path.name}: {meant}add a line for it "
            "there"
        )
        return
    for resource, has in (("CPU", machine.vcpus), ("GPU", machine.gpus)):
        says = node["resources"].get(resource, has)
        if says > has or (resource == "GPU" and says != has):
            yield (
                f"{where}.resources.{resource} {says}: a {kind} has {has}; give that number, or leave it to "
                "Ray with resources: {}"
            )


def _head_problems(where: str, node: Mapping[str, Any]) -> Iterator[str]:
    if node["resources"].get("CPU") != 0:
        yield f"{where}.resources: without CPU: 0 trials run on the head, beside the drivers; set it"
    if "InstanceMarketOptions" in node["node_config"]:
        yield (
            f"{where}.node_config.InstanceMarketOptions: were the head taken away, the whole cluster would "
            "be; leave it out"
        )


def _launch_problems(where: str, launch: Mapping[str, Any]) -> Iterator[str]:
    """What AWS would refuse when a machine is started, or do without a word."""
    given = {name: value for name, value in launch.items() if name != "SubnetIds"}  # Ray's own name
    yield from _shape_problems(where, given, _run_instances())
    if not _IMAGE.fullmatch(str(launch.get("ImageId"))):
        yield (
            f"{where}.ImageId {launch.get('ImageId')}: give an image such as ami-0123456789abcdef0; Ray's "
            "own default is too old for PyTorch"
        )
    groups = launch.get("SecurityGroupIds") or ["missing"]
    if "NetworkInterfaces" not in launch and not all(_GROUP.fullmatch(str(group)) for group in groups):
        yield (
            f"{where}.SecurityGroupIds {', '.join(map(str, groups))}: give one such as sg-0123456789abcdef0; "
            "without one Ray opens SSH to the world"
        )
    for number, disk in enumerate(launch.get("BlockDeviceMappings") or []):
        yield from _disk_problems(f"{where}.BlockDeviceMappings.{number}.Ebs", dict(disk.get("Ebs") or {}))


def _disk_problems(where: str, disk: Mapping[str, Any]) -> Iterator[str]:
    size = disk.get("VolumeSize")
    if size is None or (isinstance(size, int) and size < _SMALLEST_DISK_GB):
        yield f"{where}.VolumeSize {size}: give {_SMALLEST_DISK_GB} or more, in gigabytes"
    if disk.get("DeleteOnTermination") is not True:
        yield f"{where}.DeleteOnTermination is not true: the disk would stay, and cost, after ray down"


def _shape_problems(where: str, value: Any, shape: Any) -> Iterator[str]:
    """Compare a value with what AWS's own description of the call allows: names, types and words."""
    kind, wanted = _KINDS.get(shape.type_name, (object, ""))
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        yield f"{where} {value!r}: give {wanted}"
    elif isinstance(value, dict):
        for name, each in value.items():
            if name in shape.members and name not in _ASKED_FOR_BY_RAY:
                yield from _shape_problems(f"{where}.{name}", each, shape.members[name])
            else:
                like = difflib.get_close_matches(str(name), list(shape.members), 1)
                remedy = f"did you mean {like[0]}?" if like else "leave it out"
                yield f"{where}.{name} is not known to AWS: {remedy}"
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _shape_problems(f"{where}.{number}", each, shape.member)
    elif (
        isinstance(value, str)
        and shape.enum
        and value not in shape.enum
        and not where.endswith("InstanceType")
    ):
        nearest = ", ".join(difflib.get_close_matches(value, shape.enum, 3, 0.0))
        yield f"{where} {value} is not known to AWS: give one such as {nearest}"


@cache
def _run_instances() -> Any:
    """Of AWS's call that starts machines, as botocore describes it."""
    import botocore.session

    service = botocore.session.get_session().get_service_model("ec2")
    return service.operation_model("RunInstances").input_shape
