"""Whole programs with all their processes, watched from outside."""

import resource
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import psutil

from benchmarks.contender import ContenderFailed

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass
class Watched:
    """What was seen of a program.

    Attributes:
        lines: (seconds since its start, line) of what it printed.
        memory: (seconds since its start, MB) of its first process.
        usage: (seconds since its start, MB, open file descriptors) of all its processes together.
        seconds: how long it ran.
        cpu_seconds: of all its processes, those that it did not wait for as last seen.
    """

    lines: list[tuple[float, str]] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    usage: list[tuple[float, float, int]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def watch(command: Sequence[str], folder: Path) -> Watched:
    """Run a program in a folder to its end.

    Raises:
        ContenderFailed: its exit status is not 0; the message has its last lines.
    """
    watched, cpu, before, started = Watched(), {}, _waited_for(), time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )

    def read() -> None:
        with process.stdout as printed:
            for line in printed:
                watched.lines.append((time.monotonic() - started, line.rstrip()))

    reader, root = Thread(target=read), psutil.Process(process.pid)
    reader.start()
    while process.poll() is None:
        with suppress(psutil.Error):  # it has just ended
            watched.memory.append((time.monotonic() - started, root.memory_info().rss / 1e6))
            memory, descriptors = 0.0, 0
            for each in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error):
                    times = each.cpu_times()
                    cpu[each.pid, each.create_time()] = times.user + times.system
                    memory += each.memory_info().rss / 1e6
                    descriptors += each.num_fds()
            watched.usage.append((time.monotonic() - started, memory, descriptors))
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    waited_for = _waited_for() - before
    watched.seconds, watched.cpu_seconds = time.monotonic() - started, max(waited_for, sum(cpu.values()))
    reader.join()
    if process.returncode:
        raise ContenderFailed("\n".join(line for _, line in watched.lines[-10:]))
    return watched


def _waited_for() -> float:
    """CPU seconds of all processes that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
