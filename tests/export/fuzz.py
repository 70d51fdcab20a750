"""Damages a sampler.onnx in many ways and opens each: `python fuzz.py FILE SEED COUNT`.

A program of its own, since what is looked for may end the process. The last file tried stays as FILE.last.
Ends with a line "REFUSED n DRAWN m"; anything but an InputError of one line is left to raise.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from diffusion.errors import InputError
from export.sampler import Sampler


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One way of many; where the graph begins and where the metadata stand more often than elsewhere."""
    data = bytearray(content)

    def place() -> int:
        return rng.choice(
            [
                rng.randrange(min(4000, len(data))),
                rng.randrange(len(data)),
                len(data) - 1 - rng.randrange(min(6000, len(data))),
            ]
        )

    match rng.choice(["bit", "bytes", "cut", "zeros", "swap", "insert"]):
        case "bit":
            data[place()] ^= 1 << rng.randrange(8)
        case "bytes":
            for _ in range(rng.randrange(2, 30)):
                data[place()] = rng.randrange(256)
        case "cut":
            del data[place() :]
        case "zeros":
            here, size = place(), rng.randrange(1, 50)
            data[here : here + size] = bytes(size)
        case "swap":
            here, there, size = place(), place(), rng.randrange(1, 60)
            data[here : here + size], data[there : there + size] = (
                data[there : there + size],
                data[here : here + size],
            )
        case "insert":
            here = place()
            data[here:here] = rng.randbytes(rng.randrange(1, 20))
    return bytes(data)


def outcomes(path: Path, seed: int, count: int) -> Iterator[str]:
    """ "refused" or "drawn", file by file."""
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
    found = list(outcomes(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    print(f"REFUSED {found.count('refused')} DRAWN {found.count('drawn')}")
