"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path this gives; it takes the place of `path` when the block ends well.

    What stood at `path` stays whole until then, and for good if the block raises. The suffix is kept,
    since writers choose their format by it.
    """
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
