"""Log runs to MLflow: one run per training; per sweep a parent run with a child run per trial.

Only the driver talks to MLflow, never workers or trials. Entries are queued and sent by one background
thread, so a slow server delays nothing, and entries that could not be sent are retried until the server
is back.
"""

import json
import tempfile
import textwrap
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import (
    MLFLOW_LOGGED_ARTIFACTS,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
)
from PIL import Image

from diffusion.data.dataset import Dataset
from diffusion.errors import InputError
from diffusion.files import path_kind, user_path
from diffusion.metrics import BEST_OBJECTIVE, OBJECTIVE, TEST_MSE, VAL_MSE, is_detail
from workflows.environment import set_mlflow_requests, wants_system_metrics
from workflows.redaction import redact
from workflows.status import Status, TrialStatus
from workflows.tracking.dataset_input import dataset_input
from workflows.tracking.metric_table import metric_table, table_metrics
from workflows.tracking.prepared_view import (
    COLOUR,
    PICK,
    PICK_COLOURS,
    PICTURES,
    run_page,
    runs_page,
    trials_view,
    view_tag,
)
from workflows.tracking.send_queue import TRANSIENT_ERRORS, SendQueue
from workflows.tracking.system_metrics import SystemMetrics
from workflows.tracking.tracker import PublishedModel, Registration, RegistrationError, Tracker

_MAX_TAG = 8000  # characters that a tag may have in MLflow, which cuts longer ones with a warning
_CONNECT_TIMEOUT = 4  # seconds
_REQUEST_TIMEOUT = 30  # seconds; uploads take longer than a first response
_FOLDER_TAG = "folder"
_METRICS_FILE = "metrics.json"  # table of all metrics, with errors, floors and counts
# Versions of MLflow that know it open the experiment in the mode for models that are trained.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_RUN_STATUS: dict[Status, str] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "running": "RUNNING",
}
_TRIAL_STATUS: dict[TrialStatus, str] = {"finished": "FINISHED", "stopped": "FINISHED", "pruned": "KILLED"}


def open_store(uri: str) -> MlflowClient:
    """Connect to a store, or fail within seconds.

    Raises:
        InputError: the store cannot be reached or used.
    """
    # The tracker retries by itself: MLflow's own retries would take minutes.
    set_mlflow_requests(_CONNECT_TIMEOUT)
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # each kind of store raises its own exceptions
        reason = textwrap.shorten(redact(str(error).splitlines()[0]), 160, placeholder=" ...")
        raise InputError(
            f"--tracking-uri {redact(uri)} cannot be used ({reason}): fix that, or give another URI"
        ) from error
    set_mlflow_requests(_REQUEST_TIMEOUT)
    return client


def runs_with_tag(client: MlflowClient, experiment_id: str, tag: str, value: str) -> list[Run]:
    """An experiment's runs with a tag, oldest first."""
    runs: list[Run] = []
    token: str | None = ""
    while token is not None:
        page = client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", page_token=token or None)
        runs, token = [*runs, *page], page.token or None
    return sorted(runs, key=lambda run: run.info.start_time)


def _shortened(text: str, end: str) -> str:
    """The text, or as many of its whole lines as a tag may have with `end` after them."""
    if len(text) <= _MAX_TAG:
        return text
    shown = text[: _MAX_TAG - len(end)]
    return (shown.rpartition("\n")[0] or shown) + end


class MlflowTracker(Tracker):
    """Logs one run to MLflow: a training, or a sweep with a child run per trial.

    See `workflows.tracking.tracker.Tracker` for what each method of the interface is for.

    Args:
        uri: URI of the store, as returned by `resolve`.
        experiment: name of the experiment, which is created if missing.

    Attributes:
        name: name of the tracker in messages.
        uri: URI of the store.
        client: MLflow client of the store.
        experiment_id: id of the experiment.
        run_id: id of the run, empty before `start` or `resume`.
        unsent: number of entries that could not be sent, 0 before `close`.
        has_test_metrics: whether a resumed run already has its metrics on the test split.

    Raises:
        InputError: the store cannot be reached or used.
    """

    name = "MLflow"

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        self.client = open_store(uri)
        self.experiment_id = self._find_or_create_experiment(experiment)
        self.run_id = ""
        self.has_test_metrics = False
        self._children: dict[str, str] = {}
        self._logged: dict[str | None, set[int]] = {}
        self._metrics: dict[str | None, dict[str, float]] = {}  # newest value of each
        self._data: list[DatasetInput] = []
        self._params: dict[str, str] = {}  # of the run
        self._is_sweep = False
        self._system_metrics: SystemMetrics | None = None
        self._jobs = SendQueue()
        self.unsent = 0

    @classmethod
    def resolve(cls, uri: str) -> str:
        """Return the URI of a store, with sqlite paths made absolute.

        Raises:
            InputError: the URI is a plain folder, which MLflow no longer supports, or a database file that
                cannot exist.
        """
        if uri.startswith("sqlite:///"):
            path = user_path(uri.removeprefix("sqlite:///"))
            kind = path_kind(path)
            if kind not in ("file", None) or path_kind(path.parent) != "folder":
                problem = "is no file" if kind else f"is in {path.parent}, which does not exist"
                raise InputError(f"--tracking-uri {uri}: {path} {problem}; give a file in an existing folder")
            return f"sqlite:///{path}"
        if "://" not in uri and uri != "databricks" or uri.startswith("file:"):
            raise InputError(
                f"--tracking-uri {uri}: MLflow needs a server or a database, such as http://127.0.0.1:5000 "
                "or sqlite:///mlflow.db"
            )
        return uri

    @classmethod
    def check_store(cls, uri: str, *, may_create: bool) -> None:
        """Check within seconds that a store can be used; connecting to an sqlite store would create it.

        Raises:
            InputError: the store cannot be reached or used.
        """
        if may_create or not uri.startswith("sqlite:"):
            open_store(uri)

    @property
    def location(self) -> str:
        """URI of the store, without its password."""
        return redact(self.uri)

    def location_hint(self) -> str:
        """Return the command that shows the runs of a local store, or the URL of this run on a server."""
        if self.uri.startswith("sqlite:"):
            return "python -m workflows.ui        # every run in MLflow"
        page = (
            runs_page(self.experiment_id, self.run_id)
            if self._is_sweep
            else run_page(self.experiment_id, self.run_id)
        )
        return f"{self.location.rstrip('/')}{page if self.run_id else runs_page(self.experiment_id)}"

    def start(
        self, name: str, params: dict[str, Any], folder: str | None = None, *, reuse: bool = False
    ) -> str:
        """Create the run and return its id.

        Args:
            name: name of the run.
            params: parameters by dotted name.
            folder: folder of the run.
            reuse: whether to continue an unfinished run with the same folder, if there is one. An earlier
                session may have been killed after it created the run, but before it wrote to the folder.
        """
        tags = None if folder is None else {_FOLDER_TAG: folder}
        runs = runs_with_tag(self.client, self.experiment_id, _FOLDER_TAG, folder) if folder and reuse else []
        unfinished = [run for run in runs if run.info.status == "RUNNING"]
        run = (
            unfinished[0]
            if unfinished
            else self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        )
        self.run_id = run.info.run_id
        self._params = {name: str(value) for name, value in params.items()}
        self._log_params(self.run_id, self._params)
        self._start_system_metrics()
        return self.run_id

    def resume(self, run_id: str) -> set[int]:
        """Continue an existing run, and return the steps for which it has metrics.

        Raises:
            InputError: the store has no such run.
        """
        try:
            self.client.set_terminated(run_id, "RUNNING")
            self._params = dict(self.client.get_run(run_id).data.params)
            history = self.client.get_metric_history(run_id, VAL_MSE)
            self.has_test_metrics = bool(self.client.get_metric_history(run_id, TEST_MSE))
        except MlflowException as error:
            raise InputError(
                f"--tracking-uri {redact(self.uri)} has no run {run_id}, which --resume needs: give the "
                "store in which it was started"
            ) from error
        self.run_id = run_id
        self._start_system_metrics()
        return {metric.step for metric in history}

    def resume_sweep(self, run_id: str, trial_ids: Container[str]) -> set[str]:
        """Continue an existing sweep's run; delete the child runs of unknown trials and duplicates.

        Args:
            run_id: id of the sweep's parent run.
            trial_ids: ids of the trials that the sweep has recorded.

        Returns:
            Ids of the trials whose child runs have ended, and are therefore complete.

        Raises:
            InputError: the store has no such run.
        """
        self.resume(run_id)
        ended = set()
        for run in runs_with_tag(self.client, self.experiment_id, MLFLOW_PARENT_RUN_ID, run_id):
            trial_id, child = run.data.tags["trial_id"], run.info.run_id
            if trial_id not in trial_ids or trial_id in self._children:
                self.client.delete_run(child)
                continue
            self._children[trial_id] = child
            history = self.client.get_metric_history(child, OBJECTIVE)
            self._logged[trial_id] = {metric.step for metric in history}
            if run.info.status != "RUNNING":
                ended.add(trial_id)
        return ended

    def start_trial(self, trial_id: str, params: dict[str, Any]) -> None:
        """Queue the start of a trial's child run, which is created if missing.

        It has the parameters in which it differs from the sweep's run, which has the others: MLflow writes
        all parameters of a run over its pictures.
        """
        started = _now()
        text = {name: str(value) for name, value in params.items()}
        own = {name: value for name, value in text.items() if self._params.get(name) != value}

        def job() -> None:
            if trial_id not in self._children:
                tags = {MLFLOW_PARENT_RUN_ID: self.run_id, MLFLOW_RUN_NAME: trial_id, "trial_id": trial_id}
                run = self.client.create_run(self.experiment_id, start_time=started, tags=tags)
                self._children[trial_id] = run.info.run_id
            else:
                self.client.set_terminated(self._children[trial_id], "RUNNING")
            self._log_params(self._children[trial_id], own)
            if self._data:
                with _if_supported():
                    self.client.log_inputs(self._children[trial_id], datasets=self._data)

        self._jobs.put(job)

    def log(self, metrics: dict[str, float], step: int, trial_id: str | None = None) -> None:
        """Queue metrics of the run or of a trial, unless an earlier session has sent those of this step.

        Errors, floors and counts go to the table `metrics.json` only, in which they stand beside the metrics
        that they belong to: MLflow would draw a chart of each.
        """
        if step in self._logged.get(trial_id, ()):
            return
        batch = _metrics({name: value for name, value in metrics.items() if not is_detail(name)}, step)
        if len(batch) < len(metrics):  # first, since the steps of metrics tell what has been sent
            self._jobs.put(lambda: self._send_table(trial_id, metrics))
        self._jobs.put(lambda: self.client.log_batch(self._id(trial_id), metrics=batch))

    def _send_table(self, trial_id: str | None, metrics: Mapping[str, float]) -> None:
        """Send the table of a run's metrics, with these in it."""
        run_id, is_first = self._id(trial_id), trial_id not in self._metrics
        known = self._sent_table(run_id) if is_first else self._metrics[trial_id]
        known = {**known, **metrics}
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

    def log_dataset(self, dataset: Dataset) -> None:
        """Queue which data the run uses, and every trial that starts after this."""
        self._data = [dataset_input(dataset)]

        def job() -> None:
            with _if_supported():
                self.client.log_inputs(self.run_id, datasets=self._data)

        self._jobs.put(job)

    def show_trials(
        self, searched: Sequence[str], num_updates: int, picks: Mapping[str, str] | None = None
    ) -> None:
        """Queue the prepared view of a sweep's trials, and the names of those that were picked."""
        self._is_sweep = True
        created, colours = _now(), dict(zip(picks or (), PICK_COLOURS, strict=False))

        def show() -> None:
            name = self.client.get_run(self.run_id).info.run_name
            view = trials_view(name, self.run_id, searched, num_updates, created, decided=picks is not None)
            with _if_supported():  # an older server may refuse a long tag
                self.client.set_experiment_tag(self.experiment_id, view_tag(self.run_id), view)

        def mark() -> None:
            for run in runs_with_tag(self.client, self.experiment_id, MLFLOW_PARENT_RUN_ID, self.run_id):
                run_id, tags = run.info.run_id, run.data.tags
                trial_id = tags["trial_id"]
                pick = (picks or {}).get(trial_id, "")
                if pick == tags.get(PICK, ""):
                    continue
                self.client.update_run(run_id, name=f"{trial_id} ({pick})" if pick else trial_id)
                if trial_id in colours:
                    self.client.set_tag(run_id, COLOUR, colours[trial_id])
                elif COLOUR in tags:  # of a sweep that has been extended
                    self.client.delete_tag(run_id, COLOUR)
                self.client.set_tag(run_id, PICK, pick)

        self._jobs.put(show)
        if picks is not None:
            self._jobs.put(mark)

    def log_picture(self, picture: Image.Image, step: int, trial_id: str | None = None) -> None:
        """Queue a picture of samples, of the run or of a trial."""
        self._jobs.put(
            lambda: self.client.log_image(
                self._id(trial_id), picture.convert("RGB"), key=PICTURES, step=step, synchronous=True
            )
        )

    def end_trial(self, trial_id: str, status: TrialStatus, reason: str) -> None:
        """Queue the end of a trial's child run, with its status and reason as in trials.csv."""
        ended = _now()

        def job() -> None:
            run_id = self._children[trial_id]
            self.client.set_tag(run_id, "status", status)
            if reason:
                self.client.set_tag(run_id, "reason", reason[:500])
            self.client.set_terminated(run_id, _TRIAL_STATUS.get(status, "FAILED"), ended)

        self._jobs.put(job)

    def tag(self, tags: dict[str, str], trial_id: str | None = None) -> None:
        """Queue tags of the run or of a trial."""

        def job(key: str, value: str) -> None:
            self.client.set_tag(self._id(trial_id), key, value)

        for key, value in tags.items():
            self._jobs.put(partial(job, key, _shortened(value, " ...")))

    def describe(self, markdown: str, trial_id: str | None = None) -> None:
        """Queue the description shown on the page of the run or of a trial."""
        rest = "\n\n... the whole page is model_card.md, among the artifacts."
        self.tag({MLFLOW_RUN_NOTE: _shortened(markdown, rest)}, trial_id)

    def log_files(self, folder: Path, artifact_path: str) -> None:
        """Queue the upload of a folder, which must exist until `flush` or `close` returns."""
        self._jobs.put(lambda: self.client.log_artifacts(self.run_id, str(folder), artifact_path))

    def log_file(self, path: Path) -> None:
        """Queue the upload of a file, which must exist until `flush` or `close` returns."""
        self._jobs.put(lambda: self.client.log_artifact(self.run_id, str(path)))

    def flush(self) -> None:
        """Wait until the queue is sent, for at most 30 seconds; call it before deleting queued files."""
        self._jobs.flush()

    def log_model(self, model: PublishedModel) -> None:
        """Log a model to the run at once, see `workflows.tracking.registry.log_model`.

        Raises:
            RegistrationError: the store refused the model or cannot be reached.
        """
        from workflows.tracking import registry  # loads pandas, which trainings do not need before their end

        with _redacted_refusal():
            model_id = registry.log_only(self.client, self.uri, self.run_id, model)
        self._link_metrics(model_id, model)

    def register(
        self, name: str, model: PublishedModel, tags: Mapping[str, object], *, may_promote: bool
    ) -> Registration:
        """Register a model as a new version at once, see `workflows.tracking.registry.register`.

        Raises:
            RegistrationError: the store refused the model or cannot be reached.
        """
        from workflows.tracking import registry

        with _redacted_refusal():
            version, is_champion, model_id = registry.register(
                self.client,
                self.uri,
                self.run_id,
                name,
                model,
                tags,
                may_promote=may_promote,
            )
        self._link_metrics(model_id, model)
        return Registration(version, is_champion)

    def close(self, status: Status) -> None:
        """End the run and wait until the queue is sent, for about 30 seconds; then give up on the rest."""
        if self._system_metrics is not None:
            self._system_metrics.stop()
        self._jobs.put(lambda: self.client.set_terminated(self.run_id, _RUN_STATUS[status]))
        self.unsent = self._jobs.close(_REQUEST_TIMEOUT)

    def _find_or_create_experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            location = None
            if self.uri.startswith("sqlite:///"):
                folder = Path(self.uri.removeprefix("sqlite:///")).parent
                location = (folder / "mlartifacts" / name).as_uri()
            return self.client.create_experiment(name, location, _EXPERIMENT_TAGS)
        if experiment.lifecycle_stage != "active":
            raise InputError(
                f"--experiment {name} was deleted in MLflow: restore it there or give another name"
            )
        return experiment.experiment_id

    def _start_system_metrics(self) -> None:
        if self._system_metrics is None and wants_system_metrics():
            self._system_metrics = SystemMetrics(self.log)

    def _link_metrics(self, model_id: str, model: PublishedModel) -> None:
        """Queue that a model has the metrics of its run, which are sent before."""
        from workflows.tracking import registry

        dataset = self._data[0].dataset if self._data else None

        def job() -> None:
            with _if_supported():
                registry.link_metrics(self.client, self.run_id, model_id, model.metrics, dataset)

        self._jobs.put(job)

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        self.client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])

    def _id(self, trial_id: str | None) -> str:
        return self.run_id if trial_id is None else self._children[trial_id]


@contextmanager
def _if_supported() -> Iterator[None]:
    """Do without what only pages are made of, if the server refuses it: it may be an older one."""
    try:
        yield
    except MlflowException as error:
        if error.error_code in TRANSIENT_ERRORS:
            raise


@contextmanager
def _redacted_refusal() -> Iterator[None]:
    """Raise a RegistrationError without the passwords in its message."""
    try:
        yield
    except RegistrationError as error:
        raise RegistrationError(redact(str(error))) from error


def _metrics(metrics: dict[str, float], step: int) -> list[Metric]:
    """Metrics to log, the objective first: MLflow's page that compares runs opens on a run's first one."""
    now = _now()
    ordered = sorted(metrics, key=lambda name: name != BEST_OBJECTIVE)
    return [Metric(name, float(metrics[name]), now, step) for name in ordered]


def _now() -> int:
    return int(time.time() * 1000)
