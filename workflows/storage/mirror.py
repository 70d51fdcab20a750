"""Working copy of a run's folder whose place is a bucket: local files, copied there while the run goes on."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from diffusion.files import os_reason, replacing
from workflows.storage.local import LocalFolder
from workflows.storage.storage import Storage

_COPIED = ".copied.json"  # in the local folder
_SECONDS_BETWEEN_COPIES = 5.0
_SHARE_OF_TIME = 10  # copying takes at most a tenth of the time, however many files there are


def restore(folder: Path, storage: Storage, index: str, leave_out: Collection[str] = ()) -> None:
    """Make a local folder equal to a storage, unless it is a newer copy of what the storage has.

    It is newer if the storage did not answer when the last session on this machine ended, and no other
    machine has gone on since: its index then begins with the whole index of the storage.

    Args:
        folder: the local folder; may not exist yet.
        storage: the storage.
        index: name of the file that refers to the others, see `Mirror`.
        leave_out: names of folders in the storage that are not copied.

    Raises:
        OSError: a file cannot be read or written.
    """
    content, local = storage.read_bytes(index), folder / index
    if content is not None and local.is_file() and local.read_bytes().startswith(content):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copied = {}
    # The index last: its copy says that the others are there, should this be interrupted.
    for name in sorted(storage.files(), key=lambda name: name == index):
        content = None if name.partition("/")[0] in leave_out else storage.read_bytes(name)
        if content is None:  # it was deleted in the meantime
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(content)
        copied[name] = _state(path)
    (folder / _COPIED).write_text(json.dumps(copied))


class Mirror:
    """Copies the files of a local folder to a storage whenever they have changed.

    A storage that does not answer costs nothing: the files stay in the folder, and are copied when it does.

    Args:
        folder: the local folder, as `restore` left it.
        storage: where the files belong.
        index: name of the file that refers to the others, and only grows. It is copied last, as it was before
            the others were read, so that the storage has all that its copy of the index refers to.
        notify: receives a line when the storage stops answering, and when it answers again.
    """

    def __init__(self, folder: Path, storage: Storage, index: str, notify: Callable[[str], None]) -> None:
        self._folder, self._storage, self._index, self._notify = folder, storage, index, notify
        self._copied = _read_copied(folder)  # modification time and size, by name
        self._closed = threading.Event()
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def start(self) -> None:
        """Start to copy, in a thread."""
        self._thread.start()

    def copy(self) -> None:
        """Copy what has changed since the last copy, and delete what is gone.

        Raises:
            OSError: the storage does not answer.
        """
        index = self._folder / self._index
        content = index.read_bytes() if index.is_file() else None
        names = LocalFolder(self._folder).files()
        for name in names:
            path = self._folder / name
            try:
                state = _state(path)
                if name == self._index or self._copied.get(name) == state:
                    continue
                self._storage.write_bytes(name, path.read_bytes())
            except FileNotFoundError:
                continue  # it was replaced or deleted in the meantime
            self._copied[name] = state
        if content is not None and self._copied.get(self._index) != [0, len(content)]:
            self._storage.write_bytes(self._index, content)
            self._copied[self._index] = [0, len(content)]
        for name in self._copied.keys() - set(names):
            self._storage.delete(name)
            del self._copied[name]

    def close(self) -> None:
        """Stop the thread, and copy what is left.

        Raises:
            OSError: the storage does not answer; the local folder has what is missing.
        """
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self.copy()

    def _run(self) -> None:
        seconds = 0.0
        while not self._closed.wait(max(_SECONDS_BETWEEN_COPIES, _SHARE_OF_TIME * seconds)):
            started = time.monotonic()
            try:
                self.copy()
            except OSError as error:
                if not self._is_failing:
                    self._notify(
                        f"warning: {self._storage} does not answer ({os_reason(error)}); the sweep goes on, "
                        f"and its files are in {self._folder} until it does"
                    )
                self._is_failing = True
            else:
                if self._is_failing:
                    self._notify(f"{self._storage} answers again: it has the files of the sweep")
                self._is_failing = False
            seconds = time.monotonic() - started


def _read_copied(folder: Path) -> dict[str, list[int]]:
    """What `restore` has copied; nothing if the folder is older than that, and everything is copied again."""
    try:
        copied: dict[str, list[int]] = json.loads((folder / _COPIED).read_text())
        return copied
    except (OSError, ValueError):
        return {}


def _state(path: Path) -> list[int]:
    info = path.stat()
    return [info.st_mtime_ns, info.st_size]
