"""The checkpoints of one training: the newest and the best stay, and a damaged one is passed over."""

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
    Damaged,
    add_facts,
    facts_of,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from workflows.storage import Storage

_NAME = r"\d{9,}"


class CheckpointNotWritten(RuntimeError):
    """A checkpoint could not be written; those before it stand. The message is one line."""


class CheckpointStore:
    """Checkpoints under their numbers of updates in a storage. It can be pickled.

    Several processes may save to one place, as when an old one lingers: each checkpoint is the whole
    one of the process that saved it last, and none deletes what is newer than what it saved itself.

    Args:
        storage: theirs alone.
        keep: how many of the newest stay, beside the best; 1 or more.

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
        """Where they are."""
        return str(self._storage)

    def save(self, write: Callable[[Path], None], update: int, objective: float | None) -> None:
        """Write a checkpoint, then delete those that need not stay.

        Saving an update again replaces the one that is there, at once.

        Args:
            write: writes the files into an empty folder; a manifest is made if it makes none.
            update: optimizer steps done.
            objective: lower is better; None, or not finite, if it is not known.

        Raises:
            CheckpointNotWritten: the disk is full or failing, or the server does not answer.
        """
        name = f"{update:09d}"
        known = None if objective is None or not math.isfinite(objective) else float(objective)
        facts = {"update": update, "objective": known}
        try:
            self._storage.remove_leftovers(_NAME)
            with self._storage.scratch(name) as folder:
                write(folder)
                if (folder / MANIFEST).exists():
                    add_facts(folder, facts)
                else:
                    write_manifest(folder, facts)
                self._storage.put_folder(folder, name)
        except OSError as error:
            reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
            raise CheckpointNotWritten(
                f"the checkpoint of update {update} was not written to {self._storage} ({reason}): "
                "free or mend that place, or give another; the checkpoints before it stand"
            ) from error
        self._damaged.discard(name)
        try:
            self._prune(name)
        except (OSError, InputError):
            pass  # the checkpoint stands, and the next one prunes again

    def load_newest(self, into: Path, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole, None if there is none.

        Args:
            into: local folder in which its folder is to stand.
            say: is told of each damaged one, in one line; it stays where it is.

        Raises:
            InputError: the storage does not answer.
        """
        for name in reversed(self._names()):
            try:
                return self.load(name, into)
            except FileNotFoundError:
                continue  # another process pruned it meanwhile
            except Damaged as error:
                self._damaged.add(name)
                say(str(error))
        return None

    def load(self, name: str, into: Path) -> Path:
        """The local folder of one checkpoint, every file of which is as it was written.

        Args:
            name: such as `best` gives.
            into: local folder in which its folder is to stand.

        Raises:
            FileNotFoundError: there is none of that name.
            Damaged: a file of it is missing or altered.
            InputError: the storage does not answer.
        """
        try:
            return self._fetch(name, into / name)
        except (FileNotFoundError, Damaged):
            # It may have been replaced while it was read: then the second time it is whole.
            return self._fetch(name, into / name)

    def _fetch(self, name: str, folder: Path) -> Path:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            with self._answering():
                self._storage.fetch_folder(name, folder)
            read_manifest(folder)
        except (FileNotFoundError, Damaged) as error:
            shutil.rmtree(folder, ignore_errors=True)
            place = self._storage.child(name)
            if name not in self._names():
                raise FileNotFoundError(f"{place} is not there") from error
            if isinstance(error, FileNotFoundError):
                raise Damaged(f"{place} has no {MANIFEST}: it was never written to its end") from error
            # Its place in the storage is of use to the reader, and not that of the copy.
            raise Damaged(str(error).replace(str(folder), str(place))) from error
        return folder

    def best(self) -> str | None:
        """The name of the checkpoint of the lowest objective, None if no objective is known."""
        return _best({name: facts for name in self._names() if (facts := self._facts(name)) is not None})

    def updates(self) -> list[int]:
        """Numbers of updates of the checkpoints that are there, in order."""
        names = self._names()
        with self._answering():
            return [int(name) for name in names if self._storage.exists(f"{name}/{MANIFEST}")]

    def _names(self) -> list[str]:
        """Names of all checkpoints, oldest first; a damaged one's too."""
        with self._answering():
            return sorted((name for name in self._storage.names() if re.fullmatch(_NAME, name)), key=int)

    def _facts(self, name: str) -> dict[str, Any] | None:
        """What its manifest says, None if it is known to be damaged."""
        if name in self._damaged:
            return None
        with self._answering():
            content = self._storage.read_bytes(f"{name}/{MANIFEST}")
        try:
            return None if content is None else facts_of(parse_manifest(content, name))
        except Damaged:
            return None

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = " ".join((error.strerror or str(error)).split())
            raise InputError(
                f"the checkpoints at {self._storage} cannot be read ({reason}): mend that and run again"
            ) from error

    def _prune(self, saved: str) -> None:
        """Delete what is neither the best nor among the newest up to the one just saved."""
        # A newer one is another process's, or a damaged one that this training has yet to pass: it
        # neither counts, or the good ones would be pruned in its favour, nor is it deleted.
        upto = [name for name in self._names() if int(name) <= int(saved)]
        facts = {name: known for name in upto if (known := self._facts(name)) is not None}
        stay = {*list(facts)[-self._keep :], saved, _best(facts)}
        for name in upto:
            if name not in stay:
                self._storage.delete(name)


def _best(facts: Mapping[str, Mapping[str, Any]]) -> str | None:
    objectives = {name: known.get("objective") for name, known in facts.items()}
    finite = {
        name: value
        for name, value in objectives.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return min(finite, key=lambda name: (finite[name], int(name))) if finite else None
