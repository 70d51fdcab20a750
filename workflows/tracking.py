"""MLflow from the driver alone: one run a training, one parent run a sweep with one child a trial.

Workers and trials never talk to MLflow. What they report is queued here and sent by one background
thread, so a slow server delays nothing, and what a lost server missed is sent when it is back.
"""

import os
import queue
import re
import textwrap
import threading
import time
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException, RestException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from PIL import Image

from diffusion.errors import InputError

_SECONDS_TO_REACH_A_SERVER = 4
_SECONDS_A_REQUEST = 30  # an upload takes longer than a first sign of life
_SECONDS_TO_CATCH_UP = 30.0
_FOLDER_TAG = "folder"
_PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
_MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "pruned": "KILLED"}


def redact(uri: str) -> str:
    """The same URI without its password."""
    return re.sub(r"(//[^/:@]*):[^/]*@", r"\1:***@", uri)


def resolve_tracking_uri(given: str | None) -> str:
    """The store to use, with sqlite paths made absolute.

    Raises:
        InputError: a plain folder, which MLflow no longer writes to, or a database that cannot be there.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).expanduser().absolute()
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"lies in {path.parent}, which does not exist"
            raise InputError(f"--tracking-uri {uri}: {path} {what}; give a file in an existing folder")
        return f"sqlite:///{path}"
    if "://" not in uri and uri != "databricks" or uri.startswith("file:"):
        raise InputError(
            f"--tracking-uri {uri}: MLflow needs a server or a database, such as http://127.0.0.1:5000 "
            "or sqlite:///mlflow.db"
        )
    return uri


def runs_page(experiment_id: str) -> str:
    """Path of the page that shows an experiment's runs; MLflow's own start page is an empty overview."""
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def open_store(uri: str) -> MlflowClient:
    """A client of a store that answers, within seconds.

    Raises:
        InputError: the store cannot be reached or used.
    """
    # Both are read on every request. Retries are the tracker's own: MLflow's would take minutes.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(_SECONDS_TO_REACH_A_SERVER)
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # each kind of store has exceptions of its own
        reason = textwrap.shorten(redact(str(error).splitlines()[0]), 160, placeholder=" ...")
        raise InputError(
            f"--tracking-uri {redact(uri)} cannot be used ({reason}): mend that, or give another URI"
        ) from error
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(_SECONDS_A_REQUEST)
    return client


class Tracker:
    """Writes a run to MLflow: a training, or a sweep with a child run for each trial.

    Args:
        uri: of the store, resolved.
        experiment: its name; made if need be.

    Raises:
        InputError: the store cannot be reached or used.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        self.client = open_store(uri)
        self.experiment_id = self._experiment(experiment)
        self.run_id = ""
        self.tested = False  # whether a run that is resumed has its figures on the test split
        self._children: dict[str, str] = {}
        self._logged: dict[str | None, set[int]] = {}
        self._jobs: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._deadline: float | None = None
        self.unsent = 0
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def start(
        self, name: str, params: dict[str, Any], folder: str | None = None, *, again: bool = False
    ) -> str:
        """Make the run and return its id.

        Args:
            name: of the run.
            params: by dotted name.
            folder: of the run.
            again: whether it may have been made before, and killed before it wrote anything to its folder;
                then it is gone on with.
        """
        tags = None if folder is None else {_FOLDER_TAG: folder}
        begun = self._runs_with(_FOLDER_TAG, folder) if folder and again else []
        begun = [run for run in begun if run.info.status == "RUNNING"]
        run = begun[0] if begun else self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        self.run_id = run.info.run_id
        self._log_params(self.run_id, params)
        return self.run_id

    def resume(self, run_id: str) -> set[int]:
        """Go on with a run that was made before, and return the steps that its metrics hold.

        Raises:
            InputError: the store does not know it.
        """
        try:
            self.client.set_terminated(run_id, "RUNNING")
            known = self.client.get_metric_history(run_id, "val/mse")
            self.tested = bool(self.client.get_metric_history(run_id, "test/mse"))
        except MlflowException as error:
            raise InputError(
                f"--tracking-uri {redact(self.uri)} has no run {run_id}, which is to be resumed: give the "
                "store that it was started with"
            ) from error
        self.run_id = run_id
        return {metric.step for metric in known}

    def resume_sweep(self, run_id: str, trial_ids: Container[str]) -> set[str]:
        """Go on with a sweep's run; runs of trials that its records do not know are deleted.

        Returns:
            The trials whose runs are over, and so hold all that was to be sent.

        Raises:
            InputError: the store does not know it.
        """
        self.resume(run_id)
        over = set()
        for run in self._runs_with(MLFLOW_PARENT_RUN_ID, run_id):
            trial_id, child = run.data.tags["trial_id"], run.info.run_id
            if trial_id not in trial_ids or trial_id in self._children:
                self.client.delete_run(child)
                continue
            self._children[trial_id] = child
            history = self.client.get_metric_history(child, "objective")
            self._logged[trial_id] = {metric.step for metric in history}
            if run.info.status != "RUNNING":
                over.add(trial_id)
        return over

    def start_trial(self, trial_id: str, params: dict[str, Any]) -> None:
        """Queue the making of a child run."""
        started = _now()

        def job() -> None:
            if trial_id not in self._children:
                tags = {MLFLOW_PARENT_RUN_ID: self.run_id, MLFLOW_RUN_NAME: trial_id, "trial_id": trial_id}
                run = self.client.create_run(self.experiment_id, start_time=started, tags=tags)
                self._children[trial_id] = run.info.run_id
            else:
                self.client.set_terminated(self._children[trial_id], "RUNNING")
            self._log_params(self._children[trial_id], params)

        self._jobs.put(job)

    def log(self, metrics: dict[str, float], step: int, trial_id: str | None = None) -> None:
        """Queue metrics of the run, or of a trial, unless an earlier session sent those of this step."""
        if step in self._logged.get(trial_id, ()):
            return
        batch = _metrics(metrics, step)
        self._jobs.put(lambda: self.client.log_batch(self._id(trial_id), metrics=batch))

    def log_picture(self, picture: Image.Image, step: int, trial_id: str | None = None) -> None:
        """Queue a picture of samples of the run, or of a trial."""
        self._jobs.put(
            lambda: self.client.log_image(
                self._id(trial_id), picture.convert("RGB"), key="samples", step=step, synchronous=True
            )
        )

    def end_trial(self, trial_id: str, status: str, reason: str) -> None:
        """Queue the end of a child run; `status` as in trials.csv."""
        ended = _now()

        def job() -> None:
            run_id = self._children[trial_id]
            self.client.set_tag(run_id, "status", status)
            if reason:
                self.client.set_tag(run_id, "reason", reason[:500])
            self.client.set_terminated(run_id, _MLFLOW_STATUS.get(status, "FAILED"), ended)

        self._jobs.put(job)

    def tag(self, tags: dict[str, str]) -> None:
        """Queue tags of the run."""
        for key, value in tags.items():
            self._jobs.put(partial(self.client.set_tag, self.run_id, key, value))

    def describe(self, markdown: str) -> None:
        """Queue the text that stands on the run's page."""
        self.tag({MLFLOW_RUN_NOTE: markdown})

    def log_files(self, folder: Path, artifact_path: str) -> None:
        """Queue a folder of files for the run; they must stay until `close`."""
        self._jobs.put(lambda: self.client.log_artifacts(self.run_id, str(folder), artifact_path))

    def log_file(self, path: Path) -> None:
        """Queue one file for the run; it must stay until `close`."""
        self._jobs.put(lambda: self.client.log_artifact(self.run_id, str(path)))

    def flush(self) -> None:
        """Wait a while for what is queued, such as files that will not stay."""
        sent = threading.Event()
        self._jobs.put(sent.set)
        sent.wait(_SECONDS_TO_CATCH_UP)

    def close(self, status: str) -> None:
        """End the run, and wait a while for what is queued; `unsent` counts what was not sent.

        Args:
            status: MLflow's word for how it ended: FINISHED, FAILED or KILLED.
        """
        self._jobs.put(lambda: self.client.set_terminated(self.run_id, status))
        self._jobs.put(None)
        self._deadline = time.monotonic() + _SECONDS_TO_CATCH_UP
        self._thread.join(_SECONDS_TO_CATCH_UP + _SECONDS_A_REQUEST)

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            location = None
            if self.uri.startswith("sqlite:///"):
                folder = Path(self.uri.removeprefix("sqlite:///")).parent
                location = (folder / "mlartifacts" / name).as_uri()
            return self.client.create_experiment(name, artifact_location=location)
        if experiment.lifecycle_stage != "active":
            raise InputError(
                f"--experiment {name} was deleted in MLflow: restore it there or give another name"
            )
        return experiment.experiment_id

    def _runs_with(self, tag: str, value: str) -> list[Run]:
        found: list[Run] = []
        token: str | None = ""
        while token is not None:
            page = self.client.search_runs(
                [self.experiment_id], f"tags.`{tag}` = '{value}'", page_token=token or None
            )
            found, token = [*found, *page], page.token or None
        return sorted(found, key=lambda run: run.info.start_time)

    def _log_params(self, run_id: str, params: dict[str, Any]) -> None:
        self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])

    def _id(self, trial_id: str | None) -> str:
        return self.run_id if trial_id is None else self._children[trial_id]

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            while not self._done(job):
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self.unsent += 1
                    break
                time.sleep(1.0)

    def _done(self, job: Callable[[], Any]) -> bool:
        """Whether a job need not be tried again."""
        try:
            job()
        except MlflowException as error:
            if isinstance(error, RestException) and error.error_code not in _PASSING:
                self.unsent += 1  # the server understood and refused
                return True
            return False
        except OSError:
            return False
        except Exception:  # whatever it is, the entries behind it must still be sent
            self.unsent += 1
        return True


def _metrics(metrics: dict[str, float], step: int) -> list[Metric]:
    now = _now()
    return [Metric(key, float(value), now, step) for key, value in metrics.items()]


def _now() -> int:
    return int(time.time() * 1000)
