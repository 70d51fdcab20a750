"""What a cluster on AWS can cost an hour, from a table that the user edits."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.errors import InputError

PRICES = Path(__file__).parents[1] / "cluster" / "prices.csv"
_COLUMNS = ["type", "vcpus", "gpus", "usd_per_hour"]


@dataclass(frozen=True)
class MachineType:
    """A row of the table: processors, GPUs, US dollars an hour."""

    vcpus: int
    gpus: int
    usd: float


@dataclass(frozen=True)
class Prices:
    """The table.

    Attributes:
        path: of the file.
        about: its first comment: what the prices are.
        machines: by AWS's name of the type.
        disk: US dollars a gigabyte and hour.
        address: US dollars a public address and hour.
    """

    path: Path
    about: str
    machines: Mapping[str, MachineType]
    disk: float
    address: float


def read_prices(path: Path = PRICES) -> Prices:
    """Read the table.

    Raises:
        InputError: it cannot be read, or a line is not of its form.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(
            f"--prices {path} cannot be read ({error.strerror}): give a file such as {PRICES}"
        ) from error
    table = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not table or table[0][1].split(",") != _COLUMNS:
        raise InputError(f"--prices {path}: its first line must be {','.join(_COLUMNS)}")
    machines, others = {}, {}
    for (number, _), row in zip(table[1:], csv.reader(line for _, line in table[1:]), strict=True):
        try:
            name, vcpus, gpus, usd = (each.strip() for each in row)
            if float(usd) < 0:
                raise ValueError
            if vcpus:
                machines[name] = MachineType(int(vcpus), int(gpus or 0), float(usd))
            else:
                others[name] = float(usd)
        except ValueError:
            raise InputError(
                f"--prices {path}, line {number}: give a type, its processors, its GPUs and dollars an hour"
            ) from None
    about = next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
    return Prices(path, about, machines, others.get("disk", 0.0), others.get("address", 0.0))


def hourly_cost(config: Mapping[str, Any], prices: Prices) -> list[str]:
    """Lines that say what a cluster costs an hour, by type of node, at the least and at the most.

    Args:
        config: as `ray up` prepares it, checked.
        prices: with every type in it.
    """
    addresses = 0.0 if config["provider"].get("use_internal_ips") else prices.address
    lines, most, least = [], 0.0, 0.0
    left = config["max_workers"]
    nodes = config["available_node_types"]
    head = config["head_node_type"]
    # The dearest first: `max_workers` may leave room for some of them only.
    for name in sorted(nodes, key=lambda each: (each != head, -_usd(nodes[each], prices))):
        node = nodes[name]
        machine = node["node_config"]["InstanceType"]
        fewest, count = (1, 1) if name == head else (node["min_workers"], min(node["max_workers"], left))
        left -= 0 if name == head else count
        one = _usd(node, prices) + _gigabytes(node) * prices.disk + addresses
        most, least = most + count * one, least + fewest * one
        number = f"{count}" if fewest == count else f"{fewest} to {count}"
        spot = "  (on demand; as spot usually less)" if "InstanceMarketOptions" in node["node_config"] else ""
        lines.append(f"  {name:<10} {number:>8} x {machine:<14} {count * one:9.2f} USD an hour{spot}")
    minutes = config.get("idle_timeout_minutes")
    return [
        "It can cost, machines, their disks and public addresses:",
        *lines,
        f"  {'at most':<36} {most:9.2f} USD an hour, {24 * most:.0f} a day",
        f"  {'without work':<36} {least:9.2f} USD an hour ({minutes:g} minutes after it, until ray down)",
        f"reckoned with {prices.path.name} ({prices.about.rstrip('.:')});",
        "traffic and the bucket are not in it",
    ]


def _usd(node: Mapping[str, Any], prices: Prices) -> float:
    return prices.machines[node["node_config"]["InstanceType"]].usd


def _gigabytes(node: Mapping[str, Any]) -> float:
    disks = node["node_config"].get("BlockDeviceMappings") or []
    return sum(disk.get("Ebs", {}).get("VolumeSize", 0) for disk in disks)
