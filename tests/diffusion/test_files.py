"""A file that was there stays whole until the new one is."""

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
