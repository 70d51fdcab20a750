"""SIGTERM in a worker: a machine that is about to go. It is noted here and acted on between updates."""

import signal
import threading
from typing import Any

from ray.train.torch import TorchConfig

_terminated = threading.Event()


def was_terminated() -> bool:
    """Whether this process has been told to end."""
    return _terminated.is_set()


def note_sigterm() -> None:
    """Note SIGTERM instead of ending at once. Only a process's main thread can call it."""
    _terminated.clear()
    signal.signal(signal.SIGTERM, lambda *_: _terminated.set())


class _NotingBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Torch's process group, and `note_sigterm` in each worker's main thread.

    The training function runs in a thread of its own, where Python allows no signal handler.
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(note_sigterm)


class PreemptibleTorchConfig(TorchConfig):
    """`TorchConfig` whose workers note SIGTERM."""

    @property
    def backend_cls(self) -> type:
        """The backend that Ray Train starts."""
        return _NotingBackend
