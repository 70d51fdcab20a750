"""Folder that outlives the machine a run is on: a local folder, a mount, or a bucket."""

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from diffusion.errors import InputError
from diffusion.files import user_path
from diffusion.manifest import MANIFEST, write_manifest
from workflows.storage.attempt import Attempt
from workflows.storage.local import LocalFolder

if TYPE_CHECKING:  # importing pyarrow takes 0.1 s, and a local folder does not need it
    from pyarrow.fs import FileSystem

T = TypeVar("T")
# How long a location has to show that it is writable.
CHECK_TIMEOUT_SECONDS = 10.0
# A write that has changed nothing for this long was interrupted, even if the clocks of two machines differ.
INCOMPLETE_AFTER_SECONDS = 900.0
_SECONDS_BETWEEN_RETRIES = 10.0
# Failures of a file system that do not pass by themselves. Others do, such as a mount that is silent or says
# ESTALE while its server restarts. Errors of buckets have no number: their servers fail for minutes, too.
_PERMANENT = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
}
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # at least two letters: C:/ is a drive


class Backend(Protocol):
    """Operations that each kind of storage implements; `Storage` documents the methods of the same name."""

    def check_writable(self) -> None: ...
    def for_ray(self) -> "tuple[str, FileSystem | None]": ...
    def child(self, name: str) -> "Backend": ...
    def write_bytes(self, name: str, content: bytes) -> None: ...
    def read_bytes(self, name: str) -> bytes | None: ...
    def exists(self, name: str) -> bool: ...
    def names(self) -> list[str]: ...
    def files(self) -> list[str]: ...
    def delete(self, name: str) -> None: ...
    def staging_folder(self, name: str) -> AbstractContextManager[Path]: ...
    def upload_folder(self, local: Path, name: str) -> None: ...
    def download_folder(self, name: str, into: Path) -> None: ...
    def remove_incomplete(self, pattern: re.Pattern[str], before: float) -> None: ...


class Storage:
    """A folder: a local path, a mount, or a URI such as s3://bucket/prefix.

    Files and folders are written atomically, even if several processes write the same name. A storage
    can be pickled; each copy opens its own connections.

    Args:
        location: local path, created if missing, or URI. The keys of an s3:// URI come from the usual AWS
            variables and files; AWS_ENDPOINT_URL is the address of a server that is not Amazon's.

    Raises:
        InputError: the location cannot be reached or written to, or does not answer within 10 s.
    """

    def __init__(self, location: str) -> None:
        if not location.strip():
            raise InputError("the storage location is empty: give a local folder or s3://bucket/prefix")
        self._backend: Backend
        if not _URI.match(location) or location.startswith("file:"):
            path = unquote(urlsplit(location).path) if location.startswith("file:") else location
            self._backend = LocalFolder(user_path(path))
            remedy = "give a folder that can be created and written to"
        else:
            self._backend = _open_bucket(location)
            remedy = "check its name and your credentials, or give a local folder or s3://bucket/prefix"
            if location.startswith("s3:"):
                remedy = (
                    "check its name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, unless the server "
                    "is Amazon's, AWS_ENDPOINT_URL; or give a local folder"
                )
        if reason := _failure_reason(self._backend.check_writable):
            raise InputError(f"{self} cannot be written to ({reason}): {remedy}")

    def __str__(self) -> str:
        """Location without keys and passwords."""
        return str(self._backend)

    def __repr__(self) -> str:
        return f"Storage({self})"

    @property
    def is_local(self) -> bool:
        """Whether this is a folder in which this machine can open files."""
        return isinstance(self._backend, LocalFolder)

    @property
    def path(self) -> Path:
        """Absolute path of the local folder.

        Raises:
            ValueError: the storage is a bucket.
        """
        if not isinstance(self._backend, LocalFolder):
            raise ValueError(f"{self} is not a local folder")
        return self._backend.path

    def for_ray(self) -> tuple[str, "FileSystem | None"]:
        """Values for Ray's `storage_path` and `storage_filesystem`; the latter is None for a local folder."""
        return self._backend.for_ray()

    def child(self, name: str) -> "Storage":
        """The subfolder `name`, which need not exist yet; `name` may contain slashes."""
        child = object.__new__(Storage)  # without checking again that it is writable
        child._backend = self._backend.child(_validated(name))
        return child

    def write_text(self, name: str, text: str) -> None:
        """Write a file atomically, replacing an existing one."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file atomically, replacing an existing one."""
        self._backend.write_bytes(_validated(name), content)

    def read_text(self, name: str) -> str | None:
        """Content of a file, or None if it does not exist.

        Raises:
            InputError: it is no text.
        """
        content = self.read_bytes(name)
        try:
            return None if content is None else content.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self}/{name} is damaged (it is no text): restore it from a copy, or remove it"
            ) from error

    def read_bytes(self, name: str) -> bytes | None:
        """Content of a file, or None if it does not exist."""
        return self._backend.read_bytes(_validated(name))

    def exists(self, name: str) -> bool:
        """Whether there is a file or a non-empty folder with this name."""
        return self._backend.exists(_validated(name))

    def names(self) -> list[str]:
        """Sorted names of the files and folders, except hidden and half-written ones."""
        return self._backend.names()

    def files(self) -> list[str]:
        """Sorted names of all files, also those in subfolders, except hidden and half-written ones."""
        return self._backend.files()

    def upload_folder(self, local: Path, name: str) -> None:
        """Copy a flat local folder into the storage atomically, replacing an existing one.

        Args:
            local: folder to copy; a manifest is added if it has none. The folder is left in place, except
                that one from `staging_folder` may be moved instead of copied.
            name: name of the copy, without slashes.

        Raises:
            OSError: the folder could not be written; an existing one is unchanged.
        """
        if not (local / MANIFEST).is_file():
            write_manifest(local, {})
        self._backend.upload_folder(local, _validated(name))

    def download_folder(self, name: str, into: Path) -> None:
        """Copy the files of a folder into a local one, without checking them (`read_manifest` does that).

        Args:
            name: name of the folder in the storage.
            into: local folder, created if missing.

        Raises:
            FileNotFoundError: there is no such folder.
            DamagedError: its manifest is damaged.
            OSError: it could not be read.
        """
        into.mkdir(parents=True, exist_ok=True)
        self._backend.download_folder(_validated(name), into)

    def delete(self, name: str) -> None:
        """Delete a file or a folder if it exists; a half-deleted folder is never visible."""
        self._backend.delete(_validated(name))

    @contextmanager
    def staging_folder(self, name: str) -> Iterator[Path]:
        """Temporary local folder in which to prepare folder `name` before `upload_folder`.

        It is on the storage's own file system if that is local, so that `upload_folder` only renames it.
        """
        with self._backend.staging_folder(_validated(name)) as folder:
            yield folder

    def remove_incomplete(self, pattern: str) -> None:
        """Remove what interrupted writes and deletions left behind at least 15 minutes ago.

        Args:
            pattern: regular expression that the whole name of a folder must match.
        """
        self._backend.remove_incomplete(re.compile(pattern), time.time() - INCOMPLETE_AFTER_SECONDS)


def retry(action: Callable[[], T], seconds: float) -> T:
    """Repeat a write or read until it succeeds, and return its result; a storage may be silent for minutes.

    Args:
        action: the write or read; may raise OSError.
        seconds: time after which the next failure is raised.

    Raises:
        OSError: the time is over, or waiting cannot mend the failure.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except OSError as error:
            if not is_storage_error(error) or is_permanent(error) or time.monotonic() > deadline:
                raise
            time.sleep(min(_SECONDS_BETWEEN_RETRIES, max(deadline - time.monotonic(), 0.0)))


def is_permanent(error: OSError) -> bool:
    """Whether a write that failed will fail again until someone mends the cause, such as a full disk."""
    return error.errno in _PERMANENT


def is_storage_error(error: OSError) -> bool:
    """Whether an error comes from a file system or a bucket, rather than from a connection of Ray's."""
    return error.errno is not None or type(error) is OSError


def _open_bucket(uri: str) -> Backend:
    from workflows.storage.bucket import Bucket

    return Bucket(uri)


def _failure_reason(action: Callable[[], None]) -> str | None:
    """Run an action, and return why it failed or timed out, or None if it succeeded."""
    try:
        Attempt(action).wait(CHECK_TIMEOUT_SECONDS)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _validated(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or ".." in parts or name.startswith("/"):
        raise ValueError(f"{name!r} is not a valid name in a folder")
    return name
