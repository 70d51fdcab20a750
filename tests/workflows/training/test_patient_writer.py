"""Checkpoints on a storage that fails, or is silent, for a while."""

import errno
import threading
import time

import pytest

from diffusion.manifest import read_manifest
from workflows.storage import storage as storage_module
from workflows.storage.local import LocalFolder
from workflows.storage.storage import Storage, is_permanent
from workflows.training import patient_writer
from workflows.training.checkpoint_store import CheckpointStore, CheckpointWriteError
from workflows.training.patient_writer import PatientWriter


def write(folder):
    (folder / "weights").write_bytes(b"1")


class FailingFolder:
    """Makes every write to a local storage raise an error while `error` is set."""

    def __init__(self, monkeypatch):
        self.error = None
        original = LocalFolder.upload_folder

        def upload_folder(folder, local, name):
            if self.error is not None:
                raise self.error
            original(folder, local, name)

        monkeypatch.setattr(LocalFolder, "upload_folder", upload_folder)


@pytest.fixture
def folder(monkeypatch):
    return FailingFolder(monkeypatch)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(Storage(str(tmp_path / "checkpoints")), 3)


@pytest.fixture
def lines():
    return []


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(patient_writer, "PAUSE_FACTOR", 0.0)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EHOSTDOWN, None])
def test_a_training_goes_on_without_the_checkpoints_that_a_storage_missed(store, folder, lines, number):
    writer = PatientWriter(store, 3600.0, lines.append)
    writer.save(write, 10, None)
    folder.error = OSError(number, "silent") if number else OSError("AWS Error NETWORK_CONNECTION")
    writer.save(write, 20, None)
    writer.save(write, 30, None)
    assert store.updates() == [10]
    (line,) = lines
    assert "update 20" in line and "training goes on" in line and "60 minutes" in line
    folder.error = None
    writer.save(write, 40, None)
    assert store.updates() == [10, 40] and "update 40" in lines[1] and len(lines) == 2
    folder.error = OSError(errno.EIO, "silent")
    writer.save(write, 50, None)  # the time starts anew
    assert len(lines) == 3


def test_a_storage_that_fails_for_too_long_ends_the_training(store, folder, lines, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(patient_writer.time, "monotonic", lambda: now[0])
    writer, folder.error = PatientWriter(store, 600.0, lines.append), OSError(errno.ESTALE, "stale")
    for seconds in (0.0, 300.0, 599.0):
        now[0] = seconds
        writer.save(write, 10, None)
    now[0] = 600.0
    with pytest.raises(CheckpointWriteError, match="update 10 .*stale.*earlier checkpoints are intact"):
        writer.save(write, 10, None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_or_read_only_disk_ends_the_training_at_once(store, folder, lines, number):
    writer, folder.error = PatientWriter(store, 3600.0, lines.append), OSError(number, "no")
    assert is_permanent(folder.error)
    with pytest.raises(CheckpointWriteError):
        writer.save(write, 10, None)

    def full():
        raise folder.error

    with pytest.raises(CheckpointWriteError, match="the picture .*free space"):
        writer.write(full, "the picture")
    assert not lines


def test_a_picture_that_a_silent_storage_misses_is_left_out(store, lines):
    def silent():
        raise OSError(errno.EIO, "silent")

    PatientWriter(store, 3600.0, lines.append).write(silent, "the picture")
    assert not lines


def test_a_write_that_never_returns_does_not_stop_the_training(store, lines, monkeypatch):
    monkeypatch.setattr(patient_writer, "SECONDS_TO_WRITE", 0.05)
    answers, weights = threading.Event(), ["of update 10"]

    def hang(folder):
        answers.wait(20.0)
        (folder / "weights").write_text(weights[0])

    writer = PatientWriter(store, 3600.0, lines.append)
    writer.save(hang, 10, None)
    weights[0] = "of update 11"
    started = time.monotonic()
    writer.save(write, 20, None)
    assert time.monotonic() - started < 10.0 and "no answer" in lines[0]
    answers.set()
    with pytest.raises(CheckpointWriteError, match="abandoned"):
        writer._attempt.wait(20.0)
    assert store.updates() == [], "weights that were written while they changed are no checkpoint"
    monkeypatch.setattr(patient_writer, "SECONDS_TO_WRITE", 20.0)
    writer.save(write, 30, None)
    assert store.updates() == [30]


def test_the_last_checkpoint_is_tried_until_it_is_written(store, folder, lines, tmp_path, monkeypatch):
    monkeypatch.setattr(patient_writer, "SECONDS_BETWEEN_RETRIES", 0.01)
    writer, folder.error = PatientWriter(store, 3600.0, lines.append), OSError(errno.EIO, "silent")
    writer.save(write, 10, 0.5)
    threading.Timer(0.1, setattr, (folder, "error", None)).start()
    writer.finish(lambda: False)
    loaded = store.load_newest(tmp_path / "copy", pytest.fail)
    assert read_manifest(loaded)["objective"] == 0.5


def test_a_stopped_training_waits_for_its_last_checkpoint_for_seconds_only(store, folder, lines, monkeypatch):
    monkeypatch.setattr(patient_writer, "SECONDS_BETWEEN_RETRIES", 0.01)
    monkeypatch.setattr(patient_writer, "_SECONDS_TO_STOP", 0.05)
    writer, folder.error = PatientWriter(store, 3600.0, lines.append), OSError(errno.EIO, "silent")
    writer.save(write, 10, None)
    with pytest.raises(CheckpointWriteError, match="earlier checkpoints are intact"):
        writer.finish(lambda: True)


def test_a_training_without_a_store_writes_nothing(lines):
    writer = PatientWriter(None, 0.0, lines.append)
    writer.save(write, 10, None)
    writer.finish(lambda: True)
    assert not lines


def test_another_machine_whose_clock_is_hours_ahead_damages_no_checkpoint(
    store, lines, tmp_path, monkeypatch
):
    """It takes what is being written for the rest of an interrupted write, and removes it."""
    other = CheckpointStore(Storage(str(tmp_path / "checkpoints")), 3)

    def write_slowly(folder):
        write(folder)
        hours_later = time.time() + 3 * 3600
        with monkeypatch.context() as ahead:
            ahead.setattr(storage_module.time, "time", lambda: hours_later)
            other.save(write, 5, None)
        assert not folder.exists()

    writer = PatientWriter(store, 3600.0, lines.append)
    writer.save(write_slowly, 10, None)
    assert store.updates() == [5] and "update 10" in lines[0]
    writer.save(write, 20, None)
    assert store.updates() == [5, 20]
    read_manifest(store.load_newest(tmp_path / "copy", pytest.fail))


def test_attempts_take_a_fifth_of_the_time(store, folder, lines, monkeypatch):
    now, attempts = [0.0], []
    monkeypatch.setattr(patient_writer, "PAUSE_FACTOR", 4.0)
    monkeypatch.setattr(patient_writer.time, "monotonic", lambda: now[0])
    writer = PatientWriter(store, 1e9, lines.append)

    def fail(_):
        attempts.append(now[0])
        now[0] += 40.0
        raise OSError(errno.EIO, "silent")

    while now[0] < 1000.0:
        writer.save(fail, 10, None)
        now[0] += 1.0
    assert attempts == pytest.approx([0.0, 200.0, 400.0, 600.0, 800.0], abs=10.0) and len(lines) == 1


def test_a_checkpoint_that_was_missed_is_not_written_after_a_newer_one(store, folder, lines):
    """Its weights are those of the training by now, which has gone on."""
    attempts = []

    def write_once(folder):
        attempts.append(folder)
        assert len(attempts) == 1
        write(folder)

    writer, folder.error = PatientWriter(store, 3600.0, lines.append), OSError(errno.EIO, "silent")
    writer.save(write_once, 10, None)
    folder.error = None
    writer.save(write, 20, None)
    writer.finish(lambda: True)
    assert store.updates() == [20]
