"""Files that appear whole or not at all, and that a power cut does not take away again."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What file systems answer that keep their folders, or everything, in order by themselves.
_NOTHING_TO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path this gives; it takes the place of `path` when the block ends well.

    What stood at `path` stays whole until then, and for good if the block raises. The disk holds the
    new file before this returns. Several processes may replace one file: the last one wins, whole.
    The suffix is kept, since writers choose their format by it.
    """
    part = path.with_name(part_name(path.name))
    try:
        yield part
        sync(part)  # or a power cut may leave the new name with none of its bytes
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def part_name(name: str) -> str:
    """A hidden name that no other writer uses, for what will be called `name` once it is whole."""
    return f".part-{secrets.token_hex(4)}-{name}"


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's list of names.

    Raises:
        OSError: the disk is full or failing; what was written cannot be relied on.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOTHING_TO_SYNC:
            raise
    finally:
        os.close(handle)
