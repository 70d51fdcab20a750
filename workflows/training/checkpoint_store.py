"""Checkpoints of one training: keeps the newest and the best, and skips damaged ones when loading."""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion.errors import InputError
from diffusion.manifest import (
    MANIFEST,
    DamagedError,
    add_facts,
    facts_of,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from diffusion.metrics import OBJECTIVE
from workflows.storage.storage import Storage

REMEDY = ": free space or fix that location, or give another one; earlier checkpoints are intact"
_NAME = r"\d{9,}"


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; earlier checkpoints are intact. The message is one line."""


class CheckpointStore:
    """Checkpoints in a storage, each in a folder named after its number of updates. It can be pickled.

    Several processes may save to the same storage, for instance when an old process lingers. Each checkpoint
    is then complete and comes from the process that saved it last, and no process deletes checkpoints that
    are newer than its own.

    Args:
        storage: storage that holds nothing but these checkpoints.
        keep: number of newest checkpoints to keep in addition to the best one; 1 or more.

    Raises:
        InputError: `keep` is less than 1.
    """

    def __init__(self, storage: Storage, keep: int) -> None:
        if keep < 1:
            raise InputError(f"{keep} checkpoints to keep: give 1 or more")
        self._storage = storage
        self._keep = keep
        self._damaged: set[str] = set()

    def __str__(self) -> str:
        """The location of the checkpoints."""
        return str(self._storage)

    def save(self, write: Callable[[Path], None], update: int, objective: float | None) -> None:
        """Write a checkpoint, then delete those that are no longer to be kept.

        A checkpoint of the same update is replaced atomically.

        Args:
            write: writes the files into an empty folder; if it writes no manifest, one is added.
            update: number of optimizer steps done.
            objective: objective at this update, lower is better; None or a non-finite value if unknown.

        Raises:
            CheckpointWriteError: the disk is full or failing, or the server does not answer.
        """
        name = f"{update:09d}"
        finite = None if objective is None or not math.isfinite(objective) else float(objective)
        facts = {"update": update, OBJECTIVE: finite}
        try:
            self._storage.remove_incomplete(_NAME)
            with self._storage.staging_folder(name) as folder:
                write(folder)
                if (folder / MANIFEST).exists():
                    add_facts(folder, facts)
                else:
                    write_manifest(folder, facts)
                self._storage.upload_folder(folder, name)
        except OSError as error:
            reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
            raise CheckpointWriteError(
                f"the checkpoint of update {update} could not be written to {self._storage} ({reason})"
                + REMEDY
            ) from error
        self._damaged.discard(name)
        try:
            self._prune(name)
        except (OSError, InputError):
            pass  # the new checkpoint is safe, and the next call prunes again

    def load_newest(self, into: Path, notify: Callable[[str], None]) -> Path | None:
        """Copy the newest undamaged checkpoint to a local folder.

        Args:
            into: local folder in which the checkpoint's folder is created.
            notify: receives one line for each damaged checkpoint, which is left in the storage.

        Returns:
            The checkpoint's local folder, or None if there is no undamaged checkpoint.

        Raises:
            InputError: the storage does not answer.
        """
        for name in reversed(self._names()):
            try:
                return self.load(name, into)
            except FileNotFoundError:
                continue  # another process pruned it in the meantime
            except DamagedError as error:
                self._damaged.add(name)
                notify(str(error))
        return None

    def load(self, name: str, into: Path) -> Path:
        """Copy one checkpoint to a local folder and verify every file.

        Args:
            name: name of the checkpoint, as returned by `best`.
            into: local folder in which the checkpoint's folder is created.

        Returns:
            The checkpoint's local folder.

        Raises:
            FileNotFoundError: no checkpoint has that name.
            DamagedError: one of its files is missing or altered.
            InputError: the storage does not answer.
        """
        try:
            return self._fetch(name, into / name)
        except (FileNotFoundError, DamagedError):
            # It may have been replaced while it was being read; if so, a second attempt succeeds.
            return self._fetch(name, into / name)

    def _fetch(self, name: str, folder: Path) -> Path:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            with self._read_errors():
                self._storage.download_folder(name, folder)
                read_manifest(folder)
        except (FileNotFoundError, DamagedError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            location = self._storage.child(name)
            if name not in self._names():
                raise FileNotFoundError(f"{location} does not exist") from error
            if isinstance(error, FileNotFoundError):
                raise DamagedError(
                    f"{location} has no {MANIFEST}: it was never completely written"
                ) from error
            # Name the checkpoint in the storage, not the local copy, which has been deleted.
            raise DamagedError(str(error).replace(str(folder), str(location))) from error
        return folder

    def best(self) -> str | None:
        """Name of the checkpoint with the lowest objective, or None if no objective is known."""
        return _best({name: facts for name in self._names() if (facts := self._facts(name)) is not None})

    def updates(self) -> list[int]:
        """Numbers of updates of all stored checkpoints, in ascending order."""
        names = self._names()
        with self._read_errors():
            return [int(name) for name in names if self._storage.exists(f"{name}/{MANIFEST}")]

    def _names(self) -> list[str]:
        """Names of all checkpoints, oldest first, damaged ones included."""
        with self._read_errors():
            return sorted((name for name in self._storage.names() if re.fullmatch(_NAME, name)), key=int)

    def _facts(self, name: str) -> dict[str, Any] | None:
        """Facts in a checkpoint's manifest, or None if the checkpoint is known to be damaged."""
        if name in self._damaged:
            return None
        with self._read_errors():
            content = self._storage.read_bytes(f"{name}/{MANIFEST}")
        try:
            return None if content is None else facts_of(parse_manifest(content, name))
        except DamagedError:
            return None

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        """Turn an OSError into an InputError, except FileNotFoundError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = " ".join((error.strerror or str(error)).split())
            raise InputError(
                f"the checkpoints at {self._storage} cannot be read ({reason}): fix that and run again"
            ) from error

    def _prune(self, saved: str) -> None:
        """Delete checkpoints up to the one just saved, except the best and the newest of them."""
        # A newer checkpoint belongs to another process, or is a damaged one that this training has skipped
        # and not yet replaced. It is kept but does not count, or good ones would be pruned in its favour.
        candidates = [name for name in self._names() if int(name) <= int(saved)]
        facts = {name: found for name in candidates if (found := self._facts(name)) is not None}
        kept = {*list(facts)[-self._keep :], saved, _best(facts)}
        for name in candidates:
            if name not in kept:
                self._storage.delete(name)


def _best(facts: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Name of the checkpoint with the lowest finite objective; of equal ones the oldest."""
    objectives = {name: each.get(OBJECTIVE) for name, each in facts.items()}
    finite = {
        name: value
        for name, value in objectives.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return min(finite, key=lambda name: (finite[name], int(name))) if finite else None
