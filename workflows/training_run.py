"""A training from start to end: data, workers, the model to hand over."""

import dataclasses
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import torch
from torch import Tensor

from diffusion.checkpoints import TrainedModel, read_checkpoint
from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.errors import InputError
from diffusion.learner import check_precision
from diffusion.manifest import MANIFEST, write_manifest
from diffusion.networks import build_network
from export.to_onnx import ParityError
from workflows.console import readable
from workflows.dry_run import describe_training
from workflows.group import GroupFailed, Layout, plan_layout, run_group
from workflows.options import TrainOptions
from workflows.preparation import prepare
from workflows.product import copying, figures_on_test, write_product
from workflows.progress import TrainingView
from workflows.provenance import provenance
from workflows.ray_session import start_ray
from workflows.run_log import RunLog
from workflows.runs import RunRecord, Status, check_same_config, model_folder
from workflows.tracking import open_store, redact, resolve_tracking_uri, runs_page
from workflows.worker import Job

_MOST_RESTARTS = 20


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
    try:
        if not options.dry_run and not uri.startswith("sqlite:"):
            open_store(uri)  # the first thing to know, before data are loaded; a database would be made
        config, dataset = prepare(config, verbose=options.verbose)
        build_network(config, dataset.spec.shape, dataset.spec.num_classes)
        if reason := config.why_it_cannot_run():
            raise InputError(f"this schedule cannot run ({reason})")
        if record is not None:
            _check_same(config, dataset, record)
        weights = _initial_weights(options.init_from, config, dataset) if options.init_from else None
        start_ray(options.verbose)
        fewest, most = options.workers
        layout = plan_layout(fewest, most_workers=most if most > fewest else None)
        if not layout.uses_gpus:
            check_precision(config.training, torch.device("cpu"))
        if options.dry_run:
            describe_training(config, dataset, layout)
            return 0
        return _train(RunLog.open(options, config, dataset, record, uri), config, dataset, layout, weights)
    except Exception:
        ray.shutdown()
        raise


def _train(
    log: RunLog, config: Config, dataset: Dataset, layout: Layout, weights: dict[str, Tensor] | None
) -> int:
    origin = provenance(log.tracker.run_id, dataset)
    initial = None if weights is None else ray.put(weights)
    job = Job(config, ray.put(dataset), layout.threads, origin, log.store, initial, log.pictures)
    status: Status = "failed"
    try:
        with log.view, _counting_interrupts(log.view) as stop_wanted:
            run_group(job, layout, log.on_event, log.view.progressed, stop_wanted, _MOST_RESTARTS)
        ray.shutdown()  # what follows wants the processors
        if log.status == "finished":
            for line in _hand_over(log, dataset, origin):
                log.view.say(line)
        status = log.status
    except (GroupFailed, ParityError) as error:
        log.reason = log.reason or str(error)
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        log.close(status)
    if log.refusal:
        raise InputError(log.refusal)
    return 0 if status == "finished" else 1


def _hand_over(log: RunLog, dataset: Dataset, origin: dict[str, object]) -> list[str]:
    """Judge the trained model on the test split, export it, put it into `model/`, and say what was made."""
    log.view.say("measuring the model on the test split, exporting and drawing it")
    with tempfile.TemporaryDirectory() as scratch:
        found = log.store.load_newest(Path(scratch) / "checkpoint", log.view.say)
        assert found is not None, "a finished training has a checkpoint"
        model, _, _ = read_checkpoint(found)
        last = log.history[-1]
        metrics = {**last["metrics"], **figures_on_test(model, dataset)}
        folder = Path(scratch) / "model"
        write_product(dataclasses.replace(model, provenance={**origin, "metrics": metrics}), dataset, folder)
        write_manifest(folder, {"update": last["update"]})
        # One by one, the manifest last: unlike a checkpoint it is never replaced by another model.
        place = log.folder.child("model")
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            place.write_bytes(path.name, path.read_bytes())
        test = {name: value for name, value in metrics.items() if name.startswith("test/")}
        if not log.tracker.tested:  # by a session that was killed here
            log.tracker.log(test, last["update"])
        log.tracker.log_files(folder, "model")
        log.tracker.describe((folder / "model_card.md").read_text())
        log.tracker.flush()
    return _summary(log, metrics)


def _summary(log: RunLog, metrics: dict[str, float]) -> list[str]:
    folder = f"{readable(log.folder)}/model"
    last, best = log.history[-1], min(log.history, key=lambda entry: entry["metrics"]["objective"])
    lines = [
        "",
        f"val/elbo_window {metrics['val/elbo_window']:.4f} nats/dim",
        f"  test split: ELBO window {metrics['test/elbo_window']:.4f} nats/dim, distance of "
        f"{metrics['test/sample_num_samples']:.0f} samples {metrics['test/sample_distance']:.4g} "
        f"(as many training examples: {metrics['test/sample_distance_floor']:.4g})",
        f"  {copying(metrics)}",
    ]
    if best is not last and best["update"] in log.store.updates():
        value = best["metrics"]["objective"]
        lines.append(f"  checkpoint {best['update']} has a better objective, {value:.4f}; it is kept")
    lines += [
        "",
        f"{folder}/samples.png    drawn by PyTorch; samples_onnx.png beside it by ONNX Runtime",
        f"{folder}/animation.gif    noise becoming samples",
        f"{folder}/sampler.onnx    the file to ship, checked against PyTorch (parity.json)",
        "",
        "next: make ui        # every run in MLflow"
        if log.tracker.uri.startswith("sqlite:")
        else f"next: {redact(log.tracker.uri)}{runs_page(log.tracker.experiment_id)}",
    ]
    if log.folder.is_local:
        lines.append(
            f"      python -m export.sampler {folder}/sampler.onnx --num-samples 64 --output samples.png"
        )
    return lines


@contextmanager
def _counting_interrupts(view: TrainingView) -> Iterator[Callable[[], bool]]:
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


def _check_same(config: Config, dataset: Dataset, record: RunRecord) -> None:
    """See that a run goes on with its own config and data.

    Raises:
        InputError: one of them differs.
    """
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
    theirs = TrainedModel.load(model_folder(path)).network.state_dict()
    ours = build_network(config, dataset.spec.shape, dataset.spec.num_classes).state_dict()
    for name in [*ours, *theirs]:
        shapes = [tuple(each[name].shape) if name in each else None for each in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"--init-from {path}: {name} has shape {shapes[0]} there and {shapes[1]} here; give a model "
                "of the same network and data shape"
            )
    return theirs
