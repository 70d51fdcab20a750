"""The journal of a sweep: a file of what happens to its trials, from which a resumed sweep goes on."""

import errno
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.errors import InputError
from diffusion.files import parse_json, path_kind, read_file, replacing, sync
from workflows.status import TrialStatus
from workflows.storage.tagged_records import TaggedRecords

JOURNAL_FILE = "journal.jsonl"
REMEDY = "give a new sweep another --name, or restore the journal from a copy"
_MAX_BYTES = 2**30


@dataclass(frozen=True)
class TrialBegan:
    """A trial starts; an earlier one of this ID starts from scratch.

    Attributes:
        trial_id: ID of the trial.
        params: all parameters by dotted name.
        at: seconds that the sweep has taken, those of earlier sessions included.
    """

    trial_id: str
    params: dict[str, Any]
    at: float


@dataclass(frozen=True)
class TrialEvaluated:
    """The model of a trial was evaluated.

    Attributes:
        trial_id: ID of the trial.
        updates: number of updates done.
        metrics: metrics by name.
        at: as for `TrialBegan`.
    """

    trial_id: str
    updates: int
    metrics: dict[str, float]
    at: float


@dataclass(frozen=True)
class TrialEnded:
    """A trial ended.

    Attributes:
        trial_id: ID of the trial.
        status: how it ended.
        reason: why it was pruned, stopped or failed.
        seconds: seconds from its start.
        at: as for `TrialBegan`.
    """

    trial_id: str
    status: TrialStatus
    reason: str
    seconds: float
    at: float


TrialEvent = TrialBegan | TrialEvaluated | TrialEnded

_EVENTS = TaggedRecords[TrialEvent](
    "event", {"begin": TrialBegan, "evaluated": TrialEvaluated, "end": TrialEnded}
)


class Journal:
    """An append-only file of events, one JSON object per line, that survives crashes and power cuts.

    A journal that is deleted or cut while the sweep runs is written anew with the next event.

    Args:
        path: path of the file; created if missing. An incomplete last line is removed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        _prepare_for_append(path)
        self._content = bytearray(path.read_bytes())

    def write(self, event: TrialEvent) -> None:
        """Append an event; it is on disk when this returns.

        Raises:
            OSError: the disk is full or failing; the file is as before.
        """
        line = f"{json.dumps(_EVENTS.to_tree(event))}\n".encode()
        if not self._path.exists() or self._path.stat().st_size < len(self._content):
            with replacing(self._path) as part:
                part.write_bytes(self._content)
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(size)  # a later event must not continue this line
                raise
        self._content += line


def read_journal(path: Path) -> list[TrialEvent]:
    """Read the events of a journal in order; a missing file has none.

    An incomplete last line, left by a crash during a write, is skipped.

    Raises:
        InputError: the file cannot be read, or another line is damaged.
    """
    if path_kind(path) is None:
        return []
    events: list[TrialEvent] = []
    lines = read_file(path, REMEDY.removeprefix("give "), _MAX_BYTES).split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number},"
        tree = parse_json(line, dict, where, REMEDY)
        event = _EVENTS.from_tree(tree)
        if event is None:
            raise InputError(f"{where} is damaged (it is no event): {REMEDY}")
        events.append(event)
    return events


def _prepare_for_append(path: Path) -> None:
    """Create the file if it is missing, else cut off an incomplete last line."""
    if not path.exists():
        path.touch()
        sync(path.parent)
        return
    content = path.read_bytes()
    complete_size = content.rfind(b"\n") + 1
    if complete_size < len(content):
        os.truncate(path, complete_size)
