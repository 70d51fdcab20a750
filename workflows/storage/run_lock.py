"""The lock of a run: only one process at a time writes into its folder."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from diffusion.errors import InputError


class RunLock:
    """Held from its creation to `release`, or to the end of the process, however that ends.

    It is the system's lock of the folder itself, so no file stays behind. Some network file systems and
    Windows cannot lock folders; runs are not protected from each other there, nor in buckets.

    Args:
        folder: folder of the run, which exists.

    Raises:
        InputError: another process, or another call in this one, holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self._handle: int | None = None
        try:
            import fcntl

            self._handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise InputError(
                f"--name {folder.name}: another process runs it; wait for its end, or give another --name"
            ) from error
        except (ImportError, OSError):
            self.release()

    def release(self) -> None:
        """Let other processes run it."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None


def remove_parts(folder: Path, except_in: tuple[str, ...]) -> None:
    """Remove the half-written files that a killed process left in a run's folder, whose lock is held.

    Args:
        folder: folder of the run.
        except_in: names of its subfolders into which workers write, who may outlive their driver for a while.
    """
    for path in list(folder.rglob(".part-*")):
        if path.relative_to(folder).parts[0] not in except_in:
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
