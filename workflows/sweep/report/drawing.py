"""Parts of the report's figures, by Plotly: trials as lines and points, axes, colours.

The champion, the choice of the mean squared error and the runner-up have a colour and a marker each, the same
in every figure, that colour-blind readers can tell apart (the palette of Okabe and Ito). Plotly reads markup
in names and titles, so these are escaped here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from workflows.sweep.report.standings import ROLE_NAMES, Role, Standings
from workflows.sweep.trial_records import TrialRecord

GREY = "#8a93a0"
COLOURS: Mapping[Role, str] = {"champion": "#d55e00", "mse": "#0072b2", "runner-up": "#009e73"}
WORST_TO_BEST = ((0.0, "#e69f00"), (0.5, "#9aa3ad"), (1.0, "#0072b2"))
_MARKERS: Mapping[Role, str] = {"champion": "star", "mse": "diamond", "runner-up": "square"}
_DASHES: Mapping[Role, str] = {"champion": "solid", "mse": "dash", "runner-up": "dot"}
_OTHER_MARKERS = {"finished": "circle", "stopped": "circle-open"}
_MAX_TICKS = 6
_MANY = 60  # trials beyond which the others' lines are thinner


@dataclass(frozen=True)
class Plot:
    """A plot of Plotly.

    Attributes:
        json: its data and layout, safe to stand in a script element.
        text: what it shows, for readers who cannot see it.
        is_wide: whether it takes the whole width of the page.
    """

    json: str
    text: str
    is_wide: bool


def new_figure(x_title: str, y_title: str = "", height: int = 400) -> go.Figure:
    """An empty figure.

    Args:
        x_title: title of the x axis.
        y_title: title of the y axis.
        height: height in pixels.
    """
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 12, "t": 12, "b": 50},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0.0},
        hovermode="closest",
    )
    figure.update_xaxes(automargin=True, title=escape(x_title))
    figure.update_yaxes(automargin=True, title=escape(y_title))
    return figure


def plot_of(figure: go.Figure, text: str, *, is_wide: bool) -> Plot:
    """A figure as a part of the page, see `Plot`."""
    # Inside a script element, only "<" could end it.
    return Plot(figure.to_json(engine="json").replace("<", "\\u003c"), text, is_wide)


def add_line(
    figure: go.Figure,
    standings: Standings,
    record: TrialRecord,
    x: Sequence[float],
    y: Sequence[float],
    every: int = 1,
) -> None:
    """Draw the line of a trial that plays a part.

    Args:
        figure: figure to draw into.
        standings: the trials.
        record: the trial.
        x: its values on the x axis.
        y: its values on the y axis; those that are not finite leave a gap.
        every: one of so many points has a marker.
    """
    role = standings.roles(record.trial_id)[0]
    figure.add_scatter(
        x=list(x),
        y=[or_none(value) for value in y],
        mode="lines+markers",
        name=escape(trial_label(standings, record)),
        line={"color": COLOURS[role], "width": 3.5 if role == "champion" else 2, "dash": _DASHES[role]},
        marker={
            "symbol": _MARKERS[role],
            "opacity": 1.0,
            "line": {"width": 0},
            "size": [0 if i % every else 12 if role == "champion" else 8 for i in range(len(x))],
        },
        hovertemplate="%{fullData.name}<br>%{x:.4g}: %{y:.4g}<extra></extra>",
    )


def add_other_lines(
    figure: go.Figure, lines: Iterable[tuple[TrialRecord, Sequence[float], Sequence[float]]]
) -> None:
    """Draw the lines of trials that play no part: one trace for each status, with gaps between trials."""
    by_status: dict[str, list[tuple[TrialRecord, Sequence[float], Sequence[float]]]] = {}
    for line in lines:
        by_status.setdefault(line[0].status, []).append(line)
    for status, group in by_status.items():
        x, y, names = [], [], []
        for record, line_x, line_y in group:
            x += [*line_x, None]
            y += [*(or_none(value) for value in line_y), None]
            names += [escape(record.trial_id)] * (len(line_x) + 1)
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers",
            name=escape(status),
            customdata=names,
            opacity=0.7 if len(group) < _MANY else 0.35,
            line={"color": GREY, "width": 1, "dash": "solid" if status == "finished" else "dot"},
            marker={"symbol": _OTHER_MARKERS.get(status, "x-thin-open"), "size": 4},
            hovertemplate="trial %{customdata}<br>%{x:.4g}: %{y:.4g}<extra>%{fullData.name}</extra>",
        )


def add_points(
    figure: go.Figure,
    standings: Standings,
    records: Sequence[TrialRecord],
    x: Sequence[Any],
    y: Sequence[float],
) -> None:
    """Draw trials as points, those that play a part on top."""
    points = list(zip(records, x, y, strict=True))
    others = [point for point in points if not standings.roles(point[0].trial_id)]
    for status in dict.fromkeys(point[0].status for point in others):
        group = [point for point in others if point[0].status == status]
        figure.add_scatter(
            x=[point[1] for point in group],
            y=[or_none(point[2]) for point in group],
            mode="markers",
            name=escape(status),
            customdata=[escape(point[0].trial_id) for point in group],
            marker={"symbol": _OTHER_MARKERS.get(status, "x-thin-open"), "size": 8, "color": GREY},
            hovertemplate="trial %{customdata}, %{fullData.name}<br>%{x:.4g}: %{y:.4g}<extra></extra>",
        )
    for record, x_value, y_value in sorted(
        points, key=lambda point: point[0].trial_id == standings.champion.trial_id
    ):
        roles = standings.roles(record.trial_id)
        if roles:
            figure.add_scatter(
                x=[x_value],
                y=[or_none(y_value)],
                mode="markers",
                name=escape(trial_label(standings, record)),
                marker={
                    "symbol": _MARKERS[roles[0]],
                    "size": 17 if roles[0] == "champion" else 11,
                    "color": COLOURS[roles[0]],
                },
                hovertemplate="%{fullData.name}<br>%{x:.4g}: %{y:.4g}<extra></extra>",
            )


def set_robust_range(figure: go.Figure, shown: Sequence[float], everything: Sequence[float]) -> bool:
    """Limit the y axis if a few values are far above the others, and return whether it is limited.

    Args:
        figure: the figure.
        shown: values that matter: nine tenths of them are inside the limits.
        everything: all values that are drawn.
    """
    known = np.array([value for value in shown if math.isfinite(value)])
    if len(known) < 2:
        return False
    low, middle, high = known.min(), np.quantile(known, 0.5), np.quantile(known, 0.9)
    top = max(high, middle) + 0.15 * (high - low)
    largest = max((value for value in everything if math.isfinite(value)), default=top)
    if high <= low or largest <= top + 0.5 * (top - low):
        return False
    figure.update_yaxes(range=[float(low - 0.08 * (top - low)), float(top)])
    return True


def parameter_axis(values: Sequence[float]) -> dict[str, Any]:
    """An axis for a parameter's values, logarithmic if they span a factor of 5; few values are its ticks."""
    low, high, different = min(values), max(values), sorted(set(values))
    is_log = low > 0 and high > 5 * low
    if len(different) <= _MAX_TICKS and all(isinstance(value, int) for value in different):
        ticks: list[float] = list(different)
    elif is_log:
        ticks = _log_ticks(low, high)
    else:
        return {}
    axis = {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks], "minor": {"ticks": ""}}
    return axis | ({"type": "log"} if is_log else {})


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two values, or as many of these as fit; else the two values."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low / 1.1 <= tick <= high * 1.1]
        if 2 <= len(ticks) <= _MAX_TICKS:
            return ticks
    return [low, high]


def trial_label(standings: Standings, record: TrialRecord) -> str:
    """Name of a trial with the parts that it plays."""
    text = roles_text(standings, record)
    return f"{text}: trial {record.trial_id}" if text else f"trial {record.trial_id}"


def roles_text(standings: Standings, record: TrialRecord) -> str:
    """The parts that a trial plays, in words; empty for most."""
    return ", ".join(ROLE_NAMES[role] for role in standings.roles(record.trial_id))


def blended(quality: float) -> str:
    """Colour of a quality from 0, the worst, to 1."""
    position = min(max(quality, 0.0), 1.0)
    stops = [(place, [int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for place, colour in WORST_TO_BEST]
    parts = [
        np.interp(position, [s[0] for s in stops], [s[1][channel] for s in stops]) for channel in range(3)
    ]
    return "#" + "".join(f"{round(float(part)):02x}" for part in parts)


def or_none(value: float) -> float | None:
    """A number as JSON can have it: None if it is not finite."""
    return value if math.isfinite(value) else None


def bar_style(standings: Standings, record: TrialRecord) -> tuple[str, str, str]:
    """Name, colour and pattern of a trial's bar."""
    roles = standings.roles(record.trial_id)
    if roles:
        return escape(trial_label(standings, record)), COLOURS[roles[0]], ""
    return record.status, GREY, {"finished": "", "stopped": "/"}.get(record.status, "x")
