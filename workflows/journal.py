"""A file that lines are added to and never taken from: what it tells survives a kill or a power cut."""

import json
import os
from pathlib import Path
from typing import Any

from diffusion.files import sync


class Journal:
    """A file of events, one JSON object a line; the disk has each before `write` returns.

    Args:
        path: of the file; made if need be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        _cut_torn_line(path)

    def write(self, event: dict[str, Any]) -> None:
        """Add an event.

        Raises:
            OSError: the disk is full or failing.
        """
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The events of a journal in their order; none of a file that is not there.

    A last line that was cut off while it was written is left out.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        path.touch()
        sync(path.parent)
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
