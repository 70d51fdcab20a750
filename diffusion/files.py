"""Atomic file writes that survive a power failure, and the versions of file formats."""

import errno
import importlib.metadata
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffusion.errors import InputError

# Errors of fsync on file systems that do not support it, for folders or at all.
_SYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Create or replace a file atomically: write to the yielded path, which is then renamed to `path`.

    Until the block ends, and if it raises, an old file at `path` is left unchanged. The new file is
    synced to disk before the context manager returns. When several processes replace the same file, the
    last one wins, and contents are never mixed.

    Args:
        path: the file to create or replace.

    Yields:
        A temporary path in the same folder, with the same suffix, since writers choose their format by it.
    """
    part = path.with_name(part_name(path.name))
    try:
        yield part
        sync(part)  # before the rename: otherwise a power failure may leave an empty file under the new name
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def part_name(name: str) -> str:
    """Hidden, unique temporary name of a file or folder that is renamed to `name` once it is complete."""
    return f".part-{secrets.token_hex(4)}-{name}"


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to disk.

    Raises:
        OSError: the disk is full or failing; what was written may be lost.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _SYNC_UNSUPPORTED:
            raise
    finally:
        os.close(handle)


class FormatError(InputError):
    """A file has a format that this version of ray-ddpm cannot read; the message names a version that can."""


def check_format(where: str | Path, found: object, readable: Sequence[int], written_by: object) -> None:
    """Check that a file has a format that can be read.

    Args:
        where: path or address of the file, for the error message.
        found: format version of the file.
        readable: format versions that can be read.
        written_by: version of ray-ddpm that wrote the file; None if the file does not say.

    Raises:
        FormatError: the format is another one.
    """
    if found in readable:
        return
    known = version_name(written_by)
    own = package_version("ray-ddpm")
    raise FormatError(
        f"{where} has format {found}, written by {known}; this version{f', {own},' if own else ''} reads "
        f"format {' or '.join(map(str, readable))}: use {known} for it"
    )


def version_name(written_by: object) -> str:
    """How messages call the version of ray-ddpm that wrote a file; None if the file does not say."""
    return f"ray-ddpm {written_by}" if written_by else "another version of ray-ddpm"


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
