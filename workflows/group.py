"""A group of workers on Ray Train: where they fit, their start, and their end whatever happens."""

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from diffusion.errors import InputError
from workflows.mailbox import Event, open_mailbox
from workflows.nodes import possible_nodes
from workflows.preemption import PreemptibleTorchConfig
from workflows.worker import Job, run_worker

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_STOP = 60.0
_SECONDS_BETWEEN_RESIZES = 60.0
_SECONDS_TO_START = (
    1800.0  # a machine that a cloud starts, and installs, takes minutes; Ray would wait for ever
)
_SECONDS_A_COLLECTIVE = 2 * 3600  # the others wait while the leading worker evaluates


class GroupFailed(RuntimeError):
    """The workers ended without a result; the message is one line."""


class _NoPlace(GroupFailed):
    """No machines came for the workers."""


@dataclass(frozen=True)
class Layout:
    """What a group asks Ray for.

    Attributes:
        num_workers: processes; where there is `most_workers`, the fewest.
        threads: processor threads of each.
        uses_gpus: whether each has a GPU.
        gpus_per_worker: share of a GPU that each has where they are used.
        most_workers: of an elastic group, which has as many as there are places for; else None.
    """

    num_workers: int
    threads: int
    uses_gpus: bool
    gpus_per_worker: float = 1.0
    most_workers: int | None = None

    @property
    def resources(self) -> dict[str, float]:
        """Of one worker."""
        return {"CPU": float(self.threads)} | ({"GPU": self.gpus_per_worker} if self.uses_gpus else {})


def plan_layout(num_workers: int, flag: str = "--num-workers", most_workers: int | None = None) -> Layout:
    """Spread workers over what the cluster may have: one a GPU where there are any, else over processors.

    Where there is `most_workers`, `num_workers` are the fewest of an elastic group.

    Raises:
        InputError: it has too few.
    """
    nodes = possible_nodes()
    processors = [int(node.get("CPU", 0)) for node in nodes]
    # A worker with a GPU needs a processor as well.
    beside_gpus = [min(int(node.get("GPU", 0)), cpus) for node, cpus in zip(nodes, processors, strict=True)]
    uses_gpus = any(beside_gpus)
    slots = beside_gpus if uses_gpus else processors
    if num_workers > sum(slots):
        what = "GPUs (one worker each)" if uses_gpus else "processors"
        raise InputError(
            f"{flag} {num_workers}: the cluster has {sum(slots)} {what}; give {sum(slots)} or fewer"
        )
    if uses_gpus:
        shares = [cpus // count for cpus, count in zip(processors, slots, strict=True) if count]
        return Layout(num_workers, min(shares), uses_gpus=True, most_workers=most_workers)
    planned = num_workers if most_workers is None else min(most_workers, sum(slots))
    threads = max(slots)
    while sum(slot // threads for slot in slots) < planned:
        threads -= 1
    return Layout(num_workers, threads, uses_gpus=False, most_workers=most_workers)


def groups_at_once(layout: Layout) -> int:
    """How many such groups the cluster holds at a time, at least one."""
    nodes = possible_nodes()
    need = layout.resources
    places = sum(int(min(node.get(name, 0) // amount for name, amount in need.items())) for node in nodes)
    return max(1, places // layout.num_workers)


def run_group(
    job: Job,
    layout: Layout,
    on_event: Callable[[Event], None],
    on_progress: Callable[[int], None] = lambda updates: None,
    stop: Callable[[], bool] = lambda: False,
    max_failures: int = 0,
    mark: Mapping[str, float] | None = None,
) -> None:
    """Run a job's workers to their end, starting them anew where one dies.

    Args:
        job: the training.
        layout: its workers.
        on_event: receives the events that `workflows.worker` lists, in order; if it raises, the group
            is ended first.
        on_progress: receives the updates done, several times a second.
        stop: whether the training is to be stopped, after a checkpoint.
        max_failures: how often the workers may be started anew.
        mark: what each worker asks for besides the layout's, see `workflows.places`.

    Raises:
        GroupFailed: workers died more often than that, or the group could not start, or found no machines
            for half an hour.
    """
    mailbox = open_mailbox()
    failure: list[Exception] = []

    def fit(folder: str) -> None:
        trainer = TorchTrainer(
            run_worker,
            train_loop_config={"job": job, "mailbox": mailbox},
            torch_config=PreemptibleTorchConfig(timeout_s=_SECONDS_A_COLLECTIVE),
            scaling_config=ScalingConfig(
                num_workers=(layout.num_workers, layout.most_workers)
                if layout.most_workers
                else layout.num_workers,
                use_gpu=layout.uses_gpus,
                elastic_resize_monitor_interval_s=_SECONDS_BETWEEN_RESIZES,
                resources_per_worker={**layout.resources, **(mark or {})},
            ),
            run_config=RunConfig(
                name="group",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=max_failures),
                callbacks=[_TellOfFailures(mailbox)],
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            failure.append(error)

    waiting_since: float | None = time.monotonic()

    def look() -> None:
        nonlocal waiting_since
        events, updates = ray.get(mailbox.take.remote())
        for event in events:
            waiting_since = time.monotonic() if event["kind"] == "died" else None
            on_event(event)
        on_progress(updates)
        if waiting_since is not None and time.monotonic() - waiting_since > _SECONDS_TO_START:
            need = ", ".join(f"{amount:g} {name}" for name, amount in layout.resources.items())
            raise _NoPlace(
                f"no place for {layout.num_workers} workers ({need} each) within "
                f"{_SECONDS_TO_START / 60:.0f} minutes: see `ray status` on the cluster, and its quotas"
            )

    # Ray Train takes an old run of the same name and place for one to go on with; the job's own
    # checkpoints are what counts.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        thread = threading.Thread(target=fit, args=(folder,), name="ray train", daemon=True)
        thread.start()
        grace = _SECONDS_TO_STOP
        try:
            told = False
            while thread.is_alive():
                look()
                if stop() and not told:
                    ray.get(mailbox.want.remote("stop"))
                    told = True
                thread.join(_SECONDS_BETWEEN_LOOKS)
            look()
        except (KeyboardInterrupt, _NoPlace):
            grace = 0.0  # workers that never started cannot stop
            raise
        finally:
            _end(mailbox, thread, grace)
    if failure:
        raise GroupFailed(_one_line(failure[0]))


def _end(mailbox: Any, thread: threading.Thread, grace: float) -> None:
    """Let workers that still run stop within the grace time, in seconds, and leave none behind."""
    if thread.is_alive() and grace:
        ray.get(mailbox.want.remote("stop"))
        thread.join(grace)
    ray.kill(mailbox)  # a worker without its mailbox ends at once
    if grace:
        thread.join(grace)


class _TellOfFailures(UserCallback):
    """Posts why workers failed, from Ray Train's controller."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Post the reason."""
        event = {"kind": "died", "reason": _why(worker_exceptions)}
        ray.get(self._mailbox.post.remote(event), timeout=30.0)


def _why(worker_exceptions: dict[int, Exception]) -> str:
    """The reason of the worker that failed first, not of those that only lost touch with it."""
    for rank, error in worker_exceptions.items():
        if type(error).__name__ == "WorkerHealthCheckFailedError":
            return f"the process of worker {rank} died"
    own = [error for error in worker_exceptions.values() if "Connection" not in str(error)]
    return _one_line((own or list(worker_exceptions.values()))[0])


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
