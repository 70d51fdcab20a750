"""What a run sends to its tracking store, kept on disk, so that it can be sent when the store is back.

A line of `entries.jsonl` is an entry, or tells how many of the entries are done: sent, or refused for good.
Pictures are files beside it.
"""

import errno
import itertools
import json
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.errors import InputError
from diffusion.files import parse_json, path_kind, read_file
from workflows.tracking.entries import ENTRIES, Entry

FOLDER = "tracking"  # of a run's outbox, in the run's folder
FILE = "entries.jsonl"
ENTRIES_FILE = f"{FOLDER}/{FILE}"  # in the run's folder
_DONE = "done"  # key of the lines that tell how many entries are done
_MAX_BYTES = 2**32


class Outbox:
    """The entries of a run, in order; threads may share it. Writing never raises.

    Args:
        folder: folder of the file and the pictures, which is created with the first entry. Entries of an
            earlier session are kept.

    Attributes:
        num_entries: number of entries.
        num_done: how many of them, from the first one, are done.

    Raises:
        InputError: the entries of an earlier session cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / FILE
        self._lock = threading.Lock()
        self._is_deleted = False
        self._unwritten: list[str] = []  # lines for which there was no room on the disk
        entries, self.num_done = read_entries(folder)
        self.num_entries = len(entries)
        self._pictures = itertools.count(self.num_entries)
        if path_kind(self._path) == "file":
            _cut_incomplete_line(self._path)

    def append(self, entry: Entry) -> int:
        """Keep an entry, and return its index."""
        with self._lock:
            self._write(ENTRIES.to_tree(entry))
            self.num_entries += 1
            return self.num_entries - 1

    def keep_picture(self, picture: Image.Image) -> Path:
        """Keep a picture, and return the path of its file.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{next(self._pictures):06d}.png"
        picture.convert("RGB").save(path)
        return path

    def mark_done(self, count: int) -> None:
        """Keep that the first `count` entries are done."""
        with self._lock:
            self.num_done = count
            self._write({_DONE: count})

    def entries(self) -> list[Entry]:
        """All entries in order.

        Raises:
            InputError: they cannot be read.
        """
        with self._lock:
            return read_entries(self.folder)[0]

    def sync(self) -> bool:
        """Write everything to disk, and return whether that was possible."""
        with self._lock, suppress(OSError):
            self._flush()
            with self._path.open("ab") as file:
                os.fsync(file.fileno())
            return not self._unwritten
        return False

    def clear(self) -> None:
        """Forget all entries, and delete the folder."""
        with self._lock:
            self._unwritten.clear()
            self.num_entries = self.num_done = 0
            shutil.rmtree(self.folder, ignore_errors=True)

    def delete(self) -> None:
        """Delete the folder for good: entries that still come are kept nowhere."""
        self._is_deleted = True
        self.clear()

    def _write(self, line: dict[str, Any]) -> None:
        if self._is_deleted:
            return
        self._unwritten.append(json.dumps(line) + "\n")
        with suppress(OSError):  # a disk that is full may have room again later
            self._flush()

    def _flush(self) -> None:
        """Write the lines that are not written yet, all or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = "".join(self._unwritten).encode()
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(content) < len(content):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._unwritten.clear()


def read_entries(folder: Path) -> tuple[list[Entry], int]:
    """Read the entries of a folder, none if there is none, and how many of them are done.

    Raises:
        InputError: the file cannot be read or is damaged.
    """
    path = folder / FILE
    if path_kind(path) is None:
        return [], 0
    remedy = "restore it from a copy, or remove it"
    entries: list[Entry] = []
    num_done = 0
    lines = read_file(path, "the entries of a run", _MAX_BYTES).split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # the last one is incomplete, or empty
        tree = parse_json(line, dict, f"{path}, line {number},", remedy)
        entry = ENTRIES.from_tree(tree)
        if entry is not None:
            entries.append(entry)
        elif isinstance(tree.get(_DONE), int):
            num_done = tree[_DONE]
        else:
            raise InputError(f"{path}, line {number}, is damaged (it is no entry): {remedy}")
    return entries, min(num_done, len(entries))


def _cut_incomplete_line(path: Path) -> None:
    content = path.read_bytes()
    with suppress(OSError):
        os.truncate(path, content.rfind(b"\n") + 1)
