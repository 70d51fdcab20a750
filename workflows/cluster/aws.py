"""Find problems in a cluster's YAML for AWS, without contacting AWS."""

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from workflows.cluster.cost import Prices, hourly_cost
from workflows.cluster.kinds import ClusterKind
from workflows.environment import configured_storage

_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")
_IMAGE = re.compile(r"ami-[0-9a-f]{8,17}")
_GROUP = re.compile(r"sg-[0-9a-f]{8,17}")
_MIN_DISK_GB = 60  # the system, CUDA's libraries, PyTorch
# By botocore's name of a type: the Python type, and what messages call it.
_TYPES = {
    "structure": (dict, "keys with values"),
    "list": (list, "a list"),
    "string": (str, "text"),
    "integer": (int, "a whole number, without quotes"),
    "boolean": (bool, "true or false"),
}
_SET_BY_RAY = ("MinCount", "MaxCount")


def aws_problems(prepared: Mapping[str, Any], config: Mapping[str, Any], prices: Prices) -> Iterator[str]:
    """Yield one line for each problem.

    Args:
        prepared: content of the YAML with the defaults that Ray fills in.
        config: content of the YAML as it is.
        prices: table of the known machine types.
    """
    provider = config["provider"]
    region = str(provider.get("region"))
    if not _REGION.fullmatch(region):
        yield f"provider.region {region}: give the name of a region, such as us-west-2"
    for zone in str(provider.get("availability_zone") or region).split(","):
        if not zone.strip().startswith(region):
            yield (
                f"provider.availability_zone {zone.strip()} is not in {region}: give one of its zones, "
                f"such as {region}a"
            )
    if provider.get("cache_stopped_nodes") is not False:
        yield (
            "provider.cache_stopped_nodes is not false: machines would be stopped instead of terminated, "
            "and their disks would still cost money; set it to false"
        )
    if not prepared["idle_timeout_minutes"] > 0:
        yield f"idle_timeout_minutes {prepared['idle_timeout_minutes']}: give 1 or more"
    storage = configured_storage(config) or ""
    head, have_profile = prepared["head_node_type"], []
    for name, node in prepared["available_node_types"].items():
        where = f"available_node_types.{name}"
        yield from _size_problems(where, node, prepared["max_workers"], is_head=name == head)
        yield from _machine_problems(where, node, prices)
        yield from _launch_problems(f"{where}.node_config", node["node_config"])
        have_profile.append("IamInstanceProfile" in node["node_config"])
        if name == head:
            yield from _head_problems(where, node)
        elif not have_profile[-1] and storage.startswith("s3:"):
            yield (
                f"{where}.node_config has no IamInstanceProfile, so its machines cannot access "
                f"{storage}: give them the profile that cluster/aws-account.yaml creates"
            )
    if (
        any(have_profile)
        and "IamInstanceProfile" not in prepared["available_node_types"][head]["node_config"]
    ):
        yield (
            f"available_node_types.{head}.node_config has no IamInstanceProfile: with Ray's default "
            "profile the head may not assign the workers' profile, and no worker would start; give it the "
            "profile that cluster/aws-account.yaml creates"
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
        yield f"{where}.max_workers {node['max_workers']}: there is only one head; leave it out"


def _machine_problems(where: str, node: Mapping[str, Any], prices: Prices) -> Iterator[str]:
    instance_type = node["node_config"].get("InstanceType")
    machine = prices.machines.get(str(instance_type))
    if machine is None:
        similar = difflib.get_close_matches(str(instance_type), list(prices.machines), 1)
        suggestion = f"did you mean {similar[0]}? If not, " if similar else ""
        yield (
            f"{where}.node_config.InstanceType {instance_type} is not in {prices.path.name}: "
            f"{suggestion}add a line for it there"
        )
        return
    for resource, available in (("CPU", machine.vcpus), ("GPU", machine.gpus)):
        number = node["resources"].get(resource, available)
        if number > available or (resource == "GPU" and number != available):
            yield (
                f"{where}.resources.{resource} {number}: a {instance_type} has {available}; give that "
                "number, or let Ray detect it with resources: {}"
            )


def _head_problems(where: str, node: Mapping[str, Any]) -> Iterator[str]:
    if node["resources"].get("CPU") != 0:
        yield f"{where}.resources: without CPU: 0, trials would run on the head next to the drivers; set it"
    if "InstanceMarketOptions" in node["node_config"]:
        yield (
            f"{where}.node_config.InstanceMarketOptions: if AWS reclaimed the head, the whole cluster would "
            "be lost; leave it out"
        )


def _launch_problems(where: str, launch: Mapping[str, Any]) -> Iterator[str]:
    """Yield what AWS would refuse when it starts a machine, and settings that are silently harmful."""
    request = {name: value for name, value in launch.items() if name != "SubnetIds"}  # only known to Ray
    yield from _shape_problems(where, request, _run_instances_shape())
    if not _IMAGE.fullmatch(str(launch.get("ImageId"))):
        yield (
            f"{where}.ImageId {launch.get('ImageId')}: give an image such as ami-0123456789abcdef0; Ray's "
            "default image is too old for PyTorch"
        )
    groups = launch.get("SecurityGroupIds") or ["missing"]
    if "NetworkInterfaces" not in launch and not all(_GROUP.fullmatch(str(group)) for group in groups):
        yield (
            f"{where}.SecurityGroupIds {', '.join(map(str, groups))}: give one such as sg-0123456789abcdef0; "
            "without one, Ray opens SSH to the whole internet"
        )
    for index, disk in enumerate(launch.get("BlockDeviceMappings") or []):
        yield from _disk_problems(f"{where}.BlockDeviceMappings.{index}.Ebs", dict(disk.get("Ebs") or {}))


def _disk_problems(where: str, disk: Mapping[str, Any]) -> Iterator[str]:
    size = disk.get("VolumeSize")
    if size is None or (isinstance(size, int) and size < _MIN_DISK_GB):
        yield f"{where}.VolumeSize {size}: give {_MIN_DISK_GB} or more, in gigabytes"
    if disk.get("DeleteOnTermination") is not True:
        yield f"{where}.DeleteOnTermination is not true: the disk would remain after ray down and cost money"


def _shape_problems(where: str, value: Any, shape: Any) -> Iterator[str]:
    """Check a value against AWS's description of a request: names, types and enumerations.

    Args:
        where: dotted path of the value in the YAML, for messages.
        value: the value.
        shape: botocore's description of the value.
    """
    python_type, description = _TYPES.get(shape.type_name, (object, ""))
    if not isinstance(value, python_type) or (python_type is int and isinstance(value, bool)):
        yield f"{where} {value!r}: give {description}"
    elif isinstance(value, dict):
        for name, each in value.items():
            if name in shape.members and name not in _SET_BY_RAY:
                yield from _shape_problems(f"{where}.{name}", each, shape.members[name])
            else:
                similar = difflib.get_close_matches(str(name), list(shape.members), 1)
                remedy = f"did you mean {similar[0]}?" if similar else "leave it out"
                yield f"{where}.{name} is not known to AWS: {remedy}"
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _shape_problems(f"{where}.{index}", each, shape.member)
    elif (
        isinstance(value, str)
        and shape.enum
        and value not in shape.enum
        and not where.endswith("InstanceType")
    ):
        nearest = ", ".join(difflib.get_close_matches(value, shape.enum, 3, 0.0))
        yield f"{where} {value} is not known to AWS: give one such as {nearest}"


@cache
def _run_instances_shape() -> Any:
    """Return botocore's description of RunInstances, the request that starts machines."""
    import botocore.session

    service = botocore.session.get_session().get_service_model("ec2")
    return service.operation_model("RunInstances").input_shape


AWS = ClusterKind(
    example="ray_cluster.yaml",
    provider_keys=(
        "region",
        "availability_zone",
        "cache_stopped_nodes",
        "use_internal_ips",
        "key_pair",
        "security_group",
        "aws_credentials",
        "cloudwatch",
    ),
    problems=aws_problems,
    needed_keys=("available_node_types", "head_node_type", "max_workers"),
    hourly_cost=hourly_cost,
)
