"""Plugin of coverage: Ray kills its workers without exit handlers, so they save their data as they go."""

import sys
import threading
import time

import coverage


def coverage_init(_registry, _options):
    """Coverage calls this when it starts in a process."""
    if any(argument.endswith("default_worker.py") for argument in sys.orig_argv):
        threading.Thread(target=_save_repeatedly, name="coverage", daemon=True).start()


def _save_repeatedly():
    while True:
        time.sleep(0.5)
        measurement = coverage.Coverage.current()
        if measurement is not None:
            measurement.save()
