"""Ends a request's network calls when its time is up, it is not wanted any more, or memory is short."""

import re
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import onnxruntime

from diffusion.errors import InputError

_SECONDS_BETWEEN_LOOKS = 0.05
_OUT_OF_MEMORY = re.compile(r"bad_alloc|allocate memory|out of memory|OOM", re.IGNORECASE)


class Cancelled(RuntimeError):
    """A request ended because its `stop` was set."""


class OutOfMemory(RuntimeError):
    """A batch did not fit into memory; a smaller one may."""


def translated(error: Exception) -> InputError | OutOfMemory:
    """What an exception of ONNX Runtime, which has a class of its own for each status code, means here."""
    first_line = (str(error).splitlines() or [""])[0][:160]
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return OutOfMemory(first_line)
    return InputError(f"ONNX Runtime cannot run the model: {first_line}")


class Watch:
    """Watches over one request; a context manager. Calls of the network go through `run`.

    Args:
        time_limit: seconds that the request may take, or None.
        stop: set by anyone to end the request, or None.

    A graph from a stranger may loop for ever, so that looking between two calls is not enough: a call
    that is under way is ended too, by RunOptions.
    """

    def __init__(self, time_limit: float | None = None, stop: threading.Event | None = None) -> None:
        if time_limit is not None and not time_limit > 0.0:
            raise InputError(f"time_limit {time_limit:g}: give seconds, more than 0")
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = 4
        self._time_limit, self._stop = time_limit, stop
        self._ends = None if time_limit is None else time.monotonic() + time_limit
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        if self._ends is not None or self._stop is not None:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """call(*arguments, run options) of a session.

        Raises:
            Cancelled: `stop` was set.
            InputError: the time is up, or the graph cannot be run.
            OutOfMemory: as it says.
        """
        self._check()
        try:
            return call(*arguments, self._options)
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            self._check()
            raise translated(error) from error

    def _check(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise Cancelled("the request was cancelled")
        if self._ends is not None and time.monotonic() >= self._ends:
            raise InputError(
                f"time_limit {self._time_limit:g}: the seconds are over before the samples are drawn; give "
                "more, or ask for fewer samples or steps"
            )

    def _look(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            stopped = self._stop is not None and self._stop.is_set()
            if stopped or (self._ends is not None and time.monotonic() >= self._ends):
                self._options.terminate = True
                return
