"""What `workflows.runs` does: lists, compares and deletes runs of an output folder or a bucket."""

import csv
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diffusion.errors import InputError, nearest
from diffusion.metrics import (
    AUC,
    BEST_UPDATE,
    DISTANCE,
    OBJECTIVE,
    STANDARD_ERROR,
    TEST_ELBO_WINDOW,
    TEST_SAMPLE_PREFIX,
    VAL_ELBO_WINDOW,
    VAL_MSE,
)
from workflows.cli.model_reference import MODEL_FOLDERS
from workflows.cli.tune_options import UNLIMITED
from workflows.environment import shared_location
from workflows.storage.run_record import RunRecord, read_record
from workflows.storage.storage import Storage
from workflows.terminal import hide_columns, number, waiting

_TEST_DISTANCE = TEST_SAMPLE_PREFIX + DISTANCE
# What `compare` shows without --all; the others explain these.
_MAIN_METRICS = (
    OBJECTIVE,
    BEST_UPDATE,
    VAL_ELBO_WINDOW,
    VAL_MSE,
    TEST_ELBO_WINDOW,
    _TEST_DISTANCE,
    _TEST_DISTANCE + STANDARD_ERROR,
    TEST_SAMPLE_PREFIX + AUC,
    TEST_SAMPLE_PREFIX + AUC + STANDARD_ERROR,
)


@dataclass(frozen=True)
class _Summary:
    """What the list says of a run."""

    record: RunRecord
    trials: list[str]
    metrics: Mapping[str, float]

    def cells(self) -> dict[str, str]:
        """Cells of the run's row, by heading."""
        record = self.record
        is_sweep = record.command == "tune"
        planned = record.options.get("num_trials", UNLIMITED)
        of_planned = f"/{planned}" if planned < UNLIMITED else ""
        return {
            "name": record.name,
            "kind": "sweep" if is_sweep else "training",
            "status": record.status,
            "data": Path(record.config.data.name).name,
            "trials": f"{len(self.trials)}{of_planned}" if is_sweep else "",
            OBJECTIVE: number(self.metrics.get(OBJECTIVE)),
            "test distance": number(self.metrics.get(_TEST_DISTANCE)),
            "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(record.started)),
        }


def list_runs(storage: Storage) -> int:
    """Print all runs of a folder, the newest last, and return the exit status."""
    summaries, unreadable = [], list[str]()
    for name in storage.names():
        try:
            record = read_record(storage.child(name))
        except InputError as error:
            unreadable.append(str(error))
            continue
        if record is not None:
            folder = storage.child(name)
            trials = _trial_ids(folder) if record.command == "tune" else []
            summaries.append(_Summary(record, trials, _metrics(folder, _model(folder))))
    for line in unreadable:
        print(f"warning: {line}", file=sys.stderr)
    if not summaries:
        print(f"There are no runs in {storage}.")
        return 0
    rows = [each.cells() for each in sorted(summaries, key=lambda each: each.record.started)]
    columns = {heading: [row[heading] for row in rows] for heading in rows[0]}
    _print_table(columns, [OBJECTIVE, "data", "trials", "kind", "started"])
    if any(each.record.status == "running" for each in summaries):
        print('"running" may mean that it was killed: --resume continues it')
    return 0


def _print_table(columns: dict[str, list[str]], optional: list[str], title: str = "") -> None:
    """Print a table without the optional columns for which a terminal has no room, the last ones first."""
    console = Console()
    hidden = hide_columns(columns, optional, console.width) if console.is_terminal else []
    table = Table(title=title or None, title_justify="left")
    for heading in columns:
        is_text = heading in ("name", "kind", "status", "data", "started", "parameter", "metric")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    width = console.width if console.is_terminal else 10_000
    Console(width=width, markup=False, highlight=False).print(table, soft_wrap=not console.is_terminal)
    if hidden:
        print(f"wider terminals also show {', '.join(hidden)}")


@dataclass(frozen=True)
class _Model:
    """Parameters and metrics of a run's model, or of a trial."""

    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]


def compare_runs(storage: Storage, names: Sequence[str], *, show_all: bool) -> int:
    """Print parameters and metrics of runs or trials side by side, and return the exit status.

    Args:
        storage: folder of the runs.
        names: names of runs, or RUN/trials/ID.
        show_all: also equal parameters, and all metrics.

    Raises:
        InputError: there is no such run or trial.
    """
    from diffusion.config import Config

    models = []
    for name in dict.fromkeys(names):
        run_name, _, rest = name.partition("/")
        record = _record(storage, run_name)
        folder = storage.child(run_name)
        if rest:
            trial_id = rest.removeprefix("trials/")
            tree = _json(folder, f"trials/{trial_id}/config.json")
            if tree is None:
                hint = nearest(trial_id, _trial_ids(folder)) if _trial_ids(folder) else "it has no trials"
                raise InputError(f"{name}: {run_name} has no such trial with a model; {hint}")
        else:
            tree = _model(folder)
        config = record.config if tree is None else Config.from_dict(tree["config"])
        models.append(_Model(name, config.flat(), _metrics(folder, tree)))
    _print_comparison(models, show_all=show_all)
    return 0


def _print_comparison(models: Sequence[_Model], *, show_all: bool) -> None:
    params = dict.fromkeys(name for model in models for name in model.params)
    metrics = dict.fromkeys(name for model in models for name in model.metrics)
    rows: dict[str, dict[str, list[str]]] = {
        "parameter": {
            name: cells
            for name in params
            if len(set(cells := [_shown(model.params.get(name)) for model in models])) > 1 or show_all
        },
        "metric": {
            name: [number(model.metrics.get(name)) for model in models]
            for name in (sorted(metrics) if show_all else [name for name in _MAIN_METRICS if name in metrics])
        },
    }
    console = Console()
    for heading, values in rows.items():
        if not values:
            print(f"No {heading} differs." if heading == "parameter" else "There are no metrics yet.")
            continue
        first = max(map(len, [heading, *values]))
        start = 0
        while start < len(models):  # as many models side by side as there is room for, at least one
            columns: dict[str, list[str]] = {heading: list(values)}
            width, end = first + 4, start
            while end < len(models):
                column = [row[end] for row in values.values()]
                width += 3 + max(map(len, [models[end].name, *column]))
                if console.is_terminal and width > console.width and end > start:
                    break
                columns[models[end].name] = column
                end += 1
            _print_table(columns, [])
            start = end
    if not show_all:
        print(
            "Lower metrics are better, except for best_update. --all shows equal parameters and all metrics."
        )


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def delete_runs(
    storage: Storage, names: Sequence[str], tracking_uri: str | None, *, ask: bool, with_mlflow: bool
) -> int:
    """Delete runs, and return the exit status, which is 1 if the user does not agree.

    Args:
        storage: folder of the runs.
        names: their names.
        tracking_uri: value of --tracking-uri.
        ask: whether to ask before.
        with_mlflow: whether MLflow's records are deleted, too.

    Raises:
        InputError: there is no such run, MLflow cannot be reached, or there is nobody to ask.
    """
    records = {name: _record(storage, name) for name in dict.fromkeys(names)}
    uri, found = "", dict[str, Any]()
    if with_mlflow:
        with waiting("asking MLflow"):
            from workflows.tracking.deletion import find_records
            from workflows.tracking.tracker import resolve_tracking_uri, tracker_class

            uri = resolve_tracking_uri(tracking_uri)
            tracker_class(uri).check_store(uri, may_create=False)
            missing = uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()
            for name, record in records.items():
                found[name] = None if missing else find_records(uri, record.run_id)
    for name, record in records.items():
        kind = "sweep" if record.command == "tune" else "training"
        warning = "; another process may still be writing it" if record.status == "running" else ""
        print(f"{storage}/{name}: {kind} on {Path(record.config.data.name).name}, {record.status}{warning}")
        if with_mlflow:
            in_mlflow = found[name]
            print(f"  {in_mlflow.description() if in_mlflow else f'nothing in {_redacted(uri)}'}")
    if ask and not _confirmed(len(records)):
        print("Nothing was deleted.")
        return 1
    for name in records:
        if found.get(name):
            found[name].delete()  # first: if it fails, the folder still says what to delete
        shared = shared_location(Path(name))
        if "://" in shared:  # where the trials of a sweep on a cluster keep their checkpoints
            Storage(shared.rpartition("/")[0]).delete(name)
        storage.delete(name)
        print(f"deleted {storage}/{name}")
    if any(found.values()):
        print(f"MLflow keeps deleted runs until: mlflow gc --backend-store-uri {_redacted(uri)}")
    return 0


def _confirmed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise InputError("delete asks, and there is no terminal to answer in: add --yes")
    what = "this run" if count == 1 else f"these {count} runs"
    try:
        return input(f"Delete {what}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _redacted(uri: str) -> str:
    from workflows.redaction import redact

    return redact(uri)


def _record(storage: Storage, name: str) -> RunRecord:
    """Record of a run.

    Raises:
        InputError: there is no such run.
    """
    names = storage.names()
    record = read_record(storage.child(name)) if name in names else None
    if record is None:
        runs = [each for each in names if storage.child(each).exists("run.json")]
        hint = nearest(name, runs) if runs else "there are no runs"
        raise InputError(f"{name}: no run of that name in {storage}; {hint}")
    return record


def _json(folder: Storage, path: str) -> dict[str, Any] | None:
    """A JSON file of a run, or None if it is missing, damaged or cannot be read."""
    try:
        tree = json.loads(folder.read_text(path) or "null")
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) and "config" in tree else None


def _model(folder: Storage) -> dict[str, Any] | None:
    """config.json of a run's model, or None if it has none yet."""
    trees = (_json(folder, f"{name}/config.json") for name in MODEL_FOLDERS if name)
    return next((tree for tree in trees if tree is not None), None)


def _metrics(folder: Storage, tree: Mapping[str, Any] | None) -> dict[str, float]:
    """Metrics of a model of a run; those of a champion include its trial's."""
    provenance = (tree or {}).get("provenance") or {}
    trial_id = provenance.get("trial_id")
    trial = _json(folder, f"trials/{trial_id}/config.json") if trial_id else None
    metrics = {
        **(((trial or {}).get("provenance") or {}).get("metrics") or {}),
        **(provenance.get("metrics") or {}),
    }
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}


def _trial_ids(folder: Storage) -> list[str]:
    """IDs of a sweep's trials that have ended."""
    rows = csv.DictReader(io.StringIO(folder.read_text("trials.csv") or ""))
    return [row["trial_id"] for row in rows if row.get("status") not in (None, "running")]
