"""Notice that the machine of this process is about to be taken away. Training checks for it between updates.

It comes as SIGTERM, or through Ray, whose autoscaler and `ray drain-node` announce which nodes will go.
"""

import signal
import threading
import time
from typing import Any

import ray
from ray._private.state import state
from ray.train.torch import TorchConfig

SECONDS_BETWEEN_QUESTIONS = 5.0
_received = threading.Event()


class PreemptionNotice:
    """Whether the machine of this process will be taken away.

    Ray is asked every five seconds at most, for what `ray.train.get_preemption_info` tells. That function
    also waits for all workers at every call, and no trial that trains in Tune's own process may call it.
    """

    def __init__(self) -> None:
        self._asked_at = -SECONDS_BETWEEN_QUESTIONS
        self._node_is_draining = False

    def received(self) -> bool:
        """Whether there was a notice; true from then on."""
        if not self._node_is_draining and time.monotonic() - self._asked_at >= SECONDS_BETWEEN_QUESTIONS:
            self._asked_at = time.monotonic()
            self._node_is_draining = node_is_draining()
        return self._node_is_draining or sigterm_received()


def node_is_draining() -> bool:
    """Whether Ray has been told that the node of this process will be taken away."""
    if not ray.is_initialized():  # Ray would start for the question
        return False
    try:
        return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()
    except Exception:  # Ray's server is busy or restarting: no notice is known
        return False


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
