"""Sends entries of an outbox to MLflow.

`MlflowTracker` says what is to be logged and when; here is what that means in calls of MLflow's client, now
or when a store is back. Sending an entry twice changes nothing.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy.exc
from mlflow import MlflowClient
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_LOGGED_ARTIFACTS,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
)
from PIL import Image

from diffusion.metrics import BEST_OBJECTIVE
from workflows.redaction import redact
from workflows.status import Status, TrialStatus
from workflows.tracking import entries
from workflows.tracking.entries import ENTRIES, Entry
from workflows.tracking.metric_table import metric_table, table_metrics
from workflows.tracking.prepared_view import COLOUR, PICK, PICK_COLOURS, PICTURES, trials_view, view_tag
from workflows.tracking.send_queue import Refused
from workflows.tracking.tracker import PublishedModel, Registration, RegistrationError

# Codes of errors that time can mend. MLflow's client gives the first one to requests that reach no server,
# and its database store the second one to a database that is locked, full, or replaced.
_TRANSIENT = {
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "CANCELLED",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
}
# MLflow calls every other error of a database a bad request, by which its name stands.
_BROKEN_DATABASE = ("DatabaseError)", "OperationalError)", "InterfaceError)")
_MISSING = ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)
FOLDER_TAG = "folder"  # of a run, with the folder of its files
_METRICS_FILE = "metrics.json"  # table of all metrics, with errors, floors and counts
_RUN_STATUS: dict[Status, str] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "running": "RUNNING",
}
_TRIAL_STATUS: dict[TrialStatus, str] = {"finished": "FINISHED", "stopped": "FINISHED", "pruned": "KILLED"}


class MlflowSender:
    """Sends entries of one run to a store; keeps which of MLflow's runs belong to it.

    Args:
        client: client of the store.
        uri: URI of the store.
        experiment_id: id of the experiment.

    Attributes:
        folder: folder to which paths in entries are relative.
        run_id: id of the run; empty before it is started or found.
    """

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str) -> None:
        self.client, self.uri, self.experiment_id = client, uri, experiment_id
        self.folder = Path()
        self.run_id = ""
        self._children: dict[str, str] | None = {}  # None: not looked up yet
        self._metrics: dict[str | None, dict[str, float]] = {}  # newest value of each
        self._data: list[DatasetInput] = []
        self._model_id = ""
        self._senders: dict[type[Entry], Callable[[Any], Any]] = {
            entries.Start: self._start,
            entries.End: self._end,
            entries.StartTrial: self._start_trial,
            entries.EndTrial: self._end_trial,
            entries.Metrics: self._send_metrics,
            entries.Table: self._send_table,
            entries.Data: self._send_data,
            entries.View: self._send_view,
            entries.Picks: self._send_picks,
            entries.Picture: self._send_picture,
            entries.Tags: self._send_tags,
            entries.Folder: self._send_folder,
            entries.File: self._send_file,
            entries.Model: self._send_model,
            entries.RegisteredModel: self._register_model,
            entries.ModelMetrics: self._link_metrics,
        }

    def send(self, entry: Entry) -> Any:
        """Send an entry.

        Raises:
            Refused: it can never succeed.
            Exception: it should be tried again.
        """
        try:
            return self._senders[type(entry)](entry)
        except Refused:
            raise
        except Exception as error:
            cause = error.__cause__ if isinstance(error, RegistrationError) and error.__cause__ else error
            if may_pass(cause) or (_is_missing(cause) and not self._has_run()):
                raise
            reason = redact(str(error).split("\n")[0])[:200] or type(error).__name__
            raise Refused(f"{ENTRIES.name(entry).replace('_', ' ')}: {reason}") from error

    @property
    def children(self) -> dict[str, str]:
        """Ids of the runs of trials, by trial id; looked up in the store when they are first needed."""
        if self._children is None:
            found: dict[str, str] = {}
            for run in self.child_runs():
                found.setdefault(run.data.tags["trial_id"], run.info.run_id)
            self._children = found
        return self._children

    @children.setter
    def children(self, children: dict[str, str]) -> None:
        self._children = children

    def child_runs(self) -> list[Run]:
        """The runs of trials that the store has, oldest first."""
        return runs_with_tag(self.client, self.experiment_id, MLFLOW_PARENT_RUN_ID, self.run_id)

    def find(self, run_id: str) -> bool:
        """Take over an existing run and those of its trials, and return whether it exists.

        Raises:
            MlflowException: the store cannot be used.
        """
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if may_pass(error):
                raise
            return False
        if run.info.lifecycle_stage != "active":
            return False
        self.run_id, self._children = run_id, None
        return True

    def _has_run(self) -> bool:
        """Whether the store still has the run: it may have been replaced by another one."""
        try:
            return bool(self.run_id) and self.client.get_run(self.run_id) is not None
        except MlflowException:
            return False

    def _start(self, entry: entries.Start) -> None:
        folder, runs = entry.folder, list[Run]()
        if folder and entry.reuse:
            runs = runs_with_tag(self.client, self.experiment_id, FOLDER_TAG, folder)
        run = next((run for run in runs if run.info.status == "RUNNING"), None)
        if run is None:
            tags = None if folder is None else {FOLDER_TAG: folder}
            run = self.client.create_run(self.experiment_id, entry.time, tags, entry.name)
        self.run_id = run.info.run_id
        self._log_params(self.run_id, entry.params)

    def _end(self, entry: entries.End) -> None:
        self.client.set_terminated(self.run_id, _RUN_STATUS[entry.status], entry.time)

    def _start_trial(self, entry: entries.StartTrial) -> None:
        trial_id = entry.trial_id
        if trial_id not in self.children:
            tags = {MLFLOW_PARENT_RUN_ID: self.run_id, MLFLOW_RUN_NAME: trial_id, "trial_id": trial_id}
            run = self.client.create_run(self.experiment_id, entry.time, tags)
            self.children[trial_id] = run.info.run_id
        else:
            self.client.set_terminated(self.children[trial_id], "RUNNING")
        if self._data:
            with _if_supported():
                self.client.log_inputs(self.children[trial_id], datasets=self._data)
        self._log_params(self.children[trial_id], entry.params)

    def _end_trial(self, entry: entries.EndTrial) -> None:
        run_id = self.children[entry.trial_id]
        self.client.set_tag(run_id, "status", entry.status)
        if entry.reason:
            self.client.set_tag(run_id, "reason", entry.reason[:500])
        self.client.set_terminated(run_id, _TRIAL_STATUS.get(entry.status, "FAILED"), entry.time)

    def _send_metrics(self, entry: entries.Metrics) -> None:
        # The objective first: MLflow's page that compares runs opens on a run's first metric.
        ordered = sorted(entry.metrics, key=lambda name: name != BEST_OBJECTIVE)
        batch = [Metric(name, entry.metrics[name], entry.time, entry.step) for name in ordered]
        self.client.log_batch(self._id(entry.trial_id), metrics=batch)

    def _send_table(self, entry: entries.Table) -> None:
        """Send the table of a run's metrics, with these in it."""
        trial_id = entry.trial_id
        run_id, is_first = self._id(trial_id), trial_id not in self._metrics
        known = self._sent_table(run_id) if is_first else self._metrics[trial_id]
        known = {**known, **entry.metrics}
        self.client.log_text(run_id, json.dumps(metric_table(known)), _METRICS_FILE)
        if is_first:
            tables = json.dumps([{"path": _METRICS_FILE, "type": "table"}])
            self.client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, tables)
        self._metrics[trial_id] = known

    def _sent_table(self, run_id: str) -> dict[str, float]:
        """Metrics in the table that an earlier session sent; none without a table."""
        if _METRICS_FILE not in {each.path for each in self.client.list_artifacts(run_id)}:
            return {}
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(self.client.download_artifacts(run_id, _METRICS_FILE, scratch))
            return table_metrics(json.loads(path.read_text()))

    def _send_data(self, entry: entries.Data) -> None:
        context = InputTag(MLFLOW_DATASET_CONTEXT, entry.context)
        self._data = [DatasetInput(DatasetEntity(**entry.dataset), [context])]
        with _if_supported():
            self.client.log_inputs(self.run_id, datasets=self._data)

    def _send_view(self, entry: entries.View) -> None:
        name = self.client.get_run(self.run_id).info.run_name
        view = trials_view(
            name, self.run_id, entry.searched, entry.num_updates, entry.time, decided=entry.decided
        )
        with _if_supported():  # an older server may refuse a long tag
            self.client.set_experiment_tag(self.experiment_id, view_tag(self.run_id), view)

    def _send_picks(self, entry: entries.Picks) -> None:
        colours = dict(zip(entry.picks, PICK_COLOURS, strict=False))
        for run in self.child_runs():
            run_id, tags = run.info.run_id, run.data.tags
            trial_id = tags["trial_id"]
            pick = entry.picks.get(trial_id, "")
            if pick == tags.get(PICK, ""):
                continue
            self.client.update_run(run_id, name=f"{trial_id} ({pick})" if pick else trial_id)
            if trial_id in colours:
                self.client.set_tag(run_id, COLOUR, colours[trial_id])
            elif COLOUR in tags:  # of a sweep that has been extended
                self.client.delete_tag(run_id, COLOUR)
            self.client.set_tag(run_id, PICK, pick)

    def _send_picture(self, entry: entries.Picture) -> None:
        with Image.open(self._existing(entry.file)) as picture:
            self.client.log_image(
                self._id(entry.trial_id),
                picture,
                key=PICTURES,
                step=entry.step,
                timestamp=entry.time,
                synchronous=True,
            )

    def _send_tags(self, entry: entries.Tags) -> None:
        for key, value in entry.tags.items():
            self.client.set_tag(self._id(entry.trial_id), key, value)

    def _send_folder(self, entry: entries.Folder) -> None:
        self.client.log_artifacts(self.run_id, str(self._existing(entry.folder)), entry.artifact_path)

    def _send_file(self, entry: entries.File) -> None:
        self.client.log_artifact(self.run_id, str(self._existing(entry.file)))

    def _send_model(self, entry: entries.Model) -> None:
        from workflows.tracking import registry  # loads pandas, which trainings do not need before their end

        model = PublishedModel(self._existing(entry.file), entry.params, entry.metrics)
        self._model_id = registry.log_only(self.client, self.uri, self.run_id, model)

    def _register_model(self, entry: entries.RegisteredModel) -> Registration:
        from workflows.tracking import registry

        model = PublishedModel(self._existing(entry.file), entry.params, entry.metrics)
        version, is_champion, self._model_id = registry.register(
            self.client,
            self.uri,
            self.run_id,
            entry.name,
            model,
            entry.tags,
            may_promote=entry.may_promote,
        )
        return Registration(version, is_champion)

    def _link_metrics(self, entry: entries.ModelMetrics) -> None:
        """Send that the run's newest model has these metrics, which the run has been sent before."""
        from workflows.tracking import registry

        model_id = self._model_id or registry.newest_model(self.client, self.experiment_id, self.run_id)
        dataset = self._data[0].dataset if self._data else None
        if model_id:
            with _if_supported():
                registry.link_metrics(self.client, self.run_id, model_id, entry.metrics, dataset)

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        self.client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])

    def _id(self, trial_id: str | None) -> str:
        return self.run_id if trial_id is None else self.children[trial_id]

    def _existing(self, path: str) -> Path:
        """A file or folder to upload.

        Raises:
            Refused: somebody has removed it.
        """
        found = self.folder / path
        if not found.exists():
            raise Refused(f"{found} does not exist any more")
        return found


def may_pass(error: BaseException) -> bool:
    """Whether time can mend an error of a store: it cannot be reached, is locked, full or damaged."""
    if isinstance(error, MlflowException):
        text = str(error)
        return error.error_code in _TRANSIENT or any(name in text for name in _BROKEN_DATABASE)
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        return not isinstance(error, (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.DataError))
    return isinstance(error, OSError)


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, MlflowException) and error.error_code == _MISSING


def runs_with_tag(client: MlflowClient, experiment_id: str, tag: str, value: str) -> list[Run]:
    """An experiment's runs with a tag, oldest first."""
    runs: list[Run] = []
    token: str | None = ""
    while token is not None:
        page = client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", page_token=token or None)
        runs, token = [*runs, *page], page.token or None
    return sorted(runs, key=lambda run: run.info.start_time)


@contextmanager
def _if_supported() -> Iterator[None]:
    """Do without what only pages are made of, if the server refuses it: it may be an older one."""
    try:
        yield
    except MlflowException as error:
        if may_pass(error):
            raise
