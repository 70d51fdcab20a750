"""What the journal of a sweep has taken is on disk."""

import errno
import os

import pytest

from workflows.sweep import journal as journal_module
from workflows.sweep.journal import Journal, TrialBegan, read_journal


def test_an_event_and_the_name_of_a_new_journal_are_on_disk_when_they_are_written(tmp_path, monkeypatch):
    """A power cut loses what was not synced: a name in a folder by the folder, an event by the file."""
    path, synced = tmp_path / "journal.jsonl", []
    fsync, sync = os.fsync, journal_module.sync

    def sync_file(handle):
        synced.append(os.fstat(handle).st_size)
        fsync(handle)

    def sync_folder(folder):
        synced.append(sorted(each.name for each in folder.iterdir()))
        sync(folder)

    monkeypatch.setattr(journal_module, "sync", sync_folder)
    journal = Journal(path)
    assert synced == [[path.name]]
    monkeypatch.setattr(journal_module.os, "fsync", sync_file)
    for number in range(2):
        journal.write(TrialBegan(f"t{number}", {}, 0.0))
        assert synced[-1] == path.stat().st_size and len(read_journal(path)) == number + 1
    assert len(synced) == 3


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 10)])
def test_a_journal_that_is_deleted_or_cut_meanwhile_is_written_anew(tmp_path, damage):
    path = tmp_path / "journal.jsonl"
    events = [TrialBegan(f"t{number}", {}, 0.0) for number in range(4)]
    Journal(path).write(events[0])
    journal = Journal(path)
    journal.write(events[1])
    damage(path)
    journal.write(events[2])
    journal.write(events[3])
    assert read_journal(path) == events
    assert os.listdir(tmp_path) == [path.name]


def test_an_event_that_did_not_reach_the_disk_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    events = [TrialBegan(f"t{number}", {}, 0.0) for number in range(3)]
    journal = Journal(path)
    journal.write(events[0])

    def fail(_handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "fsync", fail)
        with pytest.raises(OSError):
            journal.write(events[1])
    journal.write(events[2])
    assert read_journal(path) == [events[0], events[2]]


def test_half_a_line_for_which_there_was_no_room_is_removed(tmp_path):
    """RLIMIT_FSIZE, like a disk that is nearly full, takes the first bytes of a line."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.write(TrialBegan("t0", {}, 0.0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError):
            journal.write(TrialBegan("t1", {}, 0.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.write(TrialBegan("t2", {}, 0.0))
    assert [event.trial_id for event in read_journal(path)] == ["t0", "t2"]
