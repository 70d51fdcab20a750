"""One thread for each device, which does everything on it: copies, allocations, captures and launches.

CUDA graphs are captured in global mode, so that a copy by any other thread breaks the capture, and belong to
the thread that captured them. All samplers of a process therefore share the thread of their device.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

_Job = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class DeviceThread:
    """Runs calls one after the other, in the order in which they were submitted, in a thread of its own.

    Unlike with an executor, `submit` may be called while the same thread is inside of it: the garbage
    collector may end an abandoned request at any time, and what that gives back is submitted.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Queue a call."""
        future: Future[Any] = Future()
        self._jobs.put((future, call, arguments))
        return future

    def _work(self) -> None:
        while True:
            future, call, arguments = self._jobs.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            # What a finished call has used is not kept until the next one.
            del future, call, arguments


_lock = threading.Lock()
_threads: dict[tuple[int, str, int], DeviceThread] = {}


def device_thread(device: str, device_id: int) -> DeviceThread:
    """The thread of a device. A process that was forked has threads of its own."""
    key = (os.getpid(), device, device_id)
    with _lock:
        if key not in _threads:
            _threads[key] = DeviceThread(f"{device}-{device_id}")
        return _threads[key]
