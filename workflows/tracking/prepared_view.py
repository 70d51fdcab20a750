"""The prepared page of a sweep's trials in MLflow: which columns, charts and order it has.

MLflow keeps such a page as a tag of the experiment, and lists it under "Views" (from 3.17). Its address names
the tag: `viewStateShareKey`.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from diffusion.metrics import (
    BEST_OBJECTIVE,
    OBJECTIVE,
    RANK,
    SAMPLE_AUC,
    SAMPLE_DISTANCE,
    TRAIN_MSE,
    VAL_MSE,
)

PICTURES = "pictures/samples"  # key of the pictures; a run's page begins with the section "pictures"
PICK = "pick"  # tag of trials: what it was picked as, such as "champion"
COLOUR = "mlflow.runColor"  # tag of runs, which charts would draw in colours that can be alike
PICK_COLOURS = ("#009e73", "#d55e00")  # of the first picks, as the colour-blind can tell them apart
_MEASURES = (SAMPLE_DISTANCE, SAMPLE_AUC, BEST_OBJECTIVE, VAL_MSE)
_PARAMETER_WIDTH = 160  # pixels; the default cuts most of their names
_PICTURES_HEIGHT = 640  # pixels: two rows
_TAG = "mlflow.sharedViewState."
_SHARE_KEY = "viewStateShareKey"
# Without it the page opens in MLflow's mode for language models, which shows no training runs.
_WORKFLOW = "workflowType=machine_learning"


def view_tag(run_id: str) -> str:
    """Key of the experiment's tag with the view of a sweep's trials."""
    return _TAG + run_id


def runs_page(experiment_id: str, sweep_run_id: str | None = None) -> str:
    """Return the URL path of an experiment's runs, or of the prepared view of a sweep's trials."""
    page = f"/#/experiments/{experiment_id}/runs?{_WORKFLOW}"
    return page if sweep_run_id is None else f"{page}&{_SHARE_KEY}={sweep_run_id}"


def newest_pages(client: MlflowClient) -> dict[str, str]:
    """URL path of the page of each experiment by its name, that of the newest first.

    It is the prepared view of its newest sweep, or the page of all runs if a training is newer.
    """
    experiments = [each for each in client.search_experiments() if each.experiment_id != "0"]
    experiments.sort(key=lambda each: each.last_update_time or 0, reverse=True)
    return {each.name: _newest_page(client, each) for each in experiments}


def _newest_page(client: MlflowClient, experiment: Experiment) -> str:
    newest = client.search_runs([experiment.experiment_id], max_results=1, order_by=["start_time DESC"])
    run_ids = [run.data.tags.get(MLFLOW_PARENT_RUN_ID, run.info.run_id) for run in newest]
    views = [run_id for run_id in run_ids if view_tag(run_id) in experiment.tags]
    return runs_page(experiment.experiment_id, *views)


def run_page(experiment_id: str, run_id: str) -> str:
    """Return the URL path of a run's page."""
    return f"/#/experiments/{experiment_id}/runs/{run_id}?{_WORKFLOW}"


def trials_view(
    name: str, run_id: str, searched: Sequence[str], num_updates: int, created: int, *, decided: bool
) -> str:
    """Value of the tag with the view of a sweep's trials.

    Args:
        name: name of the sweep.
        run_id: id of its parent run.
        searched: names of the parameters that the sweep searches.
        num_updates: updates of a complete trial.
        created: when the view was made, in milliseconds since 1970.
        decided: whether the champion has been chosen. The trials are sorted by rank then, else by objective.
    """
    state = _state(run_id, searched, num_updates, decided=decided)
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    # MLflow 3.17 reads the named view; servers before it read the state itself.
    named = {"name": f"{name}: trials, best first", "createdAt": created, "state": f"deflate;{packed}"}
    return json.dumps({**named, **state})


def _state(run_id: str, searched: Sequence[str], num_updates: int, *, decided: bool) -> dict[str, Any]:
    metrics = [*([RANK] if decided else []), *_MEASURES]
    columns = [
        _column("tags", "status"),
        *(_column("metrics", name) for name in metrics),
        *(_column("params", name) for name in searched),
    ]
    charts, sections = _charts(searched, num_updates if decided else 0)
    return {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": _column("metrics", RANK if decided else BEST_OBJECTIVE),
        "orderByAsc": True,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {_column("params", name): _PARAMETER_WIDTH for name in searched},
        "runsHiddenMode": "FIRST_20_RUNS",
        "isAccordionReordered": True,  # else MLflow sorts the sections by name
        "compareRunCharts": charts,
        "compareRunSections": sections,
    }


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def _charts(searched: Sequence[str], step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The charts of the view, and their sections, with the names that MLflow's pages have for them.

    Args:
        searched: names of parameters.
        step: the step whose pictures are shown first.
    """
    bars = [{"type": "BAR", "metricKey": metric, "displayName": metric} for metric in _MEASURES]
    curves = [
        {
            "type": "LINE",
            "metricKey": metric,
            "selectedMetricKeys": [metric],
            "displayName": metric,
            "xAxisKey": "step",
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
            "range": {},
            "yAxisKey": "metric",
            "yAxisExpressions": [],
        }
        for metric in (OBJECTIVE, VAL_MSE, TRAIN_MSE)
    ]
    pictures = {"type": "IMAGE", "imageKeys": [PICTURES], "step": step, "showRunParams": False}
    mse_against_samples = {"type": "SCATTER", "xaxis": _axis(VAL_MSE), "yaxis": _axis(SAMPLE_AUC)}
    parameters = {
        "type": "PARALLEL",
        "selectedParams": list(searched),
        "selectedMetrics": [BEST_OBJECTIVE],
        "showAllRuns": False,
    }
    contents: dict[str, tuple[int, list[dict[str, Any]]]] = {  # with the number of charts in a row
        "Samples": (1, [pictures]),
        "What decides, and the MSE, which does not (lower is better)": (2, bars),
        "MSE against samples": (1, [mse_against_samples]),
        "Learning curves": (3, curves),
        "Parameters": (1, [parameters]),
    }
    sections, charts = list[dict[str, Any]](), list[dict[str, Any]]()
    kept = {"deleted": False, "isGenerated": False}
    for name, (columns, members) in contents.items():
        section = f"section-{len(sections)}"
        height = {"cardHeight": _PICTURES_HEIGHT} if members == [pictures] else {}
        shown = {"display": True, "isReordered": True, "columns": columns, **height}
        sections.append({"uuid": section, "name": name, **shown, **kept})
        for chart in members:
            place = {"uuid": f"chart-{len(charts)}", "metricSectionId": section}
            charts.append({**place, "runsCountToCompare": 20, **kept, **chart})
    return charts, sections


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}
