"""Guards a sampling request: ends it on a time limit or cancellation, and recognises a lack of memory."""

import re
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import onnxruntime

from diffusion.errors import InputError
from export.device_thread import DeviceThread
from export.values import real_number

WATCHER_THREAD = "sampling-request-watcher"

_SECONDS_BETWEEN_POLLS = 0.05
# What ONNX Runtime, CUDA, cuBLAS and cuDNN say. cuBLAS cannot make its handle, and cuDNN reports an internal
# error, where there is too little memory for what they allocate themselves.
_OUT_OF_MEMORY = re.compile(
    r"bad_alloc|allocate memory|out of memory|\bOOM\b|bfc_?arena|cudaErrorMemoryAllocation|"
    r"CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|"
    r"CUDNN_STATUS_(ALLOC_FAILED|INTERNAL_ERROR|EXECUTION_FAILED_CUDART)|ALLOCATION_FAILED",
    re.IGNORECASE,
)


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

    @property
    def options(self) -> onnxruntime.RunOptions:
        """Options of every run of a session in this request, by which it is ended."""
        return self._options

    def run(self, call: Callable[..., Any], *arguments: Any, on: DeviceThread | None = None) -> Any:
        """Run a method of a session as `call(*arguments, run_options)`.

        Args:
            call, arguments: the method and its arguments.
            on: thread that does it; None for this one.

        Raises:
            Cancelled: `stop` was set.
            InputError: the time limit was exceeded, or the graph cannot be run.
            OutOfMemory: the batch did not fit into memory.
        """
        return self.do(call, *arguments, self._options, on=on)

    def do(self, call: Callable[..., Any], *arguments: Any, on: DeviceThread | None = None) -> Any:
        """Make any call that uses the device, such as a copy; as for `run`, but without run options."""
        self.check()
        if on is not None:
            return self.wait(on.submit(call, *arguments))
        try:
            return call(*arguments)
        except Exception as error:  # ONNX Runtime has an exception class per status code
            self.check()
            raise translate_error(error) from error

    def wait(self, future: "Future[Any]") -> Any:
        """Wait for a call in another thread, no longer than the request may take.

        A call that has not begun by then never does. One that is under way goes on in its thread, unless it
        is a session's run, which is terminated; what is submitted to that thread later comes after it.

        Raises:
            As for `run`.
        """
        try:
            while True:
                done, _ = futures.wait([future], timeout=_SECONDS_BETWEEN_POLLS)
                if done:
                    break
                self.check()
            return future.result()
        except (Cancelled, InputError, OutOfMemory):
            future.cancel()
            raise
        except Exception as error:
            self.check()
            raise translate_error(error) from error
        except BaseException:  # Ctrl-C
            self._options.terminate = True
            future.cancel()
            raise

    def check(self) -> None:
        """Raise Cancelled or InputError if the request is over, as `run` does before a call."""
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
