"""Storage backend for a folder on a local disk or a mount."""

import ctypes
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion.files import part_name, replacing, sync
from diffusion.manifest import DamagedError

_MAX_BYTES = 2**30  # of a file that is read at once
_PART = re.compile(r"\.part-[0-9a-f]{8}-(.+)")  # the names that `part_name` returns
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of Linux's renameat2, which the os module lacks


class LocalFolder:
    """A local folder; implements `workflows.storage.storage.Backend`.

    Args:
        path: absolute path; the folder is created on the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def check_writable(self) -> None:
        """Create the folder, then write and delete a file in it.

        Raises:
            OSError: one of these steps fails.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        probe = self.path / part_name("probe")
        try:
            probe.write_bytes(b"probe")
        finally:
            probe.unlink(missing_ok=True)

    def for_ray(self) -> tuple[str, None]:
        """Path of the folder, and None: Ray opens local paths itself."""
        return str(self.path), None

    def child(self, name: str) -> "LocalFolder":
        """The subfolder `name`."""
        return LocalFolder(self.path / name)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file atomically."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(content)

    def read_bytes(self, name: str) -> bytes | None:
        """Content of a file, or None if it does not exist.

        Raises:
            OSError: it cannot be read, is a device or a pipe, which could be endless, or is too large.
        """
        path = self.path / name
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):
                raise OSError(errno.EINVAL, "it is no file", str(path))
            if info.st_size > _MAX_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, name: str) -> bool:
        """Whether there is a file or a non-empty folder with this name."""
        path = self.path / name
        return any(path.iterdir()) if path.is_dir() else path.exists()

    def names(self) -> list[str]:
        """Sorted names of the files and folders, except hidden ones."""
        if not self.path.is_dir():
            return []
        return sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))

    def files(self) -> list[str]:
        """Sorted names of all files, also those in subfolders, except hidden ones."""
        files = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())
        return sorted(
            file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)
        )

    def delete(self, name: str) -> None:
        """Delete a file or a folder if it exists."""
        with suppress(FileNotFoundError, NotADirectoryError):
            if (self.path / name).is_dir():
                _remove_folder(self.path / name, Path(name).name)
            else:
                (self.path / name).unlink()

    @contextmanager
    def staging_folder(self, name: str) -> Iterator[Path]:
        """Hidden temporary folder on the same file system, which `upload_folder` can rename."""
        part = self.path / part_name(name)
        part.mkdir(parents=True)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def upload_folder(self, local: Path, name: str) -> None:
        """Rename a staging folder to `name`, or copy any other folder and rename the copy."""
        if local.parent == self.path:
            self._replace_folder(local, name)
            return
        with self.staging_folder(name) as part:
            for path in local.iterdir():
                shutil.copyfile(path, part / path.name)
                sync(part / path.name)
            sync(part)
            self._replace_folder(part, name)

    def download_folder(self, name: str, into: Path) -> None:
        """Hard-link the files into a local folder if the file system can, otherwise copy them."""
        for path in (self.path / name).iterdir():
            try:
                # A link costs nothing, and remains intact when the original name is deleted.
                os.link(path, into / path.name)
            except OSError:
                try:
                    shutil.copyfile(path, into / path.name)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    raise DamagedError(
                        f"{path} is damaged (it cannot be read): use another checkpoint"
                    ) from error

    def remove_incomplete(self, pattern: re.Pattern[str], before: float) -> None:
        """Remove half-written folders with matching names that were last changed before a time."""
        for path in list(self.path.glob(".part-*")):
            name = _PART.fullmatch(path.name)
            with suppress(FileNotFoundError, NotADirectoryError):
                if name and pattern.fullmatch(name[1]) and _last_modified(path) < before:
                    _remove_folder(path, name[1])

    def _replace_folder(self, part: Path, name: str) -> None:
        """Rename a folder to `name`; an existing folder of that name gets the name of `part`."""
        path = self.path / name
        for _ in range(10):  # other processes may write or delete the same name in the meantime
            with suppress(FileNotFoundError):
                if swap_folders(part, path):
                    break
                # This file system cannot swap names: for a moment neither folder has the name.
                self.delete(name)
            try:
                os.rename(part, path)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        else:
            raise OSError(errno.EBUSY, "other processes keep writing to it", str(path))
        sync(self.path)
        sync(self.path.parent)  # self.path itself may be new in it


def swap_folders(one: Path, other: Path) -> bool:
    """Swap the names of two folders atomically; False if the system or the file system cannot.

    Raises:
        FileNotFoundError: one of the folders does not exist.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is None or call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        if call is not None and ctypes.get_errno() == errno.ENOENT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(other))
        return False
    return True


def _remove_folder(path: Path, name: str) -> None:
    """Remove a folder, renamed first: no process sees it half removed, or keeps writing to it unnoticed."""
    hidden = path.with_name(part_name(name))
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _last_modified(folder: Path) -> float:
    """Latest modification time of a folder and of the files in it."""
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
