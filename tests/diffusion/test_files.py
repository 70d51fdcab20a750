"""A file that was there stays whole until the new one is."""

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffusion import files
from diffusion.files import replacing


@pytest.mark.parametrize("name", ["a.csv", "plain", ".hidden.json"])
def test_the_new_file_takes_the_old_ones_place(tmp_path, name):
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


def test_a_disk_that_is_full_at_the_last_moment_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "sampler.onnx"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="full"), replacing(path) as part:
        part.write_bytes(b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_disk_holds_the_bytes_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    path, done = tmp_path / "a.csv", []
    real_sync, real_replace = files.sync, files.os.replace
    monkeypatch.setattr(files, "sync", lambda each: (done.append(each.name), real_sync(each)))
    monkeypatch.setattr(files.os, "replace", lambda *each: (done.append("renamed"), real_replace(*each)))
    with replacing(path) as part:
        part.write_text("new")
    assert done == [part.name, "renamed", tmp_path.name]


def test_a_disk_that_fails_when_it_is_to_hold_the_bytes_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail(_):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="broken"), replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_has_nothing_to_sync_is_none_that_fails(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, "not here")

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
