"""Guards a sampling request: ends it on a time limit or cancellation, and recognises a lack of memory."""

import re
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import onnxruntime

from diffusion.errors import InputError
from export.values import real_number

WATCHER_THREAD = "sampling-request-watcher"

_SECONDS_BETWEEN_POLLS = 0.05
_OUT_OF_MEMORY = re.compile(r"bad_alloc|allocate memory|out of memory|OOM", re.IGNORECASE)


class Cancelled(RuntimeError):
    """A request was ended by its `stop` event."""


class OutOfMemory(RuntimeError):
    """A batch did not fit into memory; a smaller one may fit."""


def translate_error(error: Exception) -> InputError | OutOfMemory:
    """Convert an exception of ONNX Runtime, which has an exception class per status code."""
    first_line = (str(error).splitlines() or [""])[0][:160]
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return OutOfMemory(first_line)
    return InputError(f"ONNX Runtime cannot run the model: {first_line}")


class RequestGuard:
    """Context manager that guards one request, whose calls of the network go through `run`.

    An untrusted graph may loop for ever, so checking between two calls is not enough: a watcher thread
    also terminates the call in progress, through ONNX Runtime's RunOptions.

    Args:
        time_limit: time that the request may take, in seconds from entering the context, or None for no
            limit.
        stop: event that ends the request when set, or None.

    Raises:
        InputError: the time limit is not positive.
    """

    def __init__(self, time_limit: float | None = None, stop: threading.Event | None = None) -> None:
        if time_limit is not None:
            time_limit = real_number("time_limit", time_limit)
            if not time_limit > 0.0:
                raise InputError(f"time_limit {time_limit:g}: give a number of seconds greater than 0")
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = 4
        self._time_limit, self._stop = time_limit, stop
        self._deadline: float | None = None
        self._finished = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "RequestGuard":
        if self._time_limit is not None:
            self._deadline = time.monotonic() + self._time_limit
        if self._deadline is not None or self._stop is not None:
            self._watcher = threading.Thread(target=self._watch, name=WATCHER_THREAD, daemon=True)
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        if self._watcher is not None:
            self._watcher.join()

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Run a method of a session as `call(*arguments, run_options)`.

        Raises:
            Cancelled: `stop` was set.
            InputError: the time limit was exceeded, or the graph cannot be run.
            OutOfMemory: the batch did not fit into memory.
        """
        self._check()
        try:
            return call(*arguments, self._options)
        except Exception as error:  # ONNX Runtime has an exception class per status code
            self._check()
            raise translate_error(error) from error

    def _check(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise Cancelled("the request was cancelled")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise InputError(
                f"time_limit {self._time_limit:g}: drawing the samples takes more seconds than that; "
                "raise the limit, or ask for fewer samples or steps"
            )

    def _watch(self) -> None:
        while not self._finished.wait(_SECONDS_BETWEEN_POLLS):
            stopped = self._stop is not None and self._stop.is_set()
            if stopped or (self._deadline is not None and time.monotonic() >= self._deadline):
                self._options.terminate = True
                return
