"""Estimate the hourly cost of a cluster on AWS, from a price table that users can edit."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.errors import InputError
from diffusion.files import read_file

PRICES = Path(__file__).with_name("prices.csv")
_MAX_BYTES = 2**24
_COLUMNS = ["type", "vcpus", "gpus", "usd_per_hour"]


@dataclass(frozen=True)
class MachineType:
    """A machine type: a row of the price table.

    Attributes:
        vcpus: number of virtual CPU cores.
        gpus: number of GPUs.
        usd: price in US dollars per hour.
    """

    vcpus: int
    gpus: int
    usd: float


@dataclass(frozen=True)
class Prices:
    """The price table.

    Attributes:
        path: path of the file.
        about: first comment of the file, which says what the prices are.
        machines: machine types by AWS's name.
        disk: price of a gigabyte of disk in US dollars per hour.
        address: price of a public IP address in US dollars per hour.
    """

    path: Path
    about: str
    machines: Mapping[str, MachineType]
    disk: float
    address: float


def read_prices(path: Path = PRICES) -> Prices:
    """Read the price table.

    Raises:
        InputError: the file cannot be read, or has a malformed line.
    """
    wanted = f"a file such as {PRICES}"
    try:
        lines = read_file(path, wanted, _MAX_BYTES).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"--prices {path} is no text: give {wanted}") from error
    except InputError as error:
        raise InputError(f"--prices {error}") from error
    table = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not table or table[0][1].split(",") != _COLUMNS:
        raise InputError(f"--prices {path}: the first line must be {','.join(_COLUMNS)}")
    machines, other_prices = {}, {}
    for number, line in table[1:]:
        try:
            name, vcpus, gpus, usd = (each.strip() for each in next(csv.reader([line])))
            price, counts = float(usd), (int(vcpus or 0), int(gpus or 0))
            if not (0.0 <= price < math.inf and name and min(counts) >= 0):
                raise ValueError
            if vcpus:
                machines[name] = MachineType(*counts, price)
            else:
                other_prices[name] = price
        except (ValueError, csv.Error):
            raise InputError(
                f"--prices {path}, line {number}: give a type, its vCPUs, its GPUs and US dollars per hour"
            ) from None
    about = next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
    return Prices(path, about, machines, other_prices.get("disk", 0.0), other_prices.get("address", 0.0))


def hourly_cost(config: Mapping[str, Any], prices: Prices) -> list[str]:
    """Return lines with the hourly cost of a cluster: by node type, at most, and when idle.

    Args:
        config: valid content of the cluster's YAML, as returned by `prepare_with_ray`.
        prices: price table that has every machine type of the cluster.
    """
    address = 0.0 if config["provider"].get("use_internal_ips") else prices.address
    lines, max_cost, idle_cost = [], 0.0, 0.0
    workers_left = config["max_workers"]
    nodes = config["available_node_types"]
    head = config["head_node_type"]
    # The most expensive nodes first, since `max_workers` may not allow all of them.
    for name in sorted(nodes, key=lambda each: (each != head, -_usd(nodes[each], prices))):
        node = nodes[name]
        machine = node["node_config"]["InstanceType"]
        if name == head:
            min_nodes, max_nodes = 1, 1
        else:
            min_nodes, max_nodes = node["min_workers"], min(node["max_workers"], workers_left)
            workers_left -= max_nodes
        node_cost = _usd(node, prices) + _gigabytes(node) * prices.disk + address
        max_cost, idle_cost = max_cost + max_nodes * node_cost, idle_cost + min_nodes * node_cost
        number = f"{max_nodes}" if min_nodes == max_nodes else f"{min_nodes} to {max_nodes}"
        spot = (
            "  (on-demand price; spot usually costs less)"
            if "InstanceMarketOptions" in node["node_config"]
            else ""
        )
        lines.append(
            f"  {name:<10} {number:>8} x {machine:<14} {max_nodes * node_cost:9.2f} USD per hour{spot}"
        )
    minutes = config.get("idle_timeout_minutes")
    return [
        "Cost of machines, their disks and public IP addresses:",
        *lines,
        f"  {'at most':<36} {max_cost:9.2f} USD per hour, {24 * max_cost:.0f} USD per day",
        f"  {'idle':<36} {idle_cost:9.2f} USD per hour ({minutes:g} minutes after work ends, until ray down)",
        f"calculated from {prices.path.name} ({prices.about.rstrip('.:')});",
        "traffic and the bucket are not included",
    ]


def _usd(node: Mapping[str, Any], prices: Prices) -> float:
    return prices.machines[node["node_config"]["InstanceType"]].usd


def _gigabytes(node: Mapping[str, Any]) -> float:
    disks = node["node_config"].get("BlockDeviceMappings") or []
    return sum(disk.get("Ebs", {}).get("VolumeSize", 0) for disk in disks)
