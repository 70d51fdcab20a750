"""A group of workers on Ray Train: plans them, runs them, and leaves none behind however the run ends.

The driver calls `run_worker_group`. A thread of the driver lets Ray Train start
`workflows.training.worker.run_worker` in every worker process. Meanwhile the driver collects events and
progress from the coordinator and passes them to its callbacks.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback

from diffusion.errors import InputError
from workflows.cluster.nodes import possible_nodes
from workflows.ray_runtime.preemption import PreemptibleTorchConfig
from workflows.training.coordinator import start_coordinator
from workflows.training.events import Event, WorkerDied
from workflows.training.worker import TrainingJob, run_worker

MAX_RESTARTS = 20  # of workers whose training has checkpoints
SECONDS_BETWEEN_RESIZES = 60.0
SECONDS_TO_START = 1800.0  # a cloud takes minutes to start a machine and set it up; Ray would wait for ever
_SECONDS_BETWEEN_POLLS = 0.2
_SECONDS_TO_STOP = 60.0
_SECONDS_TO_ANSWER = 300.0  # of the coordinator, on a machine that is busy with other trainings
_COLLECTIVE_TIMEOUT_SECONDS = 2 * 3600  # the others wait in a collective while rank 0 measures samples


class WorkerGroupError(RuntimeError):
    """The workers ended without a result; the message is one line."""


class _StartTimeoutError(WorkerGroupError):
    """The resources for the workers did not become available in time."""


@dataclass(frozen=True)
class WorkerResources:
    """Resources that a group of workers requests from Ray.

    Attributes:
        num_workers: number of worker processes; of an elastic group the minimum.
        threads: number of CPU threads of each worker.
        uses_gpus: whether each worker has a GPU.
        gpus_per_worker: fraction of a GPU that each worker gets if GPUs are used.
        max_workers: maximum number of workers of an elastic group, which has as many as the cluster has room
            for; None for a group of fixed size.
    """

    num_workers: int
    threads: int
    uses_gpus: bool
    gpus_per_worker: float = 1.0
    max_workers: int | None = None

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources of one worker, under Ray's names."""
        return {"CPU": float(self.threads)} | ({"GPU": self.gpus_per_worker} if self.uses_gpus else {})


def plan_workers(
    num_workers: int, flag: str = "--num-workers", max_workers: int | None = None
) -> WorkerResources:
    """Plan workers for the cluster: one per GPU if it has GPUs, otherwise spread over its CPU cores.

    Args:
        num_workers: number of workers; of an elastic group the minimum.
        flag: flag that an error message names.
        max_workers: maximum number of workers of an elastic group, or None.

    Raises:
        InputError: the cluster has too few GPUs or CPU cores.
    """
    nodes = possible_nodes()
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    # A worker with a GPU needs a CPU core as well.
    gpus = [min(int(node.get("GPU", 0)), cores) for node, cores in zip(nodes, cpus, strict=True)]
    uses_gpus = any(gpus)
    slots = gpus if uses_gpus else cpus
    if num_workers > sum(slots):
        unit = "GPUs (one worker each)" if uses_gpus else "CPU cores"
        raise InputError(
            f"{flag} {num_workers}: the cluster has {sum(slots)} {unit}; give {sum(slots)} or fewer"
        )
    if uses_gpus:
        cores_per_gpu = [cores // count for cores, count in zip(cpus, slots, strict=True) if count]
        return WorkerResources(num_workers, min(cores_per_gpu), uses_gpus=True, max_workers=max_workers)
    planned = num_workers if max_workers is None else min(max_workers, sum(slots))
    threads = max(slots)
    while sum(cores // threads for cores in slots) < planned:
        threads -= 1
    return WorkerResources(num_workers, threads, uses_gpus=False, max_workers=max_workers)


def max_concurrent_groups(resources: WorkerResources) -> int:
    """Number of such groups that fit on the cluster at a time, at least one."""
    nodes = possible_nodes()
    need = resources.per_worker
    slots = sum(int(min(node.get(name, 0) // amount for name, amount in need.items())) for node in nodes)
    return max(1, slots // resources.num_workers)


def run_worker_group(
    job: TrainingJob,
    resources: WorkerResources,
    on_event: Callable[[Event], None],
    on_progress: Callable[[int], None] = lambda updates: None,
    stop: Callable[[], bool] = lambda: False,
    max_failures: int = 0,
    extra_resources: Mapping[str, float] | None = None,
) -> None:
    """Run a job's workers to the end, and restart them when one dies.

    Args:
        job: the training.
        resources: number and resources of the workers.
        on_event: receives the events (`workflows.training.events`) in order; if it raises, the workers are
            stopped before the exception propagates.
        on_progress: receives the number of updates done, several times a second.
        stop: returns whether the training should write a checkpoint and stop.
        max_failures: how many times the workers may be restarted.
        extra_resources: further resources that each worker requests, see
            `workflows.ray_runtime.placement_groups`.

    Raises:
        WorkerGroupError: workers died more often than `max_failures`, the group could not start, or its
            resources did not become available within half an hour.
    """
    coordinator = start_coordinator()
    failures: list[str] = []  # not the error itself: its traceback would keep the controller alive

    def fit(folder: str) -> None:
        trainer = _Trainer(
            run_worker,
            train_loop_config={"job": job, "coordinator": coordinator},
            torch_config=PreemptibleTorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_SECONDS),
            scaling_config=ScalingConfig(
                num_workers=(resources.num_workers, resources.max_workers)
                if resources.max_workers
                else resources.num_workers,
                use_gpu=resources.uses_gpus,
                elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES,
                resources_per_worker={**resources.per_worker, **(extra_resources or {})},
            ),
            run_config=RunConfig(
                name="group",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=max_failures),
                callbacks=[_ControllerLink(coordinator), _FailureReporter(coordinator)],
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            failures.append(one_line(error))

    waiting_since: float | None = time.monotonic()

    def handle_events() -> None:
        nonlocal waiting_since
        events, updates = ray.get(coordinator.take_events.remote())
        for event in events:
            waiting_since = time.monotonic() if isinstance(event, WorkerDied) else None
            on_event(event)
        on_progress(updates)
        if waiting_since is not None and time.monotonic() - waiting_since > SECONDS_TO_START:
            need = ", ".join(f"{amount:g} {name}" for name, amount in resources.per_worker.items())
            raise _StartTimeoutError(
                f"no room for {resources.num_workers} workers ({need} each) within "
                f"{SECONDS_TO_START / 60:.0f} minutes: check `ray status` and the cluster's quotas"
            )

    # A fresh folder, since Ray Train would resume an old run with the same name and path. Only the job's own
    # checkpoints matter.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        thread = threading.Thread(target=fit, args=(folder,), name="ray train", daemon=True)
        thread.start()
        grace_seconds = _SECONDS_TO_STOP
        try:
            stop_requested = False
            while thread.is_alive():
                handle_events()
                if stop() and not stop_requested:
                    ray.get(coordinator.request_signal.remote("stop"))
                    stop_requested = True
                thread.join(_SECONDS_BETWEEN_POLLS)
            handle_events()
        except (KeyboardInterrupt, _StartTimeoutError):
            grace_seconds = 0.0  # the user does not want to wait, or the workers never started
            raise
        finally:
            _shut_down(coordinator, thread, grace_seconds)
    if failures:
        raise WorkerGroupError(failures[0])


def _shut_down(coordinator: Any, thread: threading.Thread, grace_seconds: float) -> None:
    """Give workers that still run time to stop, then end them all."""
    if thread.is_alive() and grace_seconds:
        ray.get(coordinator.request_signal.remote("stop"))
        thread.join(grace_seconds)
    controller = ray.get(coordinator.controller.remote())
    ray.kill(coordinator)  # a worker without its coordinator exits immediately
    if grace_seconds:
        thread.join(grace_seconds)
    if controller is not None:
        ray.kill(controller)  # left to itself, its process has been seen to stay


class _Trainer(TorchTrainer):
    """Ray Train's trainer without the actor that removes the placement group of a killed controller.

    Ray removes a placement group with the actor that created it, and a sweep those of its killed trials (see
    `workflows.ray_runtime.placement_groups`). The actor asks the dashboard whether the controller is alive;
    without a dashboard every training would end with 12 s of waiting for it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]


class _ControllerLink(ControllerCallback):
    """Makes the controller known to the coordinator; runs in the controller."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def after_controller_start(self, train_run_context: Any) -> None:
        """Send the controller's actor handle."""
        controller = ray.get_runtime_context().current_actor
        ray.get(self._coordinator.set_controller.remote(controller), timeout=_SECONDS_TO_ANSWER)


class _FailureReporter(UserCallback):
    """Sends an event with the reason when workers fail; runs in Ray Train's controller."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Send the event."""
        event = WorkerDied(_failure_reason(worker_exceptions))
        ray.get(self._coordinator.add_event.remote(event), timeout=_SECONDS_TO_ANSWER)


def _failure_reason(worker_exceptions: dict[int, Exception]) -> str:
    """One line about the worker that failed first, not about those that only lost their connection to it."""
    for rank, error in worker_exceptions.items():
        if type(error).__name__ == "WorkerHealthCheckFailedError":
            return f"the process of worker {rank} died"
    causes = [error for error in worker_exceptions.values() if "Connection" not in str(error)]
    return one_line((causes or list(worker_exceptions.values()))[0])


def one_line(error: Exception) -> str:
    """The last line of an error's message, or its type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
