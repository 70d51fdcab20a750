"""Damage files in random ways, read each copy, and count what went wrong.

    python -m benchmarks.fuzz --minutes 60                        # files of its own, in turns
    python -m benchmarks.fuzz sampler.onnx table.csv --copies 300 --seed 1

Files that end in .onnx are opened, and two samples drawn; others are read as tables. A copy must be read, or
refused by an InputError of one short line. Anything else that is raised, a process that dies, one that has
not answered after 10 seconds of CPU time or two minutes, and one that grows by more than 1 GB are found, and
their copies are kept in --folder. Each kind of file is read in a process of its own, which is started again
when it dies.
Prints the table of benchmarks/results/reliability.md, and ends with status 1 if anything was found.
"""

import argparse
import contextlib
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks.contender import peak_memory
from benchmarks.options import at_least_one
from diffusion.errors import InputError

_LONGEST = 10.0  # seconds of CPU time for a copy: other programs may keep the cores busy
_LONGEST_WAIT = 120.0  # seconds, for one that waits for something
_MOST_GROWTH = 1000.0  # MB beyond what the undamaged file took
_LONGEST_MESSAGE = 900  # characters
_LONGEST_START = 300.0  # seconds until a process has read the undamaged file
# What parsers of text take for something else than a number.
_TOKENS = (b"nan", b"-inf", b"1e999", b'"', b",", b"\n", b"\r", b"\x00", b"\xff\xfe", b"9" * 40, b";", b"\t")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Damage a copy at random positions, more often at its start (the graph) and end (the metadata)."""
    data = bytearray(content)

    def position() -> int:
        return rng.choice(
            [
                rng.randrange(min(4000, len(data))),
                rng.randrange(len(data)),
                len(data) - 1 - rng.randrange(min(6000, len(data))),
            ]
        )

    match rng.choice(["bit", "bytes", "cut", "zeros", "swap", "insert", "token"]):
        case "bit":
            data[position()] ^= 1 << rng.randrange(8)
        case "bytes":
            for _ in range(rng.randrange(2, 30)):
                data[position()] = rng.randrange(256)
        case "cut":
            del data[position() :]
        case "zeros":
            start, size = position(), rng.randrange(1, 50)
            data[start : start + size] = bytes(size)
        case "swap":
            first, second, size = position(), position(), rng.randrange(1, 60)
            data[first : first + size], data[second : second + size] = (
                data[second : second + size],
                data[first : first + size],
            )
        case "insert":
            start = position()
            data[start:start] = rng.randbytes(rng.randrange(1, 20))
        case "token":
            start = position()
            data[start : start + rng.randrange(3)] = rng.choice(_TOKENS)
    return bytes(data)


def read_model(path: Path) -> None:
    """Open a sampler.onnx and draw two samples."""
    from export.sampler import Sampler

    samples = Sampler(path.read_bytes(), provider="cpu").sample(2, num_steps=2, time_limit=_LONGEST - 2.0)
    assert samples.shape[0] == 2


def read_table(path: Path) -> None:
    """Read a table, as a training does."""
    from diffusion.config import DataConfig
    from diffusion.data.dataset import load_dataset

    assert len(load_dataset(DataConfig(name=str(path))).train)


def outcome(read: Callable[[Path], None], path: Path) -> str:
    """Read a copy; returns "read", "refused", or what went wrong."""
    try:
        read(path)
    except InputError as error:
        message = str(error)
        if message and len(message.splitlines()) == 1 and len(message) < _LONGEST_MESSAGE:
            return "refused"
        return f"refused, but not in one short line: {message!r}"
    except Exception:
        return traceback.format_exc()
    return "read"


def _answer(connection: Connection, path: Path, copy: Path, seed: int, read: Callable[[Path], None]) -> None:
    """Damage and read a copy whenever the other side asks: the process of one file."""
    content, rng = path.read_bytes(), random.Random(seed)
    connection.send((outcome(read, path), peak_memory()))
    with contextlib.suppress(EOFError):
        while True:
            connection.recv()
            copy.write_bytes(damaged(content, rng))
            connection.send((outcome(read, copy), peak_memory()))


@dataclass
class Fuzzing:
    """Copies of one file, read in a process.

    Args:
        path: the file, which can be read.
        seed: of the damage.
        folder: for the copies.
        read: reads a file; None: by its suffix.

    Attributes:
        counts: how many copies were read and refused.
        found: what went wrong, in words.
        slowest: longest time in seconds that a copy took.
        growth: MB that the process has grown by at most.

    Raises:
        InputError: the file cannot be read.
    """

    path: Path
    seed: int
    folder: Path
    read: Callable[[Path], None] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)
    slowest: float = 0.0
    growth: float = 0.0

    def __post_init__(self) -> None:
        self._copy = self.folder / f"copy-of-{self.path.name}"
        self._processes = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        read = self.read or (read_model if self.path.suffix == ".onnx" else read_table)
        arguments = (theirs, self.path, self._copy, self.seed + 1000 * self._processes, read)
        self._processes += 1
        self._process: Any = context.Process(target=_answer, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        if not self._connection.poll(_LONGEST_START):
            raise InputError(f"{self.path}: reading the undamaged file takes too long; give a smaller one")
        result, self._first_peak = self._connection.recv()
        if result != "read":
            raise InputError(f"{self.path} cannot be read undamaged: give a sampler.onnx or a table")

    def read_copies(self, count: int) -> None:
        """Damage and read so many copies."""
        for _ in range(count):
            started, wrong = time.monotonic(), ""
            try:
                self._connection.send("next")
                if self._answers():
                    result, peak = self._connection.recv()
                    self.growth = max(self.growth, peak - self._first_peak)
                    if result in ("read", "refused"):
                        self.counts[result] += 1
                    else:
                        wrong = result
                    if peak - self._first_peak > _MOST_GROWTH:
                        wrong = f"grew by {peak - self._first_peak:.0f} MB"
                        self._first_peak = peak
                else:
                    wrong = f"no answer after {time.monotonic() - started:.0f} s"
            except (EOFError, BrokenPipeError):
                self._process.join()
                wrong = f"died, exit code {self._process.exitcode}"
            self.slowest = max(self.slowest, time.monotonic() - started)
            if wrong:
                self._keep(wrong)
            if wrong.startswith(("died", "no answer")):
                self.close()
                self._start()

    def _answers(self) -> bool:
        """Wait for the answer; False if it takes too long."""
        give_up, most = time.monotonic() + _LONGEST_WAIT, self._cpu_seconds() + _LONGEST
        while not self._connection.poll(0.1):
            if time.monotonic() > give_up or self._cpu_seconds() > most:
                return False
        return True

    def _cpu_seconds(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:  # the connection says so
            return 0.0
        return float(times.user + times.system)

    def _keep(self, wrong: str) -> None:
        kept = self.folder / f"found-{len(self.found)}-{self.path.name}"
        if self._copy.exists():
            kept.write_bytes(self._copy.read_bytes())
        self.found.append(f"{kept.name}: {wrong}")
        print(self.found[-1], file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.join()

    def row(self) -> str:
        """Its row of the table."""
        return (
            f"| {self.path.name} | {self.counts['refused']} | {self.counts['read']} | {self.slowest:.1f} s | "
            f"{self.growth:.0f} MB | {len(self.found) or 'nothing'} |"
        )


def own_files(folder: Path) -> list[Path]:
    """Write a model of points, one of images with classes and one with convolutions, and three tables."""
    import numpy as np
    import pandas as pd
    import torch

    from diffusion.data.dataset import load_dataset
    from diffusion.networks.build import build_network
    from diffusion.presets import preset
    from diffusion.training.checkpoints import TrainedModel
    from export.to_onnx import export_onnx

    small = {"schedule.num_train_timesteps": 20, "network.time_embedding_size": 8, "sampler.num_steps": 5}
    models = {
        "points": ("heart", {"network.hidden_size": 8, "network.num_blocks": 1}),
        "classes": (
            "digits",
            {"network.hidden_size": 8, "network.num_blocks": 1, "data.conditional": True},
        ),
        "convolutions": (
            "digits",
            {"network.kind": "unet", "network.base_channels": 8, "network.channel_multipliers": (1, 2)},
        ),
    }
    paths = []
    for name, (data, values) in models.items():
        config = preset(data).with_values(small | values)
        dataset = load_dataset(config.data)
        torch.manual_seed(0)
        network = build_network(config, dataset.spec.shape, dataset.spec.num_classes)
        model = TrainedModel(config, dataset.spec, network.eval().requires_grad_(False), {})
        path = folder / f"{name}.onnx"
        path.write_bytes(export_onnx(model)[0])
        paths.append(path)
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(300, 4)), columns=["a", "b c", "d", "e"])
    table["d"] = rng.integers(0, 9, 300)
    table.to_csv(folder / "table.csv", index=False)
    table.to_parquet(folder / "table.parquet")
    np.save(folder / "table.npy", table.to_numpy())
    return [*paths, *(folder / f"table.{suffix}" for suffix in ("csv", "parquet", "npy"))]


def main(arguments: list[str] | None = None) -> int:
    """Damage and read copies, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: files of its own")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: 1)")
    parser.add_argument(
        "--copies", type=at_least_one, help="number of copies of each file, instead of --minutes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    parser.add_argument("--folder", type=Path, help="for the files and copies (default: a temporary one)")
    options = parser.parse_args(arguments)
    for path in options.files:
        if not path.is_file():
            parser.error(f"{path}: give files that exist")
    scratch = tempfile.TemporaryDirectory() if options.folder is None else None
    folder = Path(scratch.name) if scratch else options.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files = [Fuzzing(path, options.seed, folder) for path in options.files or own_files(folder)]
    except InputError as error:
        parser.error(str(error))
    deadline = time.monotonic() + 60.0 * options.minutes
    for each in files if options.copies is not None else ():
        each.read_copies(options.copies)
    while options.copies is None and time.monotonic() < deadline:
        for each in files:
            each.read_copies(50)
    for each in files:
        each.close()
    print("| file | refused | read | slowest | growth | found |")
    print("|---|---|---|---|---|---|")
    print("\n".join(each.row() for each in files))
    return 1 if any(each.found for each in files) else 0


if __name__ == "__main__":
    sys.exit(main())
