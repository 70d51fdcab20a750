"""A convolutional network on the CPU, whose batches are divided among the cores."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.contract import X
from export.limits import RequestGuard

_BALANCED = 0.8  # share of the threads' time that a division must use, else operators are divided instead


class Network(Protocol):
    """What runs the network."""

    def run(
        self, outputs: list[str], inputs: dict[str, NDArray[Any]], guard: RequestGuard
    ) -> list[NDArray[np.float32]]:
        """Compute these outputs; raises as `RequestGuard.run`."""


class DividedNetwork:
    """Computes parts of a batch side by side, each by one thread.

    A session with several threads divides every operator among them, and they wait for each other after each
    one; parts of a batch wait once a call. `benchmarks/NOTES.md` has the gain. The threads are shared by all
    requests, so that those that come at the same time do not fight for the cores.

    Args:
        whole: computes batches that cannot be divided evenly, such as a single example.
        open_single: opens the network in a session with one thread; called when it is needed first.
        num_threads: number of parts.
    """

    def __init__(
        self, whole: Network, open_single: Callable[[], onnxruntime.InferenceSession], num_threads: int
    ) -> None:
        self._whole, self._open_single, self._num_threads = whole, open_single, num_threads
        self._single: onnxruntime.InferenceSession | None = None
        self._threads: tuple[int, ThreadPoolExecutor] | None = None  # with the process that they belong to
        self._lock = threading.Lock()

    def run(
        self, outputs: list[str], inputs: dict[str, NDArray[Any]], guard: RequestGuard
    ) -> list[NDArray[np.float32]]:
        """Compute these outputs; raises as `RequestGuard.run`."""
        count = len(inputs[X])
        largest = -(-count // self._num_threads)
        if self._num_threads == 1 or count < _BALANCED * largest * self._num_threads:
            return self._whole.run(outputs, inputs, guard)
        guard.check()
        session, threads = self._opened()
        bounds = [count * part // self._num_threads for part in range(self._num_threads + 1)]
        parts = [
            {name: value[first:stop] for name, value in inputs.items()} for first, stop in pairwise(bounds)
        ]
        runs = [threads.submit(session.run, outputs, part, guard.options) for part in parts]
        values = [guard.wait(run) for run in runs]
        return [np.concatenate(each) for each in zip(*values, strict=True)]

    def _opened(self) -> tuple[onnxruntime.InferenceSession, ThreadPoolExecutor]:
        with self._lock:
            if self._single is None:
                self._single = self._open_single()
            if self._threads is None or self._threads[0] != os.getpid():
                self._threads = os.getpid(), ThreadPoolExecutor(self._num_threads)
            return self._single, self._threads[1]
