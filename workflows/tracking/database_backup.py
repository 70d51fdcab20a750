"""Copies of MLflow's SQLite database in the storage of a cluster, which outlives the head node.

`workflows.cluster mlflow` restores the database on a new head before it starts the server, and starts a
process that runs `keep_copies`.
"""

import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from diffusion.errors import InputError
from diffusion.files import replacing
from workflows.storage.storage import Storage

SECONDS_BETWEEN_COPIES = 60.0
_FOLDER, _FILE = "mlflow-database", "mlflow.db"
_LOCK_TIMEOUT = 30.0  # seconds


class DatabaseBackup:
    """Copies a SQLite database to a storage, and back.

    Args:
        database: path of the database.
        storage: storage of the cluster; the copy is mlflow-database/mlflow.db in it.
    """

    def __init__(self, database: Path, storage: Storage) -> None:
        self._database, self._storage = database, storage.child(_FOLDER)
        self._copied: list[tuple[int, int]] | None = None

    def __str__(self) -> str:
        """The location of the copy."""
        return f"{self._storage}/{_FILE}"

    def copy(self) -> bool:
        """Copy the database, which may be in use, if it has changed since the last copy.

        SQLite's backup gives the state after a whole transaction, and the storage replaces files atomically:
        the copy can be opened at any time.

        Returns:
            Whether it was copied.

        Raises:
            OSError: the database is busy for half a minute, or damaged, or the storage does not answer.
        """
        state = self._state()
        if not state or state == self._copied:
            return False
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / _FILE
            try:
                with (
                    closing(sqlite3.connect(self._database, timeout=_LOCK_TIMEOUT)) as source,
                    closing(sqlite3.connect(path)) as target,
                ):
                    source.backup(target)
                    (problem,) = target.execute("PRAGMA quick_check(1)").fetchone()
            except sqlite3.Error as error:
                problem = str(error)
            if problem != "ok":
                raise OSError(f"{self._database} cannot be copied: {problem}")
            self._storage.write_bytes(_FILE, path.read_bytes())
        self._copied = state
        return True

    def restore(self) -> bool:
        """Put the copy in the place of a database that is missing, as on a new head node.

        Returns:
            Whether there was none and the copy is in its place.

        Raises:
            InputError: the storage does not answer, or the copy is damaged. To go on without would replace
                the copy by an empty database.
        """
        if self._database.exists():
            return False
        remedy = "fix that, or move the copy away to begin with an empty database"
        try:
            content = self._storage.read_bytes(_FILE)
        except OSError as error:
            raise InputError(f"{self} cannot be read ({error}): {remedy}") from error
        if content is None:
            return False
        self._database.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._database) as part:
            part.write_bytes(content)
            try:
                with closing(sqlite3.connect(part)) as restored:
                    (problem,) = restored.execute("PRAGMA quick_check(1)").fetchone()
            except sqlite3.Error as error:
                problem = str(error)
            if problem != "ok":
                raise InputError(f"{self} is damaged ({problem}): {remedy}")
        return True

    def _state(self) -> list[tuple[int, int]]:
        """Modification times and sizes of the database's files; empty if there is no database."""
        paths = [self._database, Path(f"{self._database}-wal")]
        infos = [path.stat() for path in paths if path.exists()]
        return [(info.st_mtime_ns, info.st_size) for info in infos]


def keep_copies(
    backup: DatabaseBackup, is_running: Callable[[], bool], notify: Callable[[str], None]
) -> None:
    """Copy a database every minute while its server runs, and once more after its end.

    Args:
        backup: the backup.
        is_running: whether the server runs.
        notify: receives a line when copies begin to fail, and when they succeed again.
    """
    is_failing = False
    while True:
        was_running = is_running()
        try:
            backup.copy()
        except OSError as error:
            if not is_failing:
                notify(f"{backup} could not be written ({error}): it is tried again every minute")
            is_failing = True
        else:
            if is_failing:
                notify(f"{backup} is written again")
            is_failing = False
        if not was_running and not is_running():  # it may have been started again
            return
        time.sleep(SECONDS_BETWEEN_COPIES)
