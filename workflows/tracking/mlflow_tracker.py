"""Log runs to MLflow: one run per training; per sweep a parent run with a child run per trial.

Only the driver talks to MLflow, never workers or trials. Entries are kept in the run's folder (`outbox`) and
sent by one background thread (`send_queue`, `mlflow_sender`), so a slow server delays nothing; those that
could not be sent are tried again until the server is back, or when the run is resumed, or by `ray-ddpm sync`.
"""

import shlex
import shutil
import tempfile
import time
import weakref
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from PIL import Image

from diffusion.data.dataset import Dataset
from diffusion.errors import InputError
from diffusion.files import os_reason, part_name, path_kind, user_path
from diffusion.metrics import OBJECTIVE, TEST_MSE, VAL_MSE, is_detail
from workflows.environment import wants_system_metrics
from workflows.redaction import redact
from workflows.status import Status, TrialStatus
from workflows.tracking import entries
from workflows.tracking.database_server import is_database_server
from workflows.tracking.dataset_input import dataset_fields
from workflows.tracking.local_database import check_writable, ensure_database, store_uri
from workflows.tracking.mlflow_sender import FOLDER_TAG, MlflowSender
from workflows.tracking.mlflow_store import cannot_be_used, open_store, unusable
from workflows.tracking.outbox import FOLDER, Outbox
from workflows.tracking.prepared_view import run_page, runs_page
from workflows.tracking.send_queue import Refused, SendQueue
from workflows.tracking.system_metrics import SystemMetrics
from workflows.tracking.tracker import PublishedModel, Registration, RegistrationError, Tracker

_MAX_TAG = 8000  # characters that a tag may have in MLflow, which cuts longer ones with a warning
# Versions of MLflow that know it open the experiment in the mode for models that are trained.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


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
        unsent: number of entries that could not be sent yet, 0 before `close`.
        has_test_metrics: whether a resumed run already has its metrics on the test split.

    Raises:
        InputError: the store cannot be reached or used.
    """

    name = "MLflow"

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        ensure_database(uri)
        self.client = open_store(uri)
        with unusable(uri):
            self.experiment_id = self._find_or_create_experiment(experiment)
        self.has_test_metrics = False
        self._sender = MlflowSender(self.client, uri, self.experiment_id)
        self._logged: dict[str | None, set[int]] = {}
        self._values: dict[str | None, dict[str, float]] = {}  # newest at step 0, by run
        self._params: dict[str, str] = {}  # of the run
        self._is_sweep = self._is_finished = False
        self._system_metrics: SystemMetrics | None = None
        # Until `keep_entries` says where the run is.
        scratch = Path(tempfile.gettempdir(), part_name("ray-ddpm"))
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        self._outbox, self._queue = self._open_outbox(scratch)
        self.run_id = ""
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
        check_writable(uri)
        if may_create:
            ensure_database(uri)
        if may_create or not uri.startswith("sqlite:"):
            open_store(uri)

    @property
    def location(self) -> str:
        """URI of the store, without its password."""
        return redact(self.uri)

    def location_hint(self) -> str:
        """Return the command that shows the runs of a database, or the URL of this run on a server."""
        if self.uri.startswith("sqlite:") or is_database_server(self.uri):
            is_default = self.uri == self.resolve(store_uri(None))
            flag = "      " if is_default else f" --tracking-uri {shlex.quote(self.location)}"
            return f"python -m workflows.ui{flag}  # every run in MLflow"
        page = (
            runs_page(self.experiment_id, self.run_id)
            if self._is_sweep
            else run_page(self.experiment_id, self.run_id)
        )
        return f"{self.location.rstrip('/')}{page if self.run_id else runs_page(self.experiment_id)}"

    @property
    def refused(self) -> Sequence[str]:
        """Why the store refused entries, one line each: they could never be sent."""
        return self._queue.refused

    def keep_entries(self, folder: Path) -> None:
        """Keep what is to be sent in `tracking/` of the run's folder, until a finished run is sent whole."""
        self._queue.abandon()
        self._outbox, self._queue = self._open_outbox(folder)

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

        Raises:
            InputError: the store cannot be used.
        """
        self._outbox.clear()  # of such a session
        self._params = _texts(params)
        start = entries.Start(name, self._params, folder, _now(), reuse)
        with unusable(self.uri):
            self._sender.send(start)
        self._keep_start(start)
        self.run_id = self._sender.run_id
        self._start_system_metrics()
        return self.run_id

    def resume(self, run_id: str) -> set[int]:
        """Continue an existing run, and return the steps for which it has metrics.

        What an earlier session could not send is sent first. If the store has lost the run, all that was kept
        is sent to a new one.

        Raises:
            InputError: the store has no such run and nothing was kept, or the store cannot be used.
        """
        self.send_kept(run_id)
        self._is_finished = False
        if not self._queue.flush():
            self._queue.abandon()
            raise InputError(cannot_be_used(self.uri, "it does not take what is to be sent"))
        run_id = self.run_id = self._sender.run_id
        with unusable(self.uri):
            self.client.set_terminated(run_id, "RUNNING")
            run = self.client.get_run(run_id)
            self._params, self._values[None] = dict(run.data.params), dict(run.data.metrics)
            history = self.client.get_metric_history(run_id, VAL_MSE)
            self.has_test_metrics = bool(self.client.get_metric_history(run_id, TEST_MSE))
        if not self._outbox.num_entries:  # of a finished run, which is extended
            name, folder, began = run.info.run_name, run.data.tags.get(FOLDER_TAG), run.info.start_time
            self._keep_start(entries.Start(name, self._params, folder, began))
        self._start_system_metrics()
        return {metric.step for metric in history}

    def send_kept(self, run_id: str, *, to_other_store: bool = False) -> None:
        """Queue what earlier sessions of a run could not send, or all that they kept if the run is lost.

        Args:
            run_id: id of the run.
            to_other_store: whether it may be sent to another store than the one in which it was started.

        Raises:
            InputError: the store has no such run and nothing was kept, or the store cannot be used.
        """
        kept = self._outbox.entries()
        with unusable(self.uri):
            is_there = bool(run_id) and self._sender.find(run_id)
        if not is_there:
            first = kept[0] if kept else None
            if not isinstance(first, entries.Start) or not (first.store == self.location or to_other_store):
                raise InputError(
                    f"--tracking-uri {redact(self.uri)} has no run {run_id}: give the store in which it was "
                    "started"
                )
            self._outbox.mark_done(0)
        for entry in kept[self._outbox.num_done :]:
            self._queue.put(entry, is_kept=False)
        last = kept[-1] if kept else None
        self._is_finished = isinstance(last, entries.End) and last.status == "finished"

    def resume_sweep(self, run_id: str, trial_ids: Container[str]) -> set[str]:
        """Continue an existing sweep's run; delete the child runs of unknown trials and duplicates.

        Args:
            run_id: id of the sweep's parent run.
            trial_ids: ids of the trials that the sweep has recorded.

        Returns:
            Ids of the trials whose child runs have ended, and are therefore complete.

        Raises:
            InputError: as `resume`.
        """
        self.resume(run_id)
        children: dict[str, str] = {}
        ended = set()
        with unusable(self.uri):
            for run in self._sender.child_runs():
                trial_id, child = run.data.tags["trial_id"], run.info.run_id
                if trial_id not in trial_ids or trial_id in children:
                    self.client.delete_run(child)
                    continue
                children[trial_id] = child
                history = self.client.get_metric_history(child, OBJECTIVE)
                self._logged[trial_id] = {metric.step for metric in history}
                self._values[trial_id] = dict(run.data.metrics)
                if run.info.status != "RUNNING":
                    ended.add(trial_id)
        self._sender.children = children
        return ended

    def start_trial(self, trial_id: str, params: dict[str, Any]) -> None:
        """Queue the start of a trial's child run, which is created if missing.

        It has the parameters in which it differs from the sweep's run, which has the others: MLflow writes
        all parameters of a run over its pictures.
        """
        text = _texts(params)
        own = {name: value for name, value in text.items() if self._params.get(name) != value}
        self._queue.put(entries.StartTrial(trial_id, own, _now()))

    def log(self, metrics: dict[str, float], step: int, trial_id: str | None = None) -> None:
        """Queue metrics of the run or of a trial, unless an earlier session has sent those of this step.

        At step 0 are what belongs to no update, such as a champion's metrics: an earlier session of a sweep
        may have sent the same or other values, and only the others are sent again.

        Errors, floors and counts go to the table `metrics.json` only, in which they stand beside the metrics
        that they belong to: MLflow would draw a chart of each.
        """
        if step in self._logged.get(trial_id, ()):
            return
        values = {name: float(value) for name, value in metrics.items()}
        drawn = {name: value for name, value in values.items() if not is_detail(name)}
        if len(drawn) < len(values):  # first, since the steps of metrics tell what has been sent
            self._queue.put(entries.Table(trial_id, values))
        sent = self._values.setdefault(trial_id, {}) if step == 0 else {}
        new = {name: value for name, value in drawn.items() if sent.get(name) != value}
        sent.update(new)
        if new:
            self._queue.put(entries.Metrics(trial_id, new, step, _now()))

    def log_dataset(self, dataset: Dataset) -> None:
        """Queue which data the run uses, and every trial that starts after this."""
        self._queue.put(entries.Data(**dataset_fields(dataset)))

    def show_trials(
        self, searched: Sequence[str], num_updates: int, picks: Mapping[str, str] | None = None
    ) -> None:
        """Queue the prepared view of a sweep's trials, and the names of those that were picked."""
        self._is_sweep = True
        decided = picks is not None
        self._queue.put(entries.View(list(searched), num_updates, decided, _now()))
        if picks is not None:
            self._queue.put(entries.Picks(dict(picks)))

    def log_picture(self, picture: Image.Image, step: int, trial_id: str | None = None) -> None:
        """Queue a picture of samples, of the run or of a trial."""
        try:
            file = self._stored(self._outbox.keep_picture(picture))
        except OSError as error:  # a full disk
            self._queue.refused.append(f"picture of step {step}: {os_reason(error)}")
            return
        self._queue.put(entries.Picture(trial_id, file, step, _now()))

    def end_trial(self, trial_id: str, status: TrialStatus, reason: str) -> None:
        """Queue the end of a trial's child run, with its status and reason as in trials.csv."""
        self._queue.put(entries.EndTrial(trial_id, status, reason, _now()))

    def tag(self, tags: dict[str, str], trial_id: str | None = None) -> None:
        """Queue tags of the run or of a trial."""
        shortened = {key: _shortened(value, " ...") for key, value in tags.items()}
        self._queue.put(entries.Tags(trial_id, shortened))

    def describe(self, markdown: str, trial_id: str | None = None) -> None:
        """Queue the description shown on the page of the run or of a trial."""
        rest = "\n\n... the whole page is model_card.md, among the artifacts."
        self.tag({MLFLOW_RUN_NOTE: _shortened(markdown, rest)}, trial_id)

    def log_files(self, folder: Path, artifact_path: str) -> None:
        """Queue the upload of a folder, which must exist until `flush` or `close` returns."""
        self._queue.put(entries.Folder(self._stored(folder), artifact_path))

    def log_file(self, path: Path) -> None:
        """Queue the upload of a file, which must exist until `flush` or `close` returns."""
        self._queue.put(entries.File(self._stored(path)))

    def flush(self) -> None:
        """Wait until the queue is sent, while the store takes it; call it before deleting queued files."""
        self._queue.flush()

    def log_model(self, model: PublishedModel) -> None:
        """Log a model to the run, see `workflows.tracking.registry.log_model`, after what is queued.

        Raises:
            RegistrationError: the store refused the model, or does not take it within 30 seconds.
        """
        file, params, metrics = self._stored(model.sampler_file), _texts(model.params), _floats(model.metrics)
        self._result_of(self._queue.put(entries.Model(file, params, metrics)))
        self._queue.put(entries.ModelMetrics(metrics))

    def register(
        self, name: str, model: PublishedModel, tags: Mapping[str, object], *, may_promote: bool
    ) -> Registration:
        """Register a model as a new version after what is queued, see `workflows.tracking.registry`.

        Raises:
            RegistrationError: the store refused the model, or does not take it within 30 seconds.
        """
        file, params, metrics = self._stored(model.sampler_file), _texts(model.params), _floats(model.metrics)
        registration = self._queue.put(
            entries.RegisteredModel(name, file, params, metrics, dict(tags), may_promote)
        )
        self._queue.put(entries.ModelMetrics(metrics))
        found: Registration = self._result_of(registration)
        return found

    def close(self, status: Status | None) -> None:
        """End the run and wait until the queue is sent, while the store takes it; then give up on the rest.

        Args:
            status: status of the run; None leaves it as it is.
        """
        if self._system_metrics is not None:
            self._system_metrics.stop()
        self._is_finished = self._is_finished or status == "finished"
        if status is not None:
            self._queue.put(entries.End(status, _now()))
        try:
            self._queue.close()
        finally:  # also if the user does not want to wait
            self.unsent = self._queue.abandon()
            self.run_id = self._sender.run_id
            if self._is_finished and not self.unsent:
                self._outbox.delete()
            else:
                self._outbox.sync()

    def _keep_start(self, start: entries.Start) -> None:
        """Keep how the run was started, which it has been."""
        self._outbox.append(replace(start, reuse=True, store=self.location))
        self._outbox.mark_done(1)

    def _open_outbox(self, folder: Path) -> tuple[Outbox, SendQueue]:
        self._sender.folder = folder
        outbox = Outbox(folder / FOLDER)
        return outbox, SendQueue(self._sender.send, outbox)

    def _result_of(self, sending: "Future[Any]") -> Any:
        """What the sender returned.

        Raises:
            RegistrationError: the store refused the entry, or does not take it within 30 seconds.
        """
        if not self._queue.wait_for(sending):
            raise RegistrationError("the store does not take it now")
        try:
            return sending.result()
        except Refused as error:
            raise RegistrationError(redact(str(error))) from error

    def _stored(self, path: Path) -> str:
        """How an entry names a path: relative to the run's folder if it is in it."""
        folder = self._sender.folder
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path.absolute())

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


def _texts(params: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in params.items()}


def _floats(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _now() -> int:
    return int(time.time() * 1000)
