"""Do memory or open files grow while a process samples for long, or a sweep has many trials?

    python -m benchmarks.endurance                               # 30 minutes of sampling, 200 trials
    python -m benchmarks.endurance sampling --minutes 5 --file sampler.onnx

The sampling process draws by requests of random sizes, samplers and seeds, by whole calls and by streams that
are left before their end, in two threads; a tenth of the requests is refused or cancelled. The sweep is that
of `benchmarks.sweeps`. Compared are the medians over the second and the last quarter of the time: what a
process needs, it has by then. Prints the table of benchmarks/results/reliability.md, and ends with status 1
if something grew by more than 2% and, of memory, 5 MB.
"""

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.fuzz import own_files
from benchmarks.options import at_least_one, one_of
from benchmarks.programs import watch
from benchmarks.sweeps import sweep_command, trial_ends
from diffusion.errors import InputError
from diffusion.registry import SAMPLERS
from export.sampler import Cancelled, Sampler

NAMES = ("sampling", "sweep")
MEMORY, DESCRIPTORS = "memory, MB", "open files"
_SECONDS_BETWEEN_LOOKS = 2.0
_TOLERANCE, _MEMORY_TOLERANCE = 0.02, 5.0


@dataclass
class Growth:
    """What was used, over time.

    Attributes:
        work: what ran, in words.
        memory: MB, at even intervals.
        descriptors: open file descriptors, at the same times; empty if they were not counted.
    """

    work: str
    memory: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def rows(self) -> list[str]:
        """Rows of the table."""
        return [
            f"| {self.work} | {name} | {_second_quarter(values):.0f} | {_last_quarter(values):.0f} |"
            for name, values in ((MEMORY, self.memory), (DESCRIPTORS, self.descriptors))
            if values
        ]

    def grown(self) -> list[str]:
        """What has grown, in words."""
        return [
            f"{self.work}: {name}"
            for name, values, least in (
                (MEMORY, self.memory, _MEMORY_TOLERANCE),
                (DESCRIPTORS, self.descriptors, 1.0),
            )
            if values
            and _last_quarter(values) - _second_quarter(values)
            > max(least, _TOLERANCE * _second_quarter(values))
        ]


def _second_quarter(values: Sequence[float]) -> float:
    return statistics.median(values[len(values) // 4 : max(len(values) // 2, 1)])


def _last_quarter(values: Sequence[float]) -> float:
    return statistics.median(values[3 * len(values) // 4 :])


def draw_something(sampler: Sampler, rng: random.Random) -> None:
    """A random request, which may be refused, cancelled or left before its end."""
    count, seed = rng.choice([1, 3, 16, 64]), rng.randrange(1000)
    name, steps = rng.choice(list(SAMPLERS)), rng.randrange(2, 15)
    match rng.randrange(10):
        case 0:
            with suppress(InputError):
                sampler.sample(count, num_steps=10**6)
        case 1:
            stop = threading.Event()
            stop.set()
            with suppress(Cancelled):
                sampler.sample(count, seed=seed, stop=stop)
        case 2 | 3:
            for preview in sampler.stream(count, seed=seed, sampler=name, num_steps=steps):
                if rng.random() < 0.2:
                    break
                assert len(preview.samples)
        case _:
            sampler.sample(count, seed=seed, sampler=name, num_steps=steps)


def sampling(path: Path, minutes: float) -> Growth:
    """Sample in two threads for so long; raises what a request raised that it should not."""
    sampler, deadline = Sampler(path, provider="cpu"), time.monotonic() + 60.0 * minutes
    failed = threading.Event()

    def work(seed: int) -> int:
        rng, num_requests = random.Random(seed), 0
        while time.monotonic() < deadline and not failed.is_set():
            try:
                draw_something(sampler, rng)
            except BaseException:
                failed.set()
                raise
            num_requests += 1
        return num_requests

    process, growth = psutil.Process(), Growth("sampling")
    with ThreadPoolExecutor() as threads:
        working = [threads.submit(work, seed) for seed in (0, 1)]
        is_over = False
        while not is_over:
            growth.memory.append(process.memory_info().rss / 1e6)
            growth.descriptors.append(process.num_fds())
            is_over = not wait(working, _SECONDS_BETWEEN_LOOKS).not_done
    num_requests = sum(each.result() for each in working)
    growth.work = f"{minutes:g} minutes of sampling, {num_requests:,} requests"
    return growth


def sweep(num_trials: int) -> list[Growth]:
    """Run a sweep of tiny trials; its driver, and all its processes until the last trial is over."""
    with tempfile.TemporaryDirectory() as folder:
        seen = watch(sweep_command(num_trials), Path(folder))
    last = trial_ends(seen)[-1]
    used = [each for each in seen.usage if each[0] <= last]
    driver = [memory for second, memory in seen.memory if second <= last]
    everything = Growth(
        f"{num_trials} trials, all processes", [each[1] for each in used], [each[2] for each in used]
    )
    return [Growth(f"{num_trials} trials, the driver", driver), everything]


def main(arguments: list[str] | None = None) -> int:
    """Run what is named, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.endurance",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        type=one_of(NAMES),
        metavar="NAME",
        help=f"any of {', '.join(NAMES)} (default: all)",
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of sampling (default: 30)")
    parser.add_argument("--file", type=Path, help="a sampler.onnx (default: one with convolutions)")
    parser.add_argument("--trials", type=at_least_one, default=200, help="of the sweep (default: 200)")
    options = parser.parse_args(arguments)
    found: list[Growth] = []
    names = options.names or NAMES
    if "sampling" in names:
        with tempfile.TemporaryDirectory() as folder:
            file = options.file or next(
                path for path in own_files(Path(folder)) if "convolutions" in path.name
            )
            found.append(sampling(file, options.minutes))
    if "sweep" in names:
        found += sweep(options.trials)
    print("| work | | second quarter | last quarter |")
    print("|---|---|---|---|")
    print("\n".join(row for each in found for row in each.rows()))
    grown = [line for each in found for line in each.grown()]
    for line in grown:
        print(f"grew: {line}", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
