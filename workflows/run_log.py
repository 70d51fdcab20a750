"""What becomes of a training's events: MLflow, the terminal, and the record to resume by."""

import io
import shlex
from typing import Any

from PIL import Image

from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.sources import short_name
from workflows.checkpoint_store import CheckpointStore
from workflows.mailbox import Event
from workflows.options import TrainFlags, TrainOptions
from workflows.progress import TrainingView
from workflows.runs import RunRecord, Status, output_storage
from workflows.storage import Storage
from workflows.tracking import Tracker, redact
from workflows.worker import picture_name

_MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class RunLog:
    """One run of train.py as it goes; `open` makes it.

    Attributes:
        folder: of the run.
        store: of its checkpoints.
        pictures: where samples stand, a file an evaluation.
        history: one entry an evaluation, {"update", "metrics"}, over all its sessions.
        status: how the training stands.
        reason: why it failed, one line.
        refusal: what the user gave wrong, as it turned out on a worker, one line.
    """

    def __init__(
        self, folder: Storage, record: RunRecord, tracker: Tracker, logged: set[int], options: TrainOptions
    ) -> None:
        self.folder, self.tracker = folder, tracker
        self.store = CheckpointStore(folder.child("checkpoints"), options.keep_checkpoints)
        self.pictures = folder.child("samples")
        self.view = TrainingView(record.name, Config.from_dict(record.config).training.num_updates)
        self.history: list[dict[str, Any]] = []
        self.status: Status = "failed"
        self.reason = self.refusal = ""
        self._record = record
        self._logged = logged
        self._again = _command_to_resume(record.name, options)

    @classmethod
    def open(
        cls, options: TrainOptions, config: Config, dataset: Dataset, record: RunRecord | None, uri: str
    ) -> "RunLog":
        """Make a run, or take up one that was begun.

        Raises:
            InputError: the name is taken, or MLflow does not know the run to go on with.
        """
        runs = output_storage(options)
        name = record.name if record else _free_name(options, runs)
        experiment = options.experiment or (record.experiment if record else short_name(config.data))
        tracker = Tracker(uri, experiment)
        if record is not None:
            logged = tracker.resume(record.run_id)
        else:
            logged = set()
            run_id = tracker.start(name, config.flat())
            record = RunRecord(name, experiment, run_id, config.to_dict(), dataset.spec.fingerprint)
        folder = runs.child(name)
        record = record.write(folder, "running")
        tracker.tag({"data_fingerprint": dataset.spec.fingerprint, "num_workers": str(options.num_workers)})
        return cls(folder, record, tracker, logged, options)

    def on_event(self, event: Event) -> None:
        """Take what the workers tell; see `workflows.worker`."""
        match event["kind"]:
            case "started":
                self.history = list(event["history"])
                for entry in self.history:  # a killed driver may have missed some
                    content = self.pictures.read_bytes(picture_name(entry["update"]))
                    self._send(entry["update"], entry["metrics"], content)
                if event["updates"] or event["attempt"] > 1:
                    self.view.say(
                        f"Going on from update {event['updates']} (workers: {event['num_workers']})."
                    )
            case "evaluated":
                self.history.append({"update": event["updates"], "metrics": event["metrics"]})
                self._send(event["updates"], event["metrics"], event["files"]["samples.png"])
                self.view.evaluated(event["updates"], event["metrics"])
            case "finished" | "stopped":
                self.status = event["kind"]
            case "died" if not (self.reason or self.refusal):
                self.view.say(f"A worker ended ({event['reason']}); starting the workers anew.")
            case "damaged":
                self.view.say(f"warning: {event['reason']}; using an older checkpoint")
            case "refused":
                self.refusal = event["reason"]
            case "diverged" | "failed":
                self.reason = event["reason"]

    def close(self, status: Status) -> None:
        """End the MLflow run, note how it ended, and say so where there is no model to show."""
        self.tracker.tag({"status": status} | ({"reason": self.reason[:500]} if self.reason else {}))
        # Before the record: a run that is killed in between is not finished, and can be gone on with.
        self.tracker.close(_MLFLOW_STATUS[status])
        try:
            self._record.write(self.folder, status)
        except OSError as error:  # a full disk must not hide why the training ended
            self.view.say(f"warning: {self.folder} could not be written ({error.strerror or error})")
        again = f"next: {self._again}"
        if status == "stopped":
            done = self.store.updates()
            newest = (
                f"the newest checkpoint is that of update {done[-1]}"
                if done
                else "there is no checkpoint yet"
            )
            self.view.say(f"Stopped; {newest}.\n{again}")
        elif status == "failed" and not self.refusal:
            self.view.say(f"error: {self.reason or 'the workers ended without a result'}\n{again}")
        if self.tracker.unsent:
            where = redact(self.tracker.uri)
            self.view.say(f"warning: {self.tracker.unsent} entries could not be sent to MLflow at {where}")

    def _send(self, updates: int, metrics: dict[str, float], picture: bytes | None) -> None:
        """Send an evaluation to MLflow, once; the figures last, by which it is known what was sent."""
        if updates in self._logged:
            return
        self._logged.add(updates)
        if picture is not None:
            with Image.open(io.BytesIO(picture)) as file:
                self.tracker.log_picture(file.copy(), updates)
        self.tracker.log(metrics, updates)


def _command_to_resume(name: str, options: TrainOptions) -> str:
    """With what a run's record does not hold, where it is not the default."""
    words = ["python", "workflows/train.py", "--resume", "--name", name]
    defaults = TrainFlags()
    for field in ("num_workers", "keep_checkpoints", "output_dir", "tracking_uri"):
        value = getattr(options, field)
        if value != getattr(defaults, field):
            words += [f"--{field.replace('_', '-')}", redact(str(value))]
    return shlex.join(words)


def _free_name(options: TrainOptions, runs: Storage) -> str:
    if options.resume and options.name is not None:
        return options.name  # it was killed before it wrote anything
    taken = set(runs.names())
    return options.free_name(taken.__contains__)
