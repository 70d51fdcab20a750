"""What SIGTERM and SIGHUP do: the same as Ctrl-C. Needs only the standard library."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# `timeout` and systemd send a second signal right after the first one; only a later one means "at once".
_SECONDS_OF_ONE_REQUEST = 2.0
_NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_last_request = float("-inf")


def treat_as_interrupt() -> None:
    """Handle SIGTERM and SIGHUP like Ctrl-C: a clean stop that closes every run.

    A signal that is ignored stays ignored, as with nohup. Only the main thread may set handlers; in others
    nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Call the handler of Ctrl-C, also where Ctrl-C itself is ignored, as in the background of a script."""
    global _last_request
    now = time.monotonic()
    is_repeated, _last_request = now < _last_request + _SECONDS_OF_ONE_REQUEST, now
    if is_repeated:
        return
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)
    else:
        raise KeyboardInterrupt


@contextmanager
def remember_interrupts() -> Iterator[Callable[[], None]]:
    """Remember an interrupt that nothing hears: Python ignores an exception in a library's callback.

    Only the main thread may set handlers; in others nothing is remembered.

    Yields:
        Function that raises KeyboardInterrupt if Ctrl-C was pressed since the context was entered.
    """
    was_interrupted = False

    def check() -> None:
        if was_interrupted:
            raise KeyboardInterrupt

    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield check
        return

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        previous(number, frame)

    signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
