"""A question that figures of the report answer, and sentences that several of them have in common."""

from dataclasses import dataclass

from workflows.sweep.report.drawing import Plot, trial_label
from workflows.sweep.report.standings import Standings
from workflows.sweep.report.tables import Table

LIMITED = "The worst trials lie above the shown range; double-click to see all."


@dataclass(frozen=True)
class Chart:
    """Plots on one question, with what they say and their numbers.

    Attributes:
        title: what they are about.
        notes: how to read them and what they show, in sentences.
        plots: the plots; none if there is too little to plot, which a note says.
        tables: the numbers of the plots.
        has_marks: whether the plots show trials by marks without a legend of their own.
    """

    title: str
    notes: list[str]
    plots: list[Plot]
    tables: list[Table]
    has_marks: bool = False


def objective_title(standings: Standings) -> str:
    """Title of an axis or a column of objectives, with their unit if they have one."""
    return f"objective, {standings.unit}" if standings.unit else f"objective: {standings.objective_name}"


def ending(standings: Standings) -> str:
    """Sentences that end the description of a plot: which trials are marked, and where the numbers are."""
    roles = "; ".join(trial_label(standings, record) for record in standings.protagonists)
    return f"Marked are the {roles}. The numbers are in the table below."
