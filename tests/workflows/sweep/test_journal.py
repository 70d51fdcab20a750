"""What the journal of a sweep has taken is on disk."""

import os

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
