"""Access to a storage that may never answer."""

import threading
from collections.abc import Callable


class Attempt:
    """An action in a thread, since neither access to a dead mount nor looking up a dead server has a timeout.

    Args:
        action: starts at once, and goes on even if nobody waits for it any more.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="storage", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the action has not returned yet."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait until the action has returned.

        Raises:
            TimeoutError: it has not within these seconds.
            Exception: what the action raised.
        """
        self._thread.join(seconds)
        if self.is_running:
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._action()
        except Exception as error:
            self._error = error
