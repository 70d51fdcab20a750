"""Sends what is to be logged to MLflow in the background, in order, and again until it gets through."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from mlflow.exceptions import MlflowException

# Codes of errors that pass. MLflow's client gives the first one to requests that reach no server, and its
# database store the second one to a database that is locked.
TRANSIENT_ERRORS = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
_FLUSH_TIMEOUT = 30.0  # seconds
_SECONDS_BETWEEN_ATTEMPTS = 1.0


class SendQueue:
    """A thread that runs jobs, each of which sends an entry.

    A job that fails because the store cannot be reached is tried again, and those after it wait. A job that
    the store refuses is left out, since it could never succeed.
    """

    def __init__(self) -> None:
        self._unsent = 0
        self._jobs: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], Any]) -> None:
        """Add a job."""
        self._jobs.put(job)

    def flush(self) -> None:
        """Wait until the jobs so far are done, for at most 30 seconds."""
        done = threading.Event()
        self._jobs.put(done.set)
        done.wait(_FLUSH_TIMEOUT)

    def close(self, request_timeout: float) -> int:
        """Wait until all jobs are done, for about 30 seconds; then give up on the rest.

        Args:
            request_timeout: seconds that a request in progress may take in addition.

        Returns:
            Number of entries that could not be sent.
        """
        self._jobs.put(None)
        self._deadline = time.monotonic() + _FLUSH_TIMEOUT
        self._thread.join(_FLUSH_TIMEOUT + request_timeout)
        return self._unsent

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            while not self._try(job):
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._unsent += 1
                    break
                time.sleep(_SECONDS_BETWEEN_ATTEMPTS)

    def _try(self, job: Callable[[], Any]) -> bool:
        """Run a job; return False if it should be tried again."""
        try:
            job()
        except MlflowException as error:
            if error.error_code in TRANSIENT_ERRORS:
                return False
            self._unsent += 1  # the store received and refused it
        except OSError:
            return False
        except Exception:  # of any kind: the entries after it must still be sent
            self._unsent += 1
        return True
