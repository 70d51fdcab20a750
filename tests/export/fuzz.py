"""Damages a sampler.onnx in random ways and samples from each copy: `python fuzz.py FILE SEED COUNT`.

A separate program, since the bugs that it looks for may crash the process. The last copy is kept as
FILE.last. The program ends with a line "REFUSED n DRAWN m"; an error that is not an InputError of one line
is not caught.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from diffusion.errors import InputError
from export.sampler import Sampler


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

    match rng.choice(["bit", "bytes", "cut", "zeros", "swap", "insert"]):
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
    return bytes(data)


def outcomes(path: Path, seed: int, count: int) -> Iterator[str]:
    """Try `count` damaged copies, yielding "refused" or "drawn" for each."""
    content, rng = path.read_bytes(), random.Random(seed)
    for _ in range(count):
        data = damaged(content, rng)
        path.with_suffix(".last").write_bytes(data)
        try:
            samples = Sampler(data, provider="cpu").sample(2, num_steps=2, time_limit=20.0)
            assert samples.shape[0] == 2
            yield "drawn"
        except InputError as error:
            message = str(error)
            assert message and len(message.splitlines()) == 1 and len(message) < 900, message
            yield "refused"


if __name__ == "__main__":
    results = list(outcomes(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    print(f"REFUSED {results.count('refused')} DRAWN {results.count('drawn')}")
