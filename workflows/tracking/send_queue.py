"""Sends the entries of an outbox in the background, in order, and again until they get through."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from enum import Enum, auto
from typing import Any

from workflows.tracking.entries import Entry
from workflows.tracking.outbox import Outbox

_PATIENCE = 30.0  # seconds that anybody waits for a store that takes nothing
_PATIENCE_WITH_A_REQUEST = 90.0  # seconds that an upload may take
_SECONDS_BETWEEN_ATTEMPTS = 1.0
_SECONDS_BETWEEN_LOOKS = 0.1


class Refused(RuntimeError):
    """The store refused an entry, and always would; the message is one line."""


class _Mark(Enum):
    """What stands in the queue beside entries."""

    HERE = auto()  # all before it are sent or refused
    END = auto()


class SendQueue:
    """A thread that sends entries.

    An entry that cannot be sent is tried again, and those after it wait. An entry that the store refuses for
    good is left out.

    Args:
        send: sends an entry. It raises `Refused`, or any other exception if the entry should be tried again.
        outbox: keeps the entries that are not sent yet; None: they are lost with this process.

    Attributes:
        refused: why entries were refused, one line each.
    """

    def __init__(self, send: Callable[[Entry], Any], outbox: Outbox | None = None) -> None:
        self._send, self._outbox = send, outbox
        self.refused: list[str] = []
        self._items: queue.SimpleQueue[tuple[Entry | _Mark, Future[Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # for the same order in the queue and in the outbox
        self._num_put = self._num_done = 0
        self._failing_since: float | None = None
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, entry: Entry, *, is_kept: bool = True) -> "Future[Any]":
        """Add an entry, and return what its sending will return or raise.

        Args:
            entry: the entry.
            is_kept: whether the outbox is to keep it; False if it has it already.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._outbox is not None and is_kept:
                self._outbox.append(entry)
            self._num_put += 1
            self._items.put((entry, future))
        return future

    def flush(self) -> bool:
        """Wait until the entries so far are sent or refused; return False if the store does not take them."""
        future: Future[Any] = Future()
        self._items.put((_Mark.HERE, future))
        return self.wait_for(future)

    def wait_for(self, future: "Future[Any]") -> bool:
        """Wait until an entry is sent or refused; return False if the store takes none for 30 seconds."""
        return self._wait(lambda: _is_done(future, _SECONDS_BETWEEN_LOOKS))

    def close(self) -> int:
        """Wait until all entries are sent; give up when the store has taken none for 30 seconds.

        Returns:
            Number of entries that could not be sent; the outbox has them.
        """
        self._items.put((_Mark.END, Future()))
        self._wait(lambda: _has_ended(self._thread))
        return self.abandon()

    def abandon(self) -> int:
        """Stop sending after the attempt in progress, and return the number of entries that are not sent."""
        self._abandoned.set()
        self._items.put((_Mark.END, Future()))
        return self.num_unsent

    @property
    def num_unsent(self) -> int:
        """Number of entries that are not sent, but may be later."""
        return self._num_put - self._num_done

    def _wait(self, is_over: Callable[[], bool]) -> bool:
        """Wait until something is over; return False if the store takes nothing for long."""
        num_done, since = self._num_done, time.monotonic()
        while not is_over():
            if self._num_done > num_done:
                num_done, since = self._num_done, time.monotonic()
            failing_since = self._failing_since
            if time.monotonic() > since + _PATIENCE_WITH_A_REQUEST:
                return False
            if failing_since is not None and time.monotonic() > failing_since + _PATIENCE:
                return False
        return True

    def _run(self) -> None:
        while True:
            entry, future = self._items.get()
            if entry is _Mark.END or self._abandoned.is_set():
                return
            if entry is _Mark.HERE:
                future.set_result(None)
                continue
            while not self._try(entry, future):
                if self._abandoned.wait(_SECONDS_BETWEEN_ATTEMPTS):
                    return

    def _try(self, entry: Entry, future: "Future[Any]") -> bool:
        """Send an entry; return False if it should be tried again."""
        started = time.monotonic()
        try:
            result = self._send(entry)
        except Refused as error:
            self.refused.append(str(error))
            self._done()
            future.set_exception(error)
        except Exception:
            self._failing_since = self._failing_since or started
            return False
        else:
            self._done()
            future.set_result(result)
        self._failing_since = None
        return True

    def _done(self) -> None:
        self._num_done += 1
        if self._outbox is not None and not self._abandoned.is_set():  # else somebody else may use it by now
            self._outbox.mark_done(self._outbox.num_done + 1)


def _is_done(future: "Future[Any]", seconds: float) -> bool:
    """Whether an entry is sent or refused within some seconds."""
    with suppress(TimeoutError):
        future.exception(seconds)
    return future.done()


def _has_ended(thread: threading.Thread) -> bool:
    thread.join(_SECONDS_BETWEEN_LOOKS)
    return not thread.is_alive()
