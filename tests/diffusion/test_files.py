"""Atomic file writes: an old file stays unchanged until the new one is complete."""

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffusion import files
from diffusion.files import replacing


@pytest.mark.parametrize("name", ["a.csv", "plain", ".hidden.json"])
def test_the_new_file_replaces_the_old_one_when_the_block_ends(tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    with replacing(path) as part:
        assert part.suffix == path.suffix and part.parent == tmp_path
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(OSError), replacing(path) as part:
        part.write_text("half")
        raise OSError("full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failing_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "sampler.onnx"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="full"), replacing(path) as part:
        part.write_bytes(b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_file_is_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    path, calls = tmp_path / "a.csv", []
    real_sync, real_replace = files.sync, files.os.replace
    monkeypatch.setattr(files, "sync", lambda target: (calls.append(target.name), real_sync(target)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (calls.append("renamed"), real_replace(*paths)))
    with replacing(path) as part:
        part.write_text("new")
    assert calls == [part.name, "renamed", tmp_path.name]


def test_a_failing_sync_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail(_):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="broken"), replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_does_not_support_fsync_is_no_error(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, "not supported")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with replacing(tmp_path / "a.csv") as part:
        part.write_text("new")
    assert (tmp_path / "a.csv").read_text() == "new"


def test_many_writers_of_one_file_never_mix_their_bytes(tmp_path):
    path = tmp_path / "a.csv"

    def write(letter):
        for _ in range(20):
            with replacing(path) as part, part.open("w") as file:
                for _ in range(50):
                    file.write(letter * 1000)
                    file.flush()
            assert set(path.read_text()) in ({"a"}, {"b"}, {"c"})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, "abc"))
    assert path.stat().st_size == 50_000 and list(tmp_path.iterdir()) == [path]
