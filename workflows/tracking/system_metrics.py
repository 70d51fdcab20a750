"""Use of this machine's processors, memory, disks, network and GPUs, sampled in the background."""

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

_PREFIX = "system/"  # MLflow shows these on a page of their own
_SECONDS_BETWEEN_SAMPLES = 10.0


class SystemMetrics:
    """Samples the use of this machine until it is stopped.

    Without the package psutil nothing is sampled; without nvidia-ml-py GPUs are not.

    Args:
        log: receives the metrics of each sample, and the seconds since 1970.
        interval: seconds between samples.
    """

    def __init__(
        self, log: Callable[[dict[str, float], int], None], interval: float = _SECONDS_BETWEEN_SAMPLES
    ) -> None:
        self._log, self._interval = log, interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling."""
        self._stopped.set()

    def _run(self) -> None:
        monitors = _monitors()
        _sample(monitors)  # processor use is that since the sample before
        while monitors and not self._stopped.wait(self._interval):
            self._log(_sample(monitors), int(time.time()))


def _monitors() -> list[Any]:
    """MLflow's monitors that work on this machine; none without psutil."""
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    except ImportError:
        return []
    monitors = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with suppress(Exception):  # no GPU, no driver, or no permission to read a counter
            monitors.append(kind())
    return monitors


def _sample(monitors: Iterable[Any]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for monitor in monitors:
        with suppress(Exception):
            monitor.collect_metrics()
            metrics |= monitor.aggregate_metrics()
            monitor.clear_metrics()
    return {_PREFIX + name: value for name, value in metrics.items()}
