"""Files: paths and contents that may be anything, atomic writes, and the versions of file formats."""

import errno
import importlib.metadata
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffusion.errors import InputError

_T = TypeVar("_T", dict[str, Any], list[Any])
# A file of settings, records or prices that is larger was made by mistake or to fill the memory.
MAX_TEXT_BYTES = 2**26
_MAX_NAME_BYTES = 255  # of a file, on all common file systems
# Errors of fsync on file systems that do not support it, for folders or at all.
_SYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def user_path(text: str | Path) -> Path:
    """An absolute path, from what a user typed: ~ and ~user are replaced by the home folder.

    Raises:
        InputError: there is no such user, or the text cannot be a path.
    """
    try:
        path = Path(text).expanduser().absolute()
        os.fsencode(path)
    except (RuntimeError, UnicodeEncodeError) as error:
        no_user = isinstance(error, RuntimeError)
        reason = "there is no such user" if no_user else "it is not text that a file name can hold"
        raise InputError(f"{text}: {reason}; give another path") from error
    if "\0" in str(path):
        raise InputError(f"{text}: a path cannot hold a null character; give another path")
    return path


def relative_path(path: Path) -> Path:
    """A path relative to the working directory if it is inside it, as messages show it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def path_kind(path: Path) -> Literal["file", "folder", "other"] | None:
    """Whether a path leads to a file, to a folder, to something else such as a device, or to nothing (None).

    Raises:
        InputError: it cannot be found out: a folder on the way may not be entered, a name is too long, or a
            link leads to itself.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: the path holds a null character or no text
        raise InputError(
            f"{relative_path(path)} cannot be opened ({os_reason(error)}): give another path"
        ) from error
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def read_file(path: Path, wanted: str, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Read a file whose name a user gave, and which may be anything.

    Args:
        path: the path.
        wanted: what to give instead, for the message, such as "the path of a sampler.onnx".
        max_bytes: largest size that is read.

    Raises:
        InputError: it is missing, cannot be read, is no regular file (a device or pipe could be endless), or
            is larger than that.
    """
    shown = relative_path(path)
    try:
        # Opening a pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode):
                raise InputError(f"{shown} is not a file: give {wanted}")
            # Files of the kernel have the size 0, whatever they hold.
            content = b"" if info.st_size > max_bytes else file.read(max_bytes + 1)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{shown} cannot be read ({os_reason(error)}): give {wanted}") from error
    if max(info.st_size, len(content)) > max_bytes:
        size = max(info.st_size, len(content))
        raise InputError(
            f"{shown} has {size} bytes, more than the {max_bytes} that it may have: give {wanted}"
        )
    return content


def parse_json(
    content: bytes | str, kind: type[_T], where: str | Path, remedy: str, *, allow_nan: bool = True
) -> _T:
    """Parse a JSON object or array.

    Args:
        content: the JSON, in UTF-8 if it is bytes.
        kind: dict or list, which the outermost value must be.
        where: path or address of the file, for the message.
        remedy: what to do if it is damaged, for the message.
        allow_nan: whether numbers may be NaN and Infinity, which the standard of JSON lacks.

    Raises:
        InputError: the content is no JSON, or another kind of value.
    """
    try:
        tree = json.loads(content, parse_constant=None if allow_nan else _refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError covers JSON, its encoding and huge numbers
        reason = "it is empty" if not content.strip() else f"it is no JSON: {error}"
        raise InputError(f"{where} is damaged ({reason[:150]}): {remedy}") from error
    if not isinstance(tree, kind):
        needed = "an object" if kind is dict else "an array"
        raise InputError(f"{where} is damaged (it is not {needed} in JSON): {remedy}")
    return tree


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    """Read a file with a JSON object.

    Args:
        path: the path.
        wanted: what to give instead, for the message.

    Raises:
        InputError: as for `read_file`, or the content is no JSON object.
    """
    return parse_json(read_file(path, wanted), dict, path, f"give {wanted}")


def os_reason(error: Exception) -> str:
    """Why a system call failed, without the path and the number of the error."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split())[:200] or type(error).__name__


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
    """Hidden, unique temporary name of a file or folder that is renamed to `name` once it is complete.

    It ends like `name`, of which it holds only the end if it would be too long for a file system otherwise.
    """
    prefix = f".part-{secrets.token_hex(4)}-"
    while len(os.fsencode(prefix + name)) > _MAX_NAME_BYTES and len(os.fsencode(name)) <= _MAX_NAME_BYTES:
        name = name[1:]
    return prefix + name


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
