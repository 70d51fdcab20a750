"""Whole programs with all their processes, watched from outside."""

import subprocess
import time
from collections.abc import Sequence
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
        seconds: how long it ran.
        cpu_seconds: of all its processes, each as last seen.
    """

    lines: list[tuple[float, str]] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def watch(command: Sequence[str], folder: Path) -> Watched:
    """Run a program in a folder to its end.

    Raises:
        ContenderFailed: its exit status is not 0; the message has its last lines.
    """
    watched, cpu, started = Watched(), {}, time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )

    def read() -> None:
        for line in process.stdout:
            watched.lines.append((time.monotonic() - started, line.rstrip()))

    reader, root = Thread(target=read), psutil.Process(process.pid)
    reader.start()
    while process.poll() is None:
        try:
            for each in [root, *root.children(recursive=True)]:
                times = each.cpu_times()
                cpu[each.pid, each.create_time()] = times.user + times.system
            watched.memory.append((time.monotonic() - started, root.memory_info().rss / 1e6))
        except psutil.Error:  # one has just ended
            pass
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    watched.seconds, watched.cpu_seconds = time.monotonic() - started, sum(cpu.values())
    reader.join()
    if process.returncode:
        raise ContenderFailed("\n".join(line for _, line in watched.lines[-10:]))
    return watched
