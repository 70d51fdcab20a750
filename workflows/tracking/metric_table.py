"""Metrics as a table, for trackers that would show each error and each count as a chart of its own."""

import math
from collections.abc import Mapping
from typing import Any

from diffusion.metrics import FLOOR, STANDARD_ERROR

_FLOOR_ERROR = FLOOR + STANDARD_ERROR
_COLUMNS = ("metric", "value", "standard error", "floor", "standard error of the floor")
_SUFFIXES = ("", STANDARD_ERROR, FLOOR, _FLOOR_ERROR)  # of the numbers in a row


def metric_table(metrics: Mapping[str, float]) -> dict[str, list[Any]]:
    """A table of metrics with their errors and floors, a row for each, as {"columns", "data"}.

    It has the layout of a data frame that pandas writes with orient="split". What is not known, or not a
    finite number, is None.
    """
    rows = []
    for name in sorted(metrics):
        if any(name.endswith(suffix) and name.removesuffix(suffix) in metrics for suffix in _SUFFIXES[1:]):
            continue  # it stands in the row of its metric
        numbers = [metrics.get(name + suffix) for suffix in _SUFFIXES]
        rows.append([name, *(None if x is None or not math.isfinite(x) else x for x in numbers)])
    return {"columns": list(_COLUMNS), "data": rows}


def table_metrics(table: Mapping[str, list[Any]]) -> dict[str, float]:
    """The metrics in a table of `metric_table` that are known, by name."""
    return {
        name + suffix: float(number)
        for name, *numbers in table["data"]
        for suffix, number in zip(_SUFFIXES, numbers, strict=True)
        if number is not None
    }
