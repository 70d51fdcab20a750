"""Paths that may be anything; atomic writes: an old file stays unchanged until the new one is complete."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import files
from diffusion.errors import InputError, printable
from diffusion.files import path_kind, read_file, replacing, user_path


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


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a\0b", "a\ud800b"])
def test_what_can_be_no_path_is_refused(name):
    with pytest.raises(InputError, match="give another path") as caught:
        user_path(name)
    assert str(caught.value).isprintable()


def test_the_kind_of_a_path_is_what_it_leads_to(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    kinds = {"file": "file", "link": "file", "pipe": "other", "dangling": None, "file/x": None, ".": "folder"}
    assert {name: path_kind(tmp_path / name) for name in kinds} == kinds
    assert path_kind(Path("/dev/zero")) == "other"


@pytest.mark.parametrize("name", ["loop", "loop/x", "x" * 300])
def test_a_path_that_leads_nowhere_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="cannot be opened"):
        path_kind(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read .*: give a file"):
        read_file(tmp_path / name, "a file")


def test_only_regular_files_up_to_a_size_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, "a file", 5) == b"12345"
    with pytest.raises(InputError, match="has 5 bytes, more than the 4"):
        read_file(path, "a file", 4)
    os.truncate(path, 2**40)  # a sparse file
    with pytest.raises(InputError, match="has 1099511627776 bytes"):
        read_file(path, "a file")
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError, match="give a file"):
            read_file(name, "a file")


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux")
def test_an_endless_file_of_the_kernel_is_refused():
    """Its size is stated as 0."""
    with pytest.raises(InputError, match="more than the 10 that it may have"):
        read_file(Path("/proc/self/pagemap"), "a file", 10)


@pytest.mark.parametrize("length", [1, 240, 255])
def test_a_temporary_name_is_never_too_long_and_keeps_its_suffix(tmp_path, length):
    name = "x" * (length - 4) + ".csv" if length > 4 else "x"
    with replacing(tmp_path / name) as part:
        part.write_text("new")
        assert part.suffix == (tmp_path / name).suffix
    assert (tmp_path / name).read_text() == "new"


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text())
def test_any_text_is_shown_on_one_line_that_can_be_encoded(text):
    shown = printable(text)
    assert shown.isprintable() and len(shown.encode()) >= len(shown) and printable(shown) == shown
    assert text.isprintable() == (shown == text)
    assert str(InputError(text)) == shown
