"""Folders on a local disk or a mount."""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion.files import part_name, replacing, sync
from diffusion.manifest import Damaged

_PART = re.compile(r"\.part-[0-9a-f]{8}-(.+)")  # what `part_name` makes
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2, which os does not have


class Folder:
    """A local folder; its methods mean what those of `workflows.storage.Storage` say.

    Args:
        path: absolute; made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def try_out(self) -> None:
        """Make the folder, then write and delete a file in it.

        Raises:
            OSError: one of these fails.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        probe = self.path / part_name("probe")
        try:
            probe.write_bytes(b"probe")
        finally:
            probe.unlink(missing_ok=True)

    def child(self, name: str) -> "Folder":
        """The folder `name` in it."""
        return Folder(self.path / name)

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(content)

    def read(self, name: str) -> bytes | None:
        """What a file holds, None if it is not there."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, name: str) -> bool:
        """Whether there is such a file, or such a folder with something in it."""
        path = self.path / name
        return any(path.iterdir()) if path.is_dir() else path.exists()

    def names(self) -> list[str]:
        """Names in it, in order, but for the hidden ones."""
        if not self.path.is_dir():
            return []
        return sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty folder on the same file system, so that it can be renamed into its place."""
        part = self.path / part_name(name)
        part.mkdir(parents=True)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def put_folder(self, local: Path, name: str) -> None:
        """Rename a folder of `scratch` into its place, or a copy of any other folder."""
        if local.parent == self.path:
            self._put(local, name)
            return
        with self.scratch(name) as part:
            for path in local.iterdir():
                shutil.copyfile(path, part / path.name)
                sync(part / path.name)
            sync(part)
            self._put(part, name)

    def fetch_folder(self, name: str, into: Path) -> None:
        """Give the files a second name where the file system can, copy them where it cannot."""
        for path in (self.path / name).iterdir():
            try:
                # Free, and whoever deletes the first name leaves the second one whole.
                os.link(path, into / path.name)
            except OSError:
                try:
                    shutil.copyfile(path, into / path.name)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    raise Damaged(f"{path} is damaged (it cannot be read): use another checkpoint") from error

    def for_ray(self) -> tuple[str, None]:
        """The path, which needs no file system of its own."""
        return str(self.path), None

    def delete(self, name: str) -> None:
        """Delete a file or a folder, if it is there."""
        with suppress(FileNotFoundError, NotADirectoryError):
            if (self.path / name).is_dir():
                _remove(self.path / name, Path(name).name)
            else:
                (self.path / name).unlink()

    def remove_leftovers(self, matching: re.Pattern[str], before: float) -> None:
        """Remove half-written folders, last written to before that time, whose names match."""
        for path in list(self.path.glob(".part-*")):
            name = _PART.fullmatch(path.name)
            with suppress(FileNotFoundError, NotADirectoryError):
                if name and matching.fullmatch(name[1]) and _last_change(path) < before:
                    _remove(path, name[1])

    def _put(self, part: Path, name: str) -> None:
        """Rename a folder to its name; where another had that name, it has the part's afterwards."""
        path = self.path / name
        for _ in range(10):  # others may put or delete the same name in the meantime
            with suppress(FileNotFoundError):
                if _exchange(part, path):
                    break
                # This file system cannot exchange them: for a moment neither is there.
                self.delete(name)
            try:
                os.rename(part, path)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        else:
            raise OSError(errno.EBUSY, "other processes keep writing it", str(path))
        sync(self.path)
        sync(self.path.parent)  # which may have just got this folder


def _exchange(one: Path, other: Path) -> bool:
    """Have two folders exchange their names at once; False where the system or the disk cannot.

    Raises:
        FileNotFoundError: one is not there.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is None or call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        if call is not None and ctypes.get_errno() == errno.ENOENT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(other))
        return False
    return True


def _remove(path: Path, name: str) -> None:
    """Remove a folder that nobody may find half removed, or go on writing to unawares."""
    aside = path.with_name(part_name(name))
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _last_change(path: Path) -> float:
    return max(each.stat().st_mtime for each in (path, *path.iterdir()))
