"""Comparisons with peers: contenders measured in turns, and the page of their results."""

import os
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.contender import Contender, ContenderFailed, Figures, Running
from benchmarks.table import Row, Unit, hardware, markdown, not_measured, row, versions


@dataclass(frozen=True)
class Comparison:
    """One work, done by us and by peers.

    Attributes:
        work: what is done, in words.
        ours: our contenders by name; the best by the first unit counts.
        peers: for each peer, its contenders by name; the best by the first unit counts. A peer without any
            is not measured.
        units: what is compared.
    """

    work: str
    ours: Mapping[str, Contender]
    peers: Mapping[str, Mapping[str, Contender]]
    units: Sequence[Unit]


Measured = dict[str, list[Figures]]

# A contender takes no further turns once it cannot become the best of its side: after so many turns, its best
# figure is worse than the best contender's worst one by this factor.
_FEWEST_TURNS, _HOPELESS = 2, 1.3


def measure(
    contenders: Mapping[str, Contender],
    repeats: int,
    sides: Sequence[Collection[str]] = (),
    unit: Unit | None = None,
) -> Measured:
    """Measure each contender `repeats` times, in turns; who is first changes from turn to turn.

    One that fails is left out, and said so.

    Args:
        contenders: the contenders by name.
        repeats: number of turns.
        sides: names of contenders of which only the best counts. One that cannot become it by `unit` has
            fewer figures than the others.
        unit: of the figures by which the best is found.
    """
    names, found = list(contenders), {name: [] for name in contenders}
    given_up: set[str] = set()
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(Running(each)) for name, each in contenders.items() if not each.fresh
        }
        for turn in range(repeats):
            first = turn % max(1, len(names))
            for name in [*names[first:], *names[:first]]:
                if len(found[name]) != turn or name in given_up:
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
            if unit is not None and turn + 1 >= _FEWEST_TURNS:
                given_up |= {name for side in sides for name in hopeless(side, unit, found)}
    return {name: figures for name, figures in found.items() if len(figures) == repeats or name in given_up}


def hopeless(side: Collection[str], unit: Unit, found: Measured) -> list[str]:
    """Contenders of a side that cannot become its best."""
    turns = max(map(len, found.values()))
    running = {
        name: [_cost(figures, unit) for figures in found[name]] for name in side if len(found[name]) == turns
    }
    if not running:
        return []
    best = min(running, key=lambda name: statistics.median(running[name]))
    return [name for name, costs in running.items() if min(costs) > _HOPELESS * max(running[best])]


def _cost(figures: Figures, unit: Unit) -> float:
    """A figure of which less is better."""
    return 1.0 / figures[unit.name] if unit.higher_is_better else figures[unit.name]


def compare(comparison: Comparison, measured: Measured) -> tuple[list[Row], dict[str, str]]:
    """Rows of a comparison, and which contender stood for each peer."""
    first, rows, chosen = comparison.units[0], [], {}
    turns = max(map(len, measured.values()), default=0)
    measured = {name: figures for name, figures in measured.items() if len(figures) == turns}
    for peer, contenders in comparison.peers.items():
        ours = _best([name for name in comparison.ours if name in measured], first, measured)
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


def _best(names: Sequence[str], unit: Unit, measured: Measured) -> str | None:
    def middle(name: str) -> float:
        return statistics.median(_cost(figures, unit) for figures in measured[name])

    return min(names, key=middle) if names else None


def _shown(figures: Figures) -> str:
    return ", ".join(f"{value:.4g} {unit}" for unit, value in figures.items())


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
        sides = [comparison.ours.keys(), *(each.keys() for each in comparison.peers.values())]
        measured = measure(contenders, repeats, sides, comparison.units[0])
        rows, chosen = compare(comparison, measured)
        self.rows += rows
        self.lines += ["", f"## {comparison.work}", "", *figures_table(measured)]
        picked = [f"{peer}: {name}" for peer, name in chosen.items() if name != peer]
        if picked:
            self.lines += ["", f"Taken for {'; '.join(picked)}."]
        fewer = [f"{name} ({len(each)})" for name, each in measured.items() if len(each) < repeats]
        if fewer:
            self.lines += ["", f"Left out after so many turns, since a faster one stood: {', '.join(fewer)}."]
        return measured

    def leave_out(self, comparison: Comparison, reason: str) -> None:
        """Add the rows of a comparison that cannot be measured here."""
        self.rows += compare(comparison, {})[0]
        self.lines += ["", f"## {comparison.work}", "", f"Not measured: {reason}."]

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
