"""The working copy of a folder in a bucket."""

import shutil
import threading

import pytest

from workflows.storage import mirror as mirror_module
from workflows.storage.bucket import Bucket
from workflows.storage.local import LocalFolder
from workflows.storage.mirror import Mirror, restore
from workflows.storage.storage import Storage

INDEX = "journal.jsonl"


@pytest.fixture(name="storage", params=["local", "s3"])
def _storage(request, tmp_path):
    if request.param == "local":
        return Storage(str(tmp_path / "remote"))
    return Storage(f"s3://{request.getfixturevalue('s3')}/some").child("remote")


@pytest.fixture
def lines():
    return []


@pytest.fixture
def open_mirror(storage, tmp_path, lines):
    def open(machine):
        restore(tmp_path / machine, storage, INDEX, leave_out=("tune",))
        return Mirror(tmp_path / machine, storage, INDEX, lines.append)

    return open


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_another_machine_goes_on_with_the_files_of_the_first(open_mirror, storage, tmp_path):
    first = open_mirror("one")
    for name in ("trials/a/model.safetensors", "trials.csv", INDEX, ".part-1-half"):
        write(tmp_path / "one", name, f"content of {name}\n")
    first.copy()
    write(tmp_path / "one", "trials.csv", "changed\n")
    first.close()
    storage.write_text("tune/state", "of no use to others")
    assert storage.files() == [INDEX, "trials.csv", "trials/a/model.safetensors", "tune/state"]
    open_mirror("two")
    assert LocalFolder(tmp_path / "two").files() == [INDEX, "trials.csv", "trials/a/model.safetensors"]
    assert (tmp_path / "two/trials.csv").read_text() == "changed\n"


def test_only_changed_files_are_copied(open_mirror, tmp_path, monkeypatch):
    written = []
    original = Storage.write_bytes
    monkeypatch.setattr(
        Storage,
        "write_bytes",
        lambda storage, name, content: (written.append(name), original(storage, name, content)),
    )
    mirror = open_mirror("one")
    write(tmp_path / "one", "b", "1")
    write(tmp_path / "one", INDEX, "1\n")
    mirror.copy()
    mirror.copy()
    assert written == ["b", INDEX], "the index last"
    write(tmp_path / "one", INDEX, "1\n2\n")
    mirror.copy()
    assert written == ["b", INDEX, INDEX]


def test_an_index_in_the_storage_refers_only_to_what_is_there(open_mirror, storage, tmp_path, monkeypatch):
    original = Storage.write_bytes

    def a_trial_ends_while_files_are_copied(storage, name, content):
        write(tmp_path / "one", "trials/late", "x")
        write(tmp_path / "one", INDEX, "early\nlate\n")
        original(storage, name, content)

    mirror = open_mirror("one")
    write(tmp_path / "one", "trials/early", "x")
    write(tmp_path / "one", INDEX, "early\n")
    monkeypatch.setattr(Storage, "write_bytes", a_trial_ends_while_files_are_copied)
    mirror.copy()
    for name in storage.read_text(INDEX).splitlines():
        assert storage.exists(f"trials/{name}")


@pytest.mark.parametrize(
    ("local", "remote", "kept"),
    [("1\n2\n", "1\n", True), ("1\n", "1\n", True), ("1\n", "1\n2\n", False), ("1\n3\n", "1\n2\n", False)],
)
def test_a_working_copy_that_is_newer_is_kept(open_mirror, storage, tmp_path, local, remote, kept):
    write(tmp_path / "one", INDEX, local)
    write(tmp_path / "one", "trials/a", "local")
    storage.write_text(INDEX, remote)
    storage.write_text("trials/a", "remote")
    open_mirror("one")
    assert (tmp_path / "one/trials/a").read_text() == ("local" if kept else "remote")
    assert (tmp_path / "one" / INDEX).read_text() == (local if kept else remote)


@pytest.mark.parametrize("missing", ["a", "trials/z", INDEX])
def test_a_restore_that_was_interrupted_is_done_again(open_mirror, storage, tmp_path, monkeypatch, missing):
    for name in ("a", INDEX, "trials/z"):
        storage.write_text(name, "x\n")
    original = Storage.read_bytes

    def read_bytes(storage, name):
        if name == missing and (tmp_path / "one").exists():
            raise OSError("the storage does not answer")
        return original(storage, name)

    with monkeypatch.context() as interrupted, pytest.raises(OSError):
        interrupted.setattr(Storage, "read_bytes", read_bytes)
        open_mirror("one")
    open_mirror("one")
    assert LocalFolder(tmp_path / "one").files() == storage.files()


def test_a_copy_of_a_deleted_folder_is_not_taken_for_a_new_one(open_mirror, tmp_path):
    write(tmp_path / "one", INDEX, "of an earlier sweep\n")
    open_mirror("one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == [".copied.json"]


def test_a_silent_storage_is_told_once_and_gets_everything_later(s3, tmp_path, lines, monkeypatch):
    monkeypatch.setattr(mirror_module, "_SECONDS_BETWEEN_COPIES", 0.01)
    storage, silent, failed = Storage(f"s3://{s3}/some"), threading.Event(), threading.Semaphore(0)
    original = Bucket.write_bytes

    def fail(bucket, name, content):
        if silent.is_set():
            failed.release()
            raise OSError("AWS Error NETWORK_CONNECTION")
        original(bucket, name, content)

    monkeypatch.setattr(Bucket, "write_bytes", fail)
    mirror = Mirror(tmp_path / "one", storage, INDEX, lines.append)
    silent.set()
    write(tmp_path / "one", INDEX, "1\n")
    mirror.start()
    for _ in range(3):
        assert failed.acquire(timeout=30.0)
    with pytest.raises(OSError, match="NETWORK"):
        mirror.close()
    assert len(lines) == 1 and "does not answer" in lines[0] and "the sweep goes on" in lines[0]
    silent.clear()
    mirror.close()
    assert storage.read_text(INDEX) == "1\n"


def test_a_file_that_is_deleted_while_it_is_copied_is_left_out(open_mirror, storage, tmp_path, monkeypatch):
    original = Storage.write_bytes

    def delete_the_next(storage, name, content):
        shutil.rmtree(tmp_path / "one/b", ignore_errors=True)
        original(storage, name, content)

    mirror = open_mirror("one")
    write(tmp_path / "one", "a", "1")
    write(tmp_path / "one", "b/c", "2")
    monkeypatch.setattr(Storage, "write_bytes", delete_the_next)
    mirror.copy()
    assert storage.files() == ["a"]


def test_a_file_that_changes_while_it_is_copied_is_copied_again(open_mirror, storage, tmp_path, monkeypatch):
    original = Storage.write_bytes

    def change(storage, name, content):
        write(tmp_path / "one", "a", "longer")
        original(storage, name, content)

    mirror = open_mirror("one")
    write(tmp_path / "one", "a", "1")
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Storage, "write_bytes", change)
        mirror.copy()
    mirror.copy()
    assert storage.read_text("a") == "longer"


def test_what_was_restored_is_not_copied_back(open_mirror, storage, tmp_path, monkeypatch):
    first = open_mirror("one")
    write(tmp_path / "one", "trials/a", "x")
    write(tmp_path / "one", INDEX, "1\n")
    first.copy()
    second, written = open_mirror("two"), []
    monkeypatch.setattr(Storage, "write_bytes", lambda storage, name, content: written.append(name))
    write(tmp_path / "two", "trials/b", "x")
    write(tmp_path / "two", INDEX, "1\n2\n")
    second.copy()
    assert written == ["trials/b", INDEX]


def test_what_is_deleted_locally_is_deleted_in_the_storage(open_mirror, storage, tmp_path):
    mirror = open_mirror("one")
    for name in ("tracking/entries.jsonl", "trials/a", INDEX):
        write(tmp_path / "one", name, "x\n")
    mirror.copy()
    shutil.rmtree(tmp_path / "one" / "tracking")
    mirror.copy()
    assert storage.files() == [INDEX, "trials/a"]
    restored = open_mirror("two")
    (tmp_path / "two" / "trials" / "a").unlink()
    restored.copy()
    assert storage.files() == [INDEX]
