"""SIGTERM in a worker: its machine is about to be preempted. Training checks for it between updates."""

import signal
import threading
from typing import Any

from ray.train.torch import TorchConfig

_received = threading.Event()


def sigterm_received() -> bool:
    """Whether this process has received SIGTERM since the handler was installed."""
    return _received.is_set()


def install_sigterm_handler() -> None:
    """Record SIGTERM instead of exiting; must be called in the main thread of the process."""
    _received.clear()
    signal.signal(signal.SIGTERM, lambda *_: _received.set())


class _PreemptibleBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's torch backend, which also calls `install_sigterm_handler` in each worker's main thread.

    The training function cannot call it: it runs in another thread, where Python allows no signal handlers.
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(install_sigterm_handler)


class PreemptibleTorchConfig(TorchConfig):
    """`TorchConfig` whose workers record SIGTERM, see `sigterm_received`."""

    @property
    def backend_cls(self) -> type:
        """Backend class that Ray Train instantiates."""
        return _PreemptibleBackend
