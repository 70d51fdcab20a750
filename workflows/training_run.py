"""A training from start to end: data, workers, checkpoints, MLflow, the model to hand over."""

import dataclasses
import io
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from PIL import Image
from torch import Tensor

from diffusion.checkpoints import TrainedModel, read_checkpoint
from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.errors import InputError
from diffusion.learner import check_precision
from diffusion.manifest import write_manifest
from diffusion.networks import build_network
from diffusion.sources import needs_streaming, short_name
from export.to_onnx import ParityError
from workflows.checkpoint_store import CheckpointStore
from workflows.console import TrainingView, readable
from workflows.dry_run import describe_training
from workflows.group import GroupFailed, plan_layout, run_group
from workflows.mailbox import Event
from workflows.options import TrainOptions
from workflows.product import figures_on_test, write_product
from workflows.provenance import provenance
from workflows.ray_session import start_ray
from workflows.runs import RunRecord, Status, check_same_config, model_folder, output_storage
from workflows.storage import Storage
from workflows.streaming import load_dataset
from workflows.tracking import Tracker, open_store, redact, resolve_tracking_uri, runs_page
from workflows.worker import Job

_MOST_RESTARTS = 20
_MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def run_training(options: TrainOptions, record: RunRecord | None) -> int:
    """Train, or go on with a training, and return the exit status: 0 with a model, 1 without.

    Args:
        options: of the command line.
        record: of the run to go on with, or None for a new one.

    Raises:
        InputError: the store, the data, the network, the workers or the run asked for cannot be used.
    """
    config = options.config()
    uri = resolve_tracking_uri(options.tracking_uri)
    if not options.dry_run:
        open_store(uri)  # the first thing to know, before data are loaded
    try:
        if needs_streaming(config.data):
            start_ray(options.verbose)
        dataset = load_dataset(config.data)
        config = config.for_examples(len(dataset.train))
        build_network(config, dataset.spec.shape)
        weights = _initial_weights(options.init_from, config, dataset) if options.init_from else None
        if record is not None:
            _check_same(config, dataset, record)
        start_ray(options.verbose)
        layout = plan_layout(options.num_workers)
        if not layout.uses_gpus:
            check_precision(config.training, torch.device("cpu"))
        if options.dry_run:
            describe_training(config, dataset, layout)
            return 0
        run = _Run.open(options, config, dataset, record, uri)
        job = Job(
            config,
            ray.put(dataset),
            layout.threads,
            provenance(run.tracker.run_id, dataset),
            run.store,
            None if weights is None else ray.put(weights),
        )
        status: Status = "failed"
        try:
            with run.view, _counting_interrupts(run.view) as stop_wanted:
                run_group(
                    job, layout, run.on_event, run.view.progressed, stop_wanted, max_failures=_MOST_RESTARTS
                )
            ray.shutdown()
            status = run.status
            if status == "finished":
                run.hand_over(dataset, job.provenance)
        except (GroupFailed, ParityError) as error:
            status = "failed"
            run.reason = str(error)
        except KeyboardInterrupt:
            status = "stopped"
            run.reason = "interrupted twice: the last seconds are lost"
        finally:
            ray.shutdown()
            run.close(status)
    finally:
        ray.shutdown()
    run.say_how_it_ended(status)
    if run.refusal:
        raise InputError(run.refusal)
    return 0 if status == "finished" else 1


class _Run:
    """One run: its folder, its MLflow run, its checkpoints, and what its workers tell."""

    def __init__(
        self,
        folder: Storage,
        record: RunRecord,
        tracker: Tracker,
        logged: set[int],
        keep: int,
        num_updates: int,
    ) -> None:
        self.folder, self.record, self.tracker = folder, record, tracker
        self.store = CheckpointStore(folder.child("checkpoints"), keep)
        self.view = TrainingView(record.name, num_updates)
        self.status: Status = "failed"
        self.reason = self.refusal = ""
        self._logged = logged
        self._history: list[dict[str, Any]] = []

    @classmethod
    def open(
        cls, options: TrainOptions, config: Config, dataset: Dataset, record: RunRecord | None, uri: str
    ) -> "_Run":
        """Make a run, or take up one that was begun."""
        runs = output_storage(options)
        name = record.name if record else _name(options, runs)
        folder = runs.child(name)
        experiment = options.experiment or (record.experiment if record else short_name(config.data))
        tracker = Tracker(uri, experiment)
        logged: set[int] = set()
        if record is not None:
            logged = tracker.resume(record.run_id)
        else:
            run_id = tracker.start(name, config.flat())
            record = RunRecord(name, experiment, run_id, config.to_dict(), dataset.spec.fingerprint)
        record = record.write(folder, "running")
        tracker.tag({"data_fingerprint": dataset.spec.fingerprint, "num_workers": str(options.num_workers)})
        return cls(folder, record, tracker, logged, options.keep_checkpoints, config.training.num_updates)

    def on_event(self, event: Event) -> None:
        """Take what the workers tell; see `workflows.worker`."""
        match event["kind"]:
            case "started":
                self._history = list(event["history"])
                for entry in self._history:  # a killed driver may have missed some
                    self._log(entry["update"], entry["metrics"])
                if event["updates"] or event["attempt"] > 1:
                    self.view.say(f"Going on from update {event['updates']}.")
            case "evaluated":
                self._history.append({"update": event["updates"], "metrics": event["metrics"]})
                if self._log(event["updates"], event["metrics"]):
                    with Image.open(io.BytesIO(event["files"]["samples.png"])) as picture:
                        self.tracker.log_picture(picture.copy(), event["updates"])
                self.view.evaluated(event["updates"], event["metrics"])
            case "finished" | "stopped":
                self.status = event["kind"]
            case "died":
                self.view.say(f"A worker ended ({event['reason']}); starting the workers anew.")
            case "damaged":
                self.view.say(f"warning: {event['reason']}; using an older checkpoint")
            case "refused":
                self.refusal = event["reason"]
            case kind:  # diverged, unwritten
                self.status, self.reason = "failed", event["reason"]
                assert kind in ("diverged", "unwritten"), kind

    def hand_over(self, dataset: Dataset, origin: Mapping[str, Any]) -> None:
        """Judge the trained model on the test split, export it, draw it, and put it into `model/`."""
        self.view.say("measuring the model on the test split, exporting and drawing it")
        with tempfile.TemporaryDirectory() as scratch:
            found = self.store.load_newest(Path(scratch) / "checkpoint", self.view.say)
            assert found is not None, "a finished training has a checkpoint"
            model, _, _ = read_checkpoint(found)
            metrics = {**self._history[-1]["metrics"], **figures_on_test(model, dataset)}
            model = dataclasses.replace(model, provenance={**origin, "metrics": metrics})
            folder = Path(scratch) / "model"
            write_product(model, dataset, folder)
            write_manifest(folder, {"update": self._history[-1]["update"]})
            self.folder.put_folder(folder, "model")
            self.metrics = metrics
            test = {name: value for name, value in metrics.items() if name.startswith("test/")}
            self.tracker.log(test, self._history[-1]["update"])
            self.tracker.log_files(folder, "model")
            self.tracker.describe((folder / "model_card.md").read_text())
            self.tracker.flush()

    def close(self, status: Status) -> None:
        """End the MLflow run and note how it ended."""
        self.record = self.record.write(self.folder, status)
        self.tracker.tag({"status": status} | ({"reason": self.reason[:500]} if self.reason else {}))
        self.tracker.close(_MLFLOW_STATUS[status])

    def say_how_it_ended(self, status: Status) -> None:
        """The summary: what was made, where, and what to run next."""
        again = f"python workflows/train.py --resume --name {self.record.name}"
        if status == "finished":
            for line in self._summary():
                self.view.say(line)
        elif status == "stopped":
            done = self.store.updates()
            where = f"after update {done[-1]}" if done else "before the first checkpoint"
            self.view.say(f"Stopped {where}{f' ({self.reason})' if self.reason else ''}.\nnext: {again}")
        elif not self.refusal:
            self.view.say(f"error: {self.reason or 'the workers ended without a result'}\nnext: {again}")
        if self.tracker.unsent:
            where = redact(self.tracker.uri)
            self.view.say(f"warning: {self.tracker.unsent} entries could not be sent to MLflow at {where}")

    def _log(self, updates: int, metrics: dict[str, float]) -> bool:
        """Send an evaluation to MLflow once, and say whether this was the time."""
        if updates in self._logged:
            return False
        self._logged.add(updates)
        self.tracker.log({**metrics, "objective": metrics["val/elbo_window"]}, updates)
        return True

    def _summary(self) -> list[str]:
        metrics = self.metrics
        folder = f"{readable(self.folder)}/model"
        best = min(self._history, key=lambda entry: entry["metrics"]["val/elbo_window"])
        lines = [
            "",
            f"objective (val/elbo_window) {metrics['val/elbo_window']:.4f} nats/dim",
            f"  test split: ELBO window {metrics['test/elbo_window']:.4f} nats/dim, distance of "
            f"{metrics['test/sample_num_samples']:.0f} samples {metrics['test/sample_distance']:.4g} "
            f"(as many training examples: {metrics['test/sample_distance_floor']:.4g})",
        ]
        if best["update"] != self._history[-1]["update"] and best["update"] in self.store.updates():
            value = best["metrics"]["val/elbo_window"]
            lines.append(f"  checkpoint {best['update']} has a better objective, {value:.4f}; it is kept")
        lines += [
            "",
            f"{folder}/samples.png    drawn by PyTorch; samples_onnx.png beside it by ONNX Runtime",
            f"{folder}/animation.gif    noise becoming samples",
            f"{folder}/sampler.onnx    the file to ship, checked against PyTorch (parity.json)",
            "",
            "next: make ui        # every run in MLflow"
            if self.tracker.uri.startswith("sqlite:")
            else f"next: {redact(self.tracker.uri)}{runs_page(self.tracker.experiment_id)}",
        ]
        if self.folder.is_local:
            lines.append(
                f"      python -m export.sampler {folder}/sampler.onnx --num-samples 64 --output samples.png"
            )
        return lines


@contextmanager
def _counting_interrupts(view: TrainingView) -> Iterator[Any]:
    """Ctrl-C or SIGTERM once asks for a clean stop, which the yielded callable tells; twice raises."""
    asked: list[bool] = []

    def note(*_signal: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        view.say("Stopping after a checkpoint; press Ctrl-C again to stop at once.")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _name(options: TrainOptions, runs: Storage) -> str:
    if options.resume and options.name is not None:
        return options.name  # it was killed before it wrote anything
    taken = set(runs.names())
    return options.free_name(taken.__contains__)


def _check_same(config: Config, dataset: Dataset, record: RunRecord) -> None:
    check_same_config(config, Config.from_dict(record.config))
    if dataset.spec.fingerprint != record.data_fingerprint:
        raise InputError(
            f"--resume: the data of {config.data.name} have changed since the run {record.name} was started; "
            "bring them back, or start a new run"
        )


def _initial_weights(path: str, config: Config, dataset: Dataset) -> dict[str, Tensor]:
    """Another model's averaged weights.

    Raises:
        InputError: there are none, or they do not fit this network.
    """
    model = TrainedModel.load(model_folder(path))
    theirs = model.network.state_dict()
    ours = build_network(config, dataset.spec.shape).state_dict()
    for name in [*ours, *theirs]:
        shapes = [tuple(each[name].shape) if name in each else None for each in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"--init-from {path}: {name} has shape {shapes[0]} there and {shapes[1]} here; give a model "
                "of the same network and data shape"
            )
    return theirs
