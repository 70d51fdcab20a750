"""Where a run keeps what must outlive its machine: a local folder, a mount, or a bucket."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from diffusion.errors import InputError
from diffusion.manifest import MANIFEST, write_manifest
from workflows.folder import Folder

if TYPE_CHECKING:  # pyarrow takes a tenth of a second, and a local folder needs none of it
    from pyarrow.fs import FileSystem

    from workflows.bucket import Bucket

_SECONDS_TO_ANSWER = 10.0
# A write that has touched nothing for so long was interrupted, whatever the clocks of two machines say.
_SECONDS_TO_LEFTOVER = 900.0
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters at least: C:/ is a drive


class Storage:
    """A folder: a local path, a mount, or a URI such as s3://bucket/prefix.

    Files and folders in it appear whole or not at all, even if several processes write the same name.
    It can be pickled; a copy opens its own connections.

    Args:
        location: the path, made if need be, or the URI. The keys of an s3:// are AWS's usual variables
            and files; AWS_ENDPOINT_URL names a server that is not Amazon's.

    Raises:
        InputError: it cannot be reached or written to; a server has 10 s to show that it can.
    """

    def __init__(self, location: str) -> None:
        if not location.strip():
            raise InputError("the storage has an empty name: give a local folder or s3://bucket/prefix")
        self._place: Folder | Bucket
        if not _URI.match(location) or location.startswith("file:"):
            path = unquote(urlsplit(location).path) if location.startswith("file:") else location
            self._place = Folder(Path(path).expanduser().absolute())
            remedy = "give a folder that can be made and written to"
        else:
            self._place = _bucket(location)
            remedy = "check its name and your credentials there, or give a local folder or s3://bucket/prefix"
            if location.startswith("s3:"):
                remedy = (
                    "check its name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, unless the server "
                    "is Amazon's, AWS_ENDPOINT_URL; or give a local folder"
                )
        if reason := _failure(self._place.try_out):
            raise InputError(f"{self} cannot be written to ({reason}): {remedy}")

    def __str__(self) -> str:
        """The location without keys and passwords."""
        return str(self._place)

    def __repr__(self) -> str:
        return f"Storage({self})"

    @property
    def is_local(self) -> bool:
        """Whether it is a folder that this machine can open files in."""
        return isinstance(self._place, Folder)

    @property
    def path(self) -> Path:
        """The local folder, absolute.

        Raises:
            ValueError: it is a bucket.
        """
        if not isinstance(self._place, Folder):
            raise ValueError(f"{self} is no local folder")
        return self._place.path

    def for_ray(self) -> tuple[str, "FileSystem | None"]:
        """What Ray wants to hear of it: a path, and the file system that it is a path of, None locally."""
        return self._place.for_ray()

    def child(self, name: str) -> "Storage":
        """The folder `name` in it, which need not be there yet; `name` may have slashes."""
        made = object.__new__(Storage)
        made._place = self._place.child(_checked(name))
        return made

    def write_text(self, name: str, text: str) -> None:
        """Write a file, in place of the one that was there."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file, in place of the one that was there; it appears whole or not at all."""
        self._place.write(_checked(name), content)

    def read_text(self, name: str) -> str | None:
        """What a file holds, None if it is not there."""
        content = self.read_bytes(name)
        return None if content is None else content.decode()

    def read_bytes(self, name: str) -> bytes | None:
        """What a file holds, None if it is not there."""
        return self._place.read(_checked(name))

    def exists(self, name: str) -> bool:
        """Whether there is such a file, or such a folder with something in it."""
        return self._place.exists(_checked(name))

    def names(self) -> list[str]:
        """Names of the files and folders in it, in order; without what is hidden or half written."""
        return self._place.names()

    def put_folder(self, local: Path, name: str) -> None:
        """Put a flat folder under a name, at once and in place of what was there.

        Args:
            local: the folder. It stays, unless it came from `scratch`, which it may leave; it is given
                a manifest if it has none.
            name: its name here, without slashes.

        Raises:
            OSError: it could not be written; what was there before still is.
        """
        if not (local / MANIFEST).is_file():
            write_manifest(local, {})
        self._place.put_folder(local, _checked(name))

    def fetch_folder(self, name: str, into: Path) -> None:
        """Bring the files of a folder into a local one, made if need be; `read_manifest` checks them.

        Raises:
            FileNotFoundError: there is no such folder.
            Damaged: its manifest is damaged.
            OSError: it could not be read.
        """
        into.mkdir(parents=True, exist_ok=True)
        self._place.fetch_folder(_checked(name), into)

    def delete(self, name: str) -> None:
        """Delete a file or a folder, if it is there; a folder is gone at once, never half."""
        self._place.delete(_checked(name))

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty local folder to make `name` in, before `put_folder`; removed afterwards.

        It is on the storage's own file system if that is local, where `put_folder` only renames it.
        """
        with self._place.scratch(_checked(name)) as made:
            yield made

    def remove_leftovers(self, matching: str) -> None:
        """Remove what interrupted writes and deletions left, if a quarter of an hour old or more.

        Args:
            matching: regular expression of the names of folders to look at.
        """
        self._place.remove_leftovers(re.compile(matching), time.time() - _SECONDS_TO_LEFTOVER)


def _bucket(uri: str) -> "Bucket":
    from workflows.bucket import Bucket

    return Bucket(uri)


def _failure(action: Callable[[], None]) -> str | None:
    """Why an action failed, None if it did not; no answer in time is a failure too."""
    outcome: list[Exception | None] = []

    def attempt() -> None:
        try:
            action()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # A thread, since neither a dead mount nor the name of a dead server can be asked with a time limit.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_ANSWER)
    match outcome:
        case []:
            return f"no answer within {_SECONDS_TO_ANSWER:.0f} s"
        case [OSError() as error]:
            return error.strerror or str(error)
        case [Exception() as error]:
            raise error
    return None


def _checked(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or ".." in parts or name.startswith("/"):
        raise ValueError(f"{name!r} is no name of something in a folder")
    return name
