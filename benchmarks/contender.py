"""A function that is measured in a process of its own, next to those that it is compared with.

    python -m benchmarks.contender benchmarks.peers.tutorial:train_heart '{"num_updates": 100}'

The named function prepares (imports, builds, warms up) and returns another one, which measures once. Each
line on standard input asks for a measurement; its figures are one line of JSON on standard output. So the
processes of a comparison stand ready side by side, and take turns.
"""

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

Figures = dict[str, float]  # by unit
Measure = Callable[[], Figures]

SECONDS, CPU_SECONDS, MEMORY = "s", "CPU s", "MB at most"


class ContenderFailed(RuntimeError):
    """A contender's process ended; the message has the last lines that it printed."""


@dataclass(frozen=True)
class Contender:
    """What is measured.

    Attributes:
        function: "MODULE:FUNCTION", called with the arguments; returns a `Measure`.
        arguments: keyword arguments that JSON can carry.
        fresh: whether every measurement has a new process, because its start counts.
    """

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False


class Running:
    """A contender's process; a context manager that ends it."""

    def __init__(self, contender: Contender) -> None:
        self._log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "benchmarks.contender", contender.function]
        self._process = subprocess.Popen(
            [*command, json.dumps(contender.arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()

    def measure(self) -> Figures:
        """Measure once.

        Raises:
            ContenderFailed: the process has ended.
        """
        with contextlib.suppress(BrokenPipeError):
            print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise ContenderFailed(self._log.read()[-2000:])
        return json.loads(line)


def timed(run: Callable[[], object]) -> Figures:
    """Seconds and CPU seconds (user and system, of all threads) of one call."""
    started, cpu = time.perf_counter(), time.process_time()
    run()
    return {SECONDS: time.perf_counter() - started, CPU_SECONDS: time.process_time() - cpu}


def since_start() -> Figures:
    """Seconds since this process was started, its CPU seconds, and its peak memory up to now."""
    seconds = time.time() - psutil.Process().create_time()
    return {SECONDS: seconds, CPU_SECONDS: time.process_time(), MEMORY: peak_memory()}


def peak_memory() -> float:
    """Peak memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the process that this one was started from, too
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main(function: str, arguments: str) -> None:
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the contender prints goes to the log
    module, _, name = function.partition(":")
    measure: Measure | None = None
    for _ in sys.stdin:  # the first line starts the preparation, in which others must be idle, too
        measure = measure or getattr(importlib.import_module(module), name)(**json.loads(arguments))
        figures = measure()
        print(json.dumps({MEMORY: peak_memory()} | figures), file=results, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
