"""The driver of a training (the process of train.py): loads the data, runs the workers, publishes the model.

The docstring of `workflows.training` explains how driver, coordinator and workers work together.
"""

import dataclasses
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ray
import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.data.dataset import Dataset
from diffusion.data.sources import DataSource
from diffusion.devices import default_device
from diffusion.errors import InputError
from diffusion.evaluation.sampler_choice import SamplerChoice
from diffusion.manifest import MANIFEST, write_manifest
from diffusion.metrics import (
    BEST_UPDATE,
    OBJECTIVE,
    TEST_PREFIX,
    VAL_ELBO_WINDOW,
    metrics_of_best,
)
from diffusion.networks.build import build_network
from diffusion.training.checkpoints import TrainedModel, best_model, read_checkpoint
from diffusion.training.train_step import check_precision
from export.to_onnx import ParityError
from workflows.cli.model_reference import model_folder, read_saved_config
from workflows.cli.process import on_interrupt
from workflows.cli.run_options import TrainOptions
from workflows.data.load import LoadedData, check_fits, load_or_stream, no_notice, prepare_data
from workflows.publishing.artifacts import write_model_artifacts
from workflows.publishing.deployed_sampler import sampler_curves, with_deployed_sampler
from workflows.publishing.final_metrics import metrics_on_test_split
from workflows.publishing.provenance import provenance
from workflows.publishing.registration import log_model, upload_model
from workflows.publishing.summary import (
    file_lines,
    next_lines,
    quality_lines,
    schedule_lines,
    weights_line,
)
from workflows.ray_runtime.session import start_ray, stop_ray
from workflows.status import Outcome, Status
from workflows.storage.run_record import RunRecord
from workflows.terminal import TrainingProgress, display_path, waiting
from workflows.tracking.tracker import resolve_tracking_uri, tracker_class
from workflows.training.dry_run import describe_training, run_lines
from workflows.training.run_logger import RunLogger
from workflows.training.worker import TrainingJob
from workflows.training.worker_group import (
    MAX_RESTARTS,
    WorkerGroupError,
    WorkerResources,
    plan_workers,
    run_worker_group,
)


def run_training(options: TrainOptions, source: DataSource, record: RunRecord | None) -> Outcome:
    """Train a model, or resume its training.

    Args:
        options: options from the command line.
        source: the opened data.
        record: record of the run to resume, or None for a new run.

    Raises:
        InputError: the tracking store, the data, the network, the workers or the run cannot be used.
    """
    try:
        with on_interrupt("Interrupted before the training started: nothing was written."):
            plan = _plan(options, source, record)
            if options.dry_run:
                with waiting("measuring a few steps"):
                    describe_training(plan.config, plan.data, plan.resources)
                return Outcome("finished")
        with waiting("opening the run's folder and MLflow", quiet=not options.progress):
            log = RunLogger.open(options, plan.config, plan.data.dataset, record, plan.uri)
        return _train(log, plan, options, is_resumed=record is not None)
    except BaseException:
        stop_ray()
        raise


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What a training is going to run.

    Attributes:
        uri: URI of the tracker's store.
        config: the config, completed with what the data determine.
        data: the loaded data.
        resources: the workers.
        weights: weights to start from, or None.
    """

    uri: str
    config: Config
    data: LoadedData
    resources: WorkerResources
    weights: dict[str, Tensor] | None


def _plan(options: TrainOptions, source: DataSource, record: RunRecord | None) -> _Plan:
    """Check the options, load the data and start Ray; nothing is written.

    Raises:
        InputError: see `run_training`.
    """
    config = options.config()
    uri = resolve_tracking_uri(options.tracking_uri)
    quiet = not options.progress
    if not options.dry_run:
        with waiting("looking for MLflow", quiet=quiet):  # fail before the data are loaded
            tracker_class(uri).check_store(uri, may_create=False)
    with waiting(f"reading {options.data}", quiet=quiet):
        dataset = load_or_stream(source, start_ray=partial(start_ray, options.verbose))
    if options.config_file and record is None:
        saved = read_saved_config("--config", options.config_file)
        saved.check_data(f"--config {options.config_file}", dataset.spec.kind, dataset.spec.shape)
    check_fits(config, dataset)
    if reason := config.infeasible_reason():
        raise InputError(f"this schedule cannot run ({reason})")
    weights = _initial_weights(options, config, dataset) if options.init_from else None
    with waiting("preparing the data", quiet=quiet):
        config, data = prepare_data(config, dataset, notify=no_notice if quiet else print)
    if record is not None:
        record.check_unchanged(config, dataset.spec.fingerprint)  # fail early: before Ray is started
    start_ray(options.verbose)
    min_workers, max_workers = options.workers
    resources = plan_workers(min_workers, max_workers=max_workers if max_workers > min_workers else None)
    if not resources.uses_gpus:
        check_precision(config.training, default_device(use_cuda=False, num_workers=resources.num_workers))
    return _Plan(uri, config, data, resources, weights)


def _train(log: RunLogger, plan: _Plan, options: TrainOptions, *, is_resumed: bool) -> Outcome:
    data, resources, weights = plan.data, plan.resources, plan.weights
    status: Status = "failed"
    try:
        fingerprint = data.dataset.spec.fingerprint
        log.tracker.tag({"data_fingerprint": fingerprint, "num_workers": str(options.num_workers)})
        name, folder = str(log.folder).rsplit("/", 1)[-1], display_path(log.folder)
        log.view.print(f"Training {name} in {folder}" + (", resumed" if is_resumed else ""))
        for line in run_lines(plan.config, data.dataset, resources):
            log.view.print(f"  {line}")
        origin = provenance(log.tracker.run_id, data.dataset)
        initial = None if weights is None else ray.put(weights)
        job = TrainingJob(
            plan.config,
            ray.put(data),
            resources.threads,
            origin,
            log.store,
            initial,
            log.pictures,
            storage_retry_seconds=60.0 * options.storage_retry_minutes,
        )
        for line in schedule_lines(plan.config, data.dataset.spec):
            log.view.print(line.strip())
        with log.view, _handle_interrupts(log.view) as stop_requested:
            run_worker_group(job, resources, log.on_event, log.view.progressed, stop_requested, MAX_RESTARTS)
        stop_ray()  # publishing the model needs the CPU cores and the GPU
        if log.status == "finished":
            device = default_device(use_cuda=resources.uses_gpus)
            for line in _publish_model(log, data, origin, device):
                log.view.print(line)
        status = log.status
    except (WorkerGroupError, ParityError) as error:
        log.reason = log.reason or str(error)
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        log.close(status)
    if log.input_error:
        raise InputError(log.input_error)
    finished = status == "finished"
    return Outcome(status, str(log.folder), has_model=finished, reason="" if finished else log.reason)


def _publish_model(
    log: RunLogger, data: LoadedData, origin: dict[str, object], device: torch.device
) -> list[str]:
    """Evaluate the trained model on the test split, export it to the run's `model/` and to the tracker.

    Args:
        log: the run's records.
        data: the data.
        origin: origin of the model, see `workflows.publishing.provenance`.
        device: the device to evaluate on.

    Returns:
        Lines of a summary to print.
    """
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = log.store.load_newest(Path(scratch) / "checkpoint", log.view.print)
        assert checkpoint is not None, "a finished training has a checkpoint"
        model, state, _ = read_checkpoint(checkpoint)
        model = best_model(model, state)
        held_out = metrics_of_best({entry["update"]: entry["metrics"] for entry in log.history})
        last = log.history[-1]["update"]
        update = int(held_out.get(BEST_UPDATE, last))
        placed = data.to(device)
        model = with_deployed_sampler(model, placed, log.view.step)
        samplers = SamplerChoice.of(model.provenance)
        log.view.step("evaluating the model on the test split")
        metrics = {**held_out, **metrics_on_test_split(model, placed.dataset, placed.features)}
        folder = Path(scratch) / "model"
        write_model_artifacts(
            dataclasses.replace(
                model, provenance={**model.provenance, **origin, "update": update, "metrics": metrics}
            ),
            data.dataset,
            data.features,
            folder,
            log.view.step,
        )
        write_manifest(folder, {"update": update})
        # File by file, the manifest last: unlike a checkpoint, the folder is never replaced by another model.
        published = log.folder.child("model")
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            published.write_bytes(path.name, path.read_bytes())
        test = {name: value for name, value in metrics.items() if name.startswith(TEST_PREFIX)}
        if not log.tracker.has_test_metrics:  # else an earlier session was killed between here and the end
            log.tracker.log(test, last)
            for evaluations, curves in sampler_curves(samplers).items():
                log.tracker.log(curves, evaluations)
            log.tracker.tag({"best_update": str(update)})
        log.view.step(f"sending the model to {log.tracker.name}")
        # A local folder of the run stays, so it can be sent later, too.
        to_send = published.path if published.is_local else folder
        upload_model(log.tracker, to_send, "model")
        warnings = log_model(log.tracker, to_send, model.config.flat(), metrics)
        log.tracker.flush()
    notes = samplers.sentences() if samplers else []
    low_resolution = model.config.data.low_resolution
    lines = _summary(log, metrics, notes, schedule_lines(model.config, model.data), low_resolution)
    return [*warnings, *lines]


def _summary(
    log: RunLogger,
    metrics: dict[str, float],
    notes: list[str],
    warnings: list[str],
    low_resolution: int | None,
) -> list[str]:
    folder = f"{display_path(log.folder)}/model"
    last = log.history[-1]
    return [
        "",
        weights_line(int(metrics.get(BEST_UPDATE, last["update"])), last["update"], metrics[OBJECTIVE]),
        f"  {VAL_ELBO_WINDOW} {metrics[VAL_ELBO_WINDOW]:.4f} nats/dim",
        *(f"  {note}" for note in notes),
        *quality_lines(metrics),
        *warnings,
        "",
        *file_lines(folder),
        "",
        *next_lines(folder, log.tracker, is_local=log.folder.is_local, low_resolution=low_resolution),
    ]


@contextmanager
def _handle_interrupts(view: TrainingProgress) -> Iterator[Callable[[], bool]]:
    """Handle Ctrl-C: the first one requests a clean stop, the second one raises KeyboardInterrupt.

    Yields:
        A callable that returns whether a stop was requested.
    """
    requested: list[bool] = []

    def handler(*_signal: object) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(True)
        view.print("Stopping after a checkpoint; press Ctrl-C again to stop immediately.")

    # Python calls signal handlers in the main thread, and only that may set them.
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(requested)
    finally:
        signal.signal(signal.SIGINT, previous)


def _initial_weights(options: TrainOptions, config: Config, dataset: Dataset) -> dict[str, Tensor]:
    """Averaged weights of the model of --init-from.

    Raises:
        InputError: there is no model, or its weights do not fit this network.
    """
    path = options.init_from
    assert path is not None, "it is given"
    given = TrainedModel.load(model_folder(path)).network.state_dict()
    expected = build_network(config, dataset.spec.shape, dataset.spec.num_classes).state_dict()
    for name in [*expected, *given]:
        shapes = [tuple(weights[name].shape) if name in weights else None for weights in (given, expected)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"--init-from {path}: {name} has shape {shapes[0]} there and {shapes[1]} here; give a model "
                "of the same network and data shape"
            )
    return given
