"""The rows of summary.csv: ratios of paired figures, and what of an earlier table stays."""

import csv
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SUMMARY = "summary.csv"
NOT_MEASURED = "not measured"
_PACKAGES = ("torch", "diffusers", "onnxruntime-gpu", "onnxruntime", "openvino", "ray", "mlflow", "optuna")


@dataclass(frozen=True)
class Row:
    """A line of summary.csv. Ratios say how many times better ours is; all figures are texts."""

    work: str
    peer: str
    unit: str
    ours_median: str
    peer_median: str
    ratio_median: str
    ratio_min: str
    ratio_max: str
    goal: str
    hardware: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What no two rows share."""
        return self.work, self.peer, self.unit


COLUMNS = [each.name for each in fields(Row)]


@dataclass(frozen=True)
class Unit:
    """A figure that contenders report.

    Attributes:
        name: key of the figure, such as "s".
        higher_is_better: as for samples per second.
        goals: what to reach against a peer, by the peer's name.
    """

    name: str
    higher_is_better: bool = False
    goals: Mapping[str, str] = field(default_factory=dict)


def ratios(ours: Sequence[float], peers: Sequence[float], higher_is_better: bool) -> list[float]:
    """How many times better each of our figures is than the peer's of the same turn."""
    pairs = list(zip(ours, peers, strict=True))
    return [our / peer if higher_is_better else peer / our for our, peer in pairs]


def row(
    work: str, peer: str, unit: Unit, ours: Sequence[float], peers: Sequence[float], *, goal: str = ""
) -> Row:
    """The row of paired figures."""
    found = ratios(ours, peers, unit.higher_is_better)
    summary = (
        statistics.median(ours),
        statistics.median(peers),
        statistics.median(found),
        min(found),
        max(found),
    )
    return Row(work, peer, unit.name, *(f"{value:.4g}" for value in summary), goal, hardware())


def not_measured(work: str, peer: str, unit: str, goal: str = "", needs: str | None = None) -> Row:
    """The row of a work whose hardware, package or data are not here.

    Args:
        needs: the hardware that is missing; None is this machine's, where something else is.
    """
    return Row(work, peer, unit, *[NOT_MEASURED] * 5, goal, needs or hardware())


def hardware() -> str:
    """Cores and model of this machine's processor."""
    model = platform.processor() or platform.machine()
    with_names = Path("/proc/cpuinfo")
    if with_names.exists():
        names = [line for line in with_names.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{os.cpu_count()} cores, {model}"


def versions() -> str:
    """Versions of Python and the packages that are measured, and the commit."""
    found = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return ", ".join([*found, *([f"commit {commit.stdout.strip()}"] if commit.returncode == 0 else [])])


def read_summary(folder: Path = RESULTS) -> list[Row]:
    """Rows of summary.csv; none if there is no such file."""
    path = folder / SUMMARY
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Row(**line) for line in csv.DictReader(file)]


def write_summary(rows: Iterable[Row], order: Sequence[str], folder: Path = RESULTS) -> None:
    """Put rows into summary.csv, in place of those of the same work, peer and unit.

    A row that was measured on other hardware stays if the new one could not be measured here.

    Args:
        order: the works in their order; others follow.
    """
    kept = {each.key: each for each in read_summary(folder)}
    for new in rows:
        old = kept.get(new.key)
        if old and new.ours_median == NOT_MEASURED != old.ours_median and old.hardware != hardware():
            continue
        kept[new.key] = new
    places = {work: place for place, work in enumerate(order)}
    with (folder / SUMMARY).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for each in sorted(kept.values(), key=lambda each: places.get(each.work, len(places))):
            writer.writerow({name: getattr(each, name) for name in COLUMNS})


def markdown(rows: Sequence[Row]) -> list[str]:
    """The rows as a table."""
    head = ["work", "peer", "unit", "ours", "peer's", "ratio", "from", "to", "goal"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for each in rows:
        cells = [getattr(each, name) for name in COLUMNS if name != "hardware"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
