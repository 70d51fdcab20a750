"""The SQLite database of local runs: created whole or not at all, and checked before MLflow opens it.

MLflow makes its tables in many steps: two processes that do so at once, or a kill, leave a file that it
refuses for ever. This module is imported in no time, so that a command can soon say that it cannot write.
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from diffusion.errors import InputError
from diffusion.files import os_reason, part_name, path_kind, sync, user_path
from workflows.environment import tracking_uri

DEFAULT_URI = "sqlite:///mlflow.db"
_SCHEME = "sqlite:///"
_LOCK_TIMEOUT = 3.0  # seconds; MLflow would wait for 20 s, several times
_SECONDS_UNTOUCHED = 3.0  # after which nobody is making a database any more
_MAX_SECONDS_OF_ANOTHER = 60.0
_JOURNALS = ("-journal", "-wal", "-shm")  # files that SQLite has beside a database
_FIRST_TABLES = {"experiments", "runs", "metrics", "params", "tags"}  # what MLflow makes first
# Rows that a database has when it is used, by table; MLflow makes experiment 0 itself.
_HOLDS_SOMETHING = {"runs": "", "registered_models": "", "experiments": "WHERE experiment_id > 0"}
_REMEDY = "give a database in a folder that can be written to, or a server, by --tracking-uri"


def store_uri(given: str | None) -> str:
    """URI of the store to use, as given by --tracking-uri, by the environment, or else the default."""
    return given or tracking_uri() or DEFAULT_URI


def database_of(uri: str) -> Path | None:
    """Absolute path of the database file of a sqlite URI; None for other URIs."""
    return user_path(uri.removeprefix(_SCHEME)) if uri.startswith(_SCHEME) else None


def check_writable(uri: str) -> None:
    """Check that the database of a sqlite URI could be created or written to; other URIs pass.

    Raises:
        InputError: its folder or file cannot be written to, or another program holds its lock.
    """
    path = database_of(uri)
    if path is None or path_kind(path.parent) != "folder":
        return  # `resolve_tracking_uri` says that the folder is missing
    kind = path_kind(path)
    for each in (path.parent, path) if kind == "file" else (path.parent,):
        if not os.access(each, os.W_OK):
            raise InputError(f"--tracking-uri {uri}: {each} cannot be written to: {_REMEDY}")
    if kind == "file" and path.stat().st_size:
        try:
            with closing(_connect(path)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            raise InputError(
                f"--tracking-uri {uri}: it cannot be written to ({error}): end the program that uses it, or "
                f"{_REMEDY}"
            ) from error
        except sqlite3.DatabaseError as error:  # it is none
            raise InputError(f"--tracking-uri {uri} cannot be used ({error}): give another file") from error


def ensure_database(uri: str) -> None:
    """Create the database of a sqlite URI if it is missing or if its creation was cut short.

    It is made beside its place and moved there, by one process at a time. A database that holds anything is
    never replaced.

    Raises:
        InputError: it cannot be created or written to.
    """
    path = database_of(uri)
    if path is None:
        return
    check_writable(uri)
    if _is_made(path):
        return
    try:
        with _locked(path.parent) as is_locked:
            if not _is_made_by_another(path):
                if is_locked:
                    _remove(path.parent.glob(f".part-*-{path.name}*"))  # of processes that were killed
                _create(path)
                _forget_connections(f"{_SCHEME}{path}")
    except InputError:
        raise
    except Exception as error:  # of sqlite3, sqlalchemy, alembic or MLflow
        reason = os_reason(error) if isinstance(error, OSError) else str(error).split("\n")[0][:160]
        raise InputError(f"--tracking-uri {uri} cannot be created ({reason}): {_REMEDY}") from error


def _connect(path: Path) -> sqlite3.Connection:
    """Open an existing database."""
    return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=_LOCK_TIMEOUT, isolation_level=None)


def _is_made(path: Path) -> bool:
    """Whether there is a database that holds anything, or that has all of MLflow's tables.

    Raises:
        InputError: the file is no database.
    """
    if path_kind(path) != "file" or not path.stat().st_size:
        return False
    try:
        with closing(_connect(path)) as database:
            names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            for table, rows in _HOLDS_SOMETHING.items():
                if table in names and database.execute(f"SELECT 1 FROM {table} {rows} LIMIT 1").fetchone():
                    return True
            if names and not names & _FIRST_TABLES:
                return True  # somebody else's, to which MLflow adds its tables
            version = (
                database.execute("SELECT version_num FROM alembic_version").fetchone()
                if "alembic_version" in names
                else None
            )
    except sqlite3.DatabaseError as error:
        raise InputError(f"--tracking-uri {_SCHEME}{path} cannot be used ({error}): {_REMEDY}") from error
    from mlflow.store.db.utils import _get_latest_schema_revision

    return version is not None and version[0] == _get_latest_schema_revision()


def _is_made_by_another(path: Path) -> bool:
    """Whether there is a database; waits while a program without our lock, such as MLflow's, makes it."""
    give_up = time.monotonic() + _MAX_SECONDS_OF_ANOTHER
    while not (is_made := _is_made(path)) and time.monotonic() < give_up:
        changed = 0.0
        for end in ("", *_JOURNALS):
            with suppress(FileNotFoundError):
                changed = max(changed, path.with_name(path.name + end).stat().st_mtime)
        if time.time() > changed + _SECONDS_UNTOUCHED:
            break
        time.sleep(0.1)
    return is_made


def _create(path: Path) -> None:
    """Make a database with MLflow's tables and its default experiment, and move it to its place."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    part = path.with_name(part_name(path.name))
    try:
        store = SqlAlchemyStore(f"{_SCHEME}{part}", str(path.parent / "mlartifacts"))
        store._dispose_engine()
        SqlAlchemyStore._engine_map.pop(store.db_uri, None)
        # A journal of the file that is replaced would be played back into this one.
        _remove(path.with_name(path.name + end) for end in _JOURNALS)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        _remove(part.with_name(part.name + end) for end in ("", *_JOURNALS))


def _forget_connections(uri: str) -> None:
    """Close MLflow's connections to a database that was at this place before."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as ModelStore
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for store in (SqlAlchemyStore, ModelStore):
        if uri in store._engine_map:
            store._engine_map[uri].dispose()


def _remove(paths: Iterator[Path]) -> None:
    for path in list(paths):
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, which the system releases if the process is killed.

    Yields:
        Whether it is held: some network file systems and Windows cannot lock folders. Two processes then
        each make a database, of which one stays.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(handle)
