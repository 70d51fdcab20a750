"""Copies of a SQLite database that is in use, and the database of a new head node."""

import sqlite3
import threading
from contextlib import closing

import pytest

from diffusion.errors import InputError
from workflows.storage.local import LocalFolder
from workflows.storage.storage import Storage
from workflows.tracking import database_backup
from workflows.tracking.database_backup import DatabaseBackup, keep_copies


@pytest.fixture(name="storage", params=["local", "s3"])
def _storage(request, tmp_path):
    if request.param == "local":
        return Storage(str(tmp_path / "shared"))
    return Storage(f"s3://{request.getfixturevalue('s3')}/some")


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "mlflow" / "mlflow.db"
    path.parent.mkdir()
    add_rows(path, 1)
    return path


def add_rows(path, count):
    """Insert rows in transactions of two, one in each table."""
    with closing(sqlite3.connect(path, timeout=30.0)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS a (x)")
        connection.execute("CREATE TABLE IF NOT EXISTS b (x)")
        for number in range(count):
            with connection:
                connection.execute("INSERT INTO a VALUES (?)", (number,))
                connection.execute("INSERT INTO b VALUES (?)", (number,))


def counts(path):
    with closing(sqlite3.connect(path)) as connection:
        return [connection.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] for name in "ab"]


def test_a_new_head_has_the_database_of_the_last_copy(database, storage, tmp_path):
    backup = DatabaseBackup(database, storage)
    assert backup.copy() and not backup.copy(), "it has not changed"
    add_rows(database, 2)
    assert backup.copy()
    new = tmp_path / "new" / "mlflow.db"
    assert DatabaseBackup(new, storage).restore()
    assert counts(new) == counts(database) == [3, 3]


def test_a_database_that_is_there_is_never_replaced(database, storage):
    DatabaseBackup(database, storage).copy()
    add_rows(database, 1)
    assert not DatabaseBackup(database, storage).restore()
    assert counts(database) == [2, 2]


def test_without_a_database_nothing_is_copied_and_without_a_copy_nothing_restored(storage, tmp_path):
    backup = DatabaseBackup(tmp_path / "none" / "mlflow.db", storage)
    assert not backup.copy() and not backup.restore()
    assert storage.files() == []


def test_a_copy_that_is_made_while_the_database_is_written_has_whole_transactions(database, tmp_path):
    storage = Storage(str(tmp_path / "shared"))
    writer = threading.Thread(target=add_rows, args=(database, 200))
    writer.start()
    copies = 0
    while writer.is_alive() or not copies:
        DatabaseBackup(database, storage).copy()
        restored = tmp_path / f"restored-{copies}" / "mlflow.db"
        assert DatabaseBackup(restored, storage).restore()
        in_a, in_b = counts(restored)
        assert in_a == in_b
        copies += 1
    writer.join()


def test_a_damaged_database_does_not_replace_the_last_good_copy(database, tmp_path):
    storage = Storage(str(tmp_path / "shared"))
    backup = DatabaseBackup(database, storage)
    backup.copy()
    database.write_bytes(b"no database" * 1000)
    with pytest.raises(OSError, match="cannot be copied"):
        backup.copy()
    new = tmp_path / "new" / "mlflow.db"
    assert DatabaseBackup(new, storage).restore() and counts(new) == [1, 1]


@pytest.mark.parametrize("damage", [b"no database" * 1000, None])
def test_a_copy_that_cannot_be_read_is_refused_and_kept(tmp_path, monkeypatch, damage):
    storage = Storage(str(tmp_path / "shared"))
    storage.write_bytes("mlflow-database/mlflow.db", damage or b"")
    if damage is None:

        def silent(folder, name):
            raise OSError("no answer")

        monkeypatch.setattr(LocalFolder, "read_bytes", silent)
    backup = DatabaseBackup(tmp_path / "new" / "mlflow.db", storage)
    with pytest.raises(InputError, match="move the copy away"):
        backup.restore()
    assert not (tmp_path / "new" / "mlflow.db").exists()


def test_copies_are_kept_until_after_the_servers_end(database, tmp_path, monkeypatch):
    storage, lines = Storage(str(tmp_path / "shared")), []
    monkeypatch.setattr(database_backup, "SECONDS_BETWEEN_COPIES", 0.0)
    original, answers = LocalFolder.write_bytes, iter([False, False, True, True])

    def write_bytes(folder, name, content):
        if not next(answers):
            raise OSError("no answer")
        original(folder, name, content)

    running = iter([True, True, True, False])

    def is_running():
        add_rows(database, 1)
        return next(running, False)

    monkeypatch.setattr(LocalFolder, "write_bytes", write_bytes)
    keep_copies(DatabaseBackup(database, storage), is_running, lines.append)
    assert ["no answer" in lines[0], "written again" in lines[1]] == [True, True] and len(lines) == 2
    new = tmp_path / "new" / "mlflow.db"
    assert DatabaseBackup(new, storage).restore() and counts(new) == [5, 5]


def test_what_is_written_while_a_copy_is_uploaded_is_in_the_next_one(database, tmp_path, monkeypatch):
    original = LocalFolder.write_bytes

    def write_bytes(folder, name, content):
        add_rows(database, 1)
        original(folder, name, content)

    storage = Storage(str(tmp_path / "shared"))
    backup = DatabaseBackup(database, storage)
    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "write_bytes", write_bytes)
        backup.copy()
    assert backup.copy()
    new = tmp_path / "new" / "mlflow.db"
    assert DatabaseBackup(new, storage).restore() and counts(new) == [2, 2]
