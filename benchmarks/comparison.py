"""Comparisons with peers: contenders measured in turns, their ratios, and the tables of the results."""

import csv
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path

from benchmarks.contender import Contender, ContenderFailed, Figures, Running

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


@dataclass(frozen=True)
class Comparison:
    """One work, done by us and by peers.

    Attributes:
        work: what is done, in words.
        ours: our contenders by name; the best by the first unit counts.
        peers: for each peer, its contenders by name; the best by the first unit counts. A peer without any
            is not measured.
        units: what is compared.
        own: for each peer, the names of those of ours that it may be compared with; by default all.
    """

    work: str
    ours: Mapping[str, Contender]
    peers: Mapping[str, Mapping[str, Contender]]
    units: Sequence[Unit]
    own: Mapping[str, Sequence[str]] = field(default_factory=dict)


Measured = dict[str, list[Figures]]


def measure(contenders: Mapping[str, Contender], repeats: int) -> Measured:
    """Measure each contender `repeats` times, in turns; who is first changes from turn to turn.

    One that fails is left out, and said so.
    """
    names, found = list(contenders), {name: [] for name in contenders}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(Running(each)) for name, each in contenders.items() if not each.fresh
        }
        for turn in range(repeats):
            for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
                if len(found.get(name, ())) != turn:
                    continue
                try:
                    if contenders[name].fresh:
                        with Running(contenders[name]) as process:
                            figures = process.measure()
                    else:
                        figures = running[name].measure()
                except ContenderFailed as error:
                    print(f"  {name} failed: {error}", file=sys.stderr, flush=True)
                    continue
                found[name].append(figures)
                print(f"  {turn + 1}/{repeats} {name}: {_shown(figures)}", flush=True)
    return {name: figures for name, figures in found.items() if len(figures) == repeats}


def ratios(ours: Sequence[float], peers: Sequence[float], higher_is_better: bool) -> list[float]:
    """How many times better each of our figures is than the peer's of the same turn."""
    pairs = list(zip(ours, peers, strict=True))
    return [our / peer if higher_is_better else peer / our for our, peer in pairs]


def compare(comparison: Comparison, measured: Measured) -> tuple[list[Row], dict[str, str]]:
    """Rows of a comparison, and which contender stood for each peer."""
    first, rows, chosen = comparison.units[0], [], {}
    for peer, contenders in comparison.peers.items():
        ours = _best(
            [name for name in comparison.own.get(peer, comparison.ours) if name in measured], first, measured
        )
        theirs = _best([name for name in contenders if name in measured], first, measured)
        if theirs:
            chosen[peer] = theirs
        for unit in comparison.units:
            goal = unit.goals.get(peer, "")
            if ours is None or theirs is None:
                rows.append(not_measured(comparison.work, peer, unit.name, goal))
                continue
            if not all(unit.name in figures for name in (ours, theirs) for figures in measured[name]):
                continue
            values = [[figures[unit.name] for figures in measured[name]] for name in (ours, theirs)]
            rows.append(row(comparison.work, peer, unit, *values, goal=goal))
    return rows, chosen


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


def _best(names: Sequence[str], unit: Unit, measured: Measured) -> str | None:
    def middle(name: str) -> float:
        value = statistics.median(figures[unit.name] for figures in measured[name])
        return -value if unit.higher_is_better else value

    return min(names, key=middle) if names else None


def _shown(figures: Figures) -> str:
    return ", ".join(f"{value:.4g} {unit}" for unit, value in figures.items())


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


def figures_table(measured: Measured) -> list[str]:
    """Median, smallest and largest of every contender's figures, as a table."""
    units = list(dict.fromkeys(unit for figures in measured.values() for unit in figures[0]))
    lines = [f"| contender | {' | '.join(units)} |", "|---" * (len(units) + 1) + "|"]
    for name, figures in measured.items():
        cells = []
        for unit in units:
            values = [each[unit] for each in figures if unit in each]
            spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.3g}{spread}" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


@dataclass(frozen=True)
class Options:
    """What the command line of `benchmarks.run` sets.

    Attributes:
        repeats: measurements of every contender.
        mnist: a folder of MNIST's images, or the name by which it is downloaded.
    """

    repeats: int = 5
    mnist: str = "mnist"


@dataclass
class Report:
    """Rows of a benchmark, and the lines that its page has beside them."""

    rows: list[Row] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add(self, comparison: Comparison, repeats: int) -> Measured:
        """Measure a comparison, and add its rows and all contenders' figures."""
        print(comparison.work, flush=True)
        contenders = dict(comparison.ours)
        for each in comparison.peers.values():
            contenders |= each
        measured = measure(contenders, repeats)
        rows, chosen = compare(comparison, measured)
        self.rows += rows
        self.lines += ["", f"## {comparison.work}", "", *figures_table(measured)]
        picked = [f"{peer}: {name}" for peer, name in chosen.items() if name != peer]
        if picked:
            self.lines += ["", f"Taken for {'; '.join(picked)}."]
        return measured

    def page(self, title: str, text: str, repeats: int) -> str:
        """The page of results."""
        return "\n".join(
            [
                f"# {title}",
                "",
                text,
                "",
                f"{hardware()}; {versions()}. Load of the machine meanwhile:",
                f"{os.getloadavg()[2]:.1f} (15 minutes' average; what it measures is about 1 to 2).",
                f"Median of {repeats} measurements (smallest and largest in brackets), all contenders of a",
                "comparison in turns. A ratio says how many times better ours is: median, smallest and",
                "largest over the turns.",
                "",
                *markdown(self.rows),
                *self.lines,
                "",
            ]
        )
