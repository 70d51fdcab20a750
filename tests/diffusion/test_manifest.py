"""Manifests detect every lost or altered byte of a folder."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion import manifest
from diffusion.errors import InputError
from diffusion.manifest import MANIFEST, DamagedError, add_facts, read_manifest, write_manifest

FACTS = {"update": 1200, "objective": 0.125, "words": ["ä", "b"]}
NAMES = ["a.bin", "b.txt", "empty"]


@pytest.fixture(name="folder")
def _folder(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "b.txt").write_text("some text\n")
    (tmp_path / "empty").touch()
    write_manifest(tmp_path, FACTS)
    return tmp_path


def assert_damaged(folder, name):
    with pytest.raises(DamagedError) as caught:
        read_manifest(folder)
    message = str(caught.value)
    assert str(folder / name) in message and "\n" not in message
    assert isinstance(caught.value, InputError)
    return message


def test_it_lists_every_other_file_with_its_digest_and_size(folder):
    tree = json.loads((folder / "manifest.json").read_text())
    assert tree["format_version"] == 1 and tree["update"] == 1200
    assert sorted(tree["files"]) == NAMES
    for name, entry in tree["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_reading_an_intact_folder_returns_its_facts(folder):
    assert read_manifest(folder) == FACTS


@given(
    st.dictionaries(
        st.text(max_size=9).filter(lambda name: name not in ("format_version", "files", "sha256")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
            ),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_any_json_facts_survive_a_round_trip(tmp_path_factory, facts):
    folder = tmp_path_factory.mktemp("facts")
    (folder / "a").write_bytes(b"a")
    write_manifest(folder, facts)
    assert read_manifest(folder) == facts


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert "missing" in assert_damaged(folder, name)


def test_a_missing_folder_is_damaged_too(tmp_path):
    assert_damaged(tmp_path / "nowhere", "manifest.json")


@pytest.mark.parametrize("size", [0, 1, 128, 255])
def test_a_file_cut_short_is_named_with_both_sizes(folder, size):
    os.truncate(folder / "a.bin", size)
    assert f"{size} bytes instead of 256" in assert_damaged(folder, "a.bin")


def test_a_file_that_grew_is_named(folder):
    with (folder / "empty").open("ab") as file:
        file.write(b"\0")
    assert "1 bytes instead of 0" in assert_damaged(folder, "empty")


@pytest.mark.parametrize("name", ["a.bin", "b.txt", "manifest.json"])
def test_every_flipped_bit_is_detected(folder, name):
    content = (folder / name).read_bytes()
    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        (folder / name).write_bytes(flipped)
        assert_damaged(folder, name)
    (folder / name).write_bytes(content)
    assert read_manifest(folder) == FACTS


def test_every_truncation_of_the_manifest_is_detected(folder):
    content = (folder / "manifest.json").read_bytes()
    for size in range(len(content)):
        (folder / "manifest.json").write_bytes(content[:size])
        assert_damaged(folder, "manifest.json")


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"3", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_other_content_is_not_accepted_as_a_manifest(folder, content):
    (folder / "manifest.json").write_bytes(content)
    assert_damaged(folder, "manifest.json")


def test_swapped_files_are_detected(folder):
    (folder / "a.bin").rename(folder / "c")
    (folder / "b.txt").rename(folder / "a.bin")
    (folder / "c").rename(folder / "b.txt")
    assert_damaged(folder, "a.bin")


def test_a_file_that_the_disk_cannot_read_is_damage(folder, monkeypatch):
    real_open = Path.open

    def fail(self, *args, **kwargs):
        if self.name == "b.txt":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    assert "Input/output error" in assert_damaged(folder, "b.txt")


def test_a_folder_instead_of_a_file_is_damage(folder):
    (folder / "b.txt").unlink()
    (folder / "b.txt").mkdir()
    assert_damaged(folder, "b.txt")


def test_a_folder_instead_of_the_manifest_is_damage(folder):
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    assert "cannot be read" in assert_damaged(folder, MANIFEST)


def test_additional_files_are_ignored(folder):
    (folder / ".nfs0001").write_text("left by the file system")
    assert read_manifest(folder) == FACTS


def test_facts_can_be_added_without_reading_the_files(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(manifest.hashlib, "file_digest")
        add_facts(folder, {"objective": 3.5, "new": None})
    assert read_manifest(folder) == FACTS | {"objective": 3.5, "new": None}
    os.truncate(folder / "a.bin", 5)
    add_facts(folder, {"more": 1})
    assert_damaged(folder, "a.bin")


@pytest.mark.parametrize("name", ["format_version", "files", "sha256"])
def test_facts_cannot_use_the_reserved_names(folder, name):
    with pytest.raises(ValueError, match=name):
        write_manifest(folder, {name: 1})


def rewrite(folder, **changes):
    """Change a manifest and give it a valid sha256, as another version of the program would write it."""
    tree = json.loads((folder / "manifest.json").read_text()) | changes
    tree.pop("sha256")
    tree["sha256"] = hashlib.sha256(json.dumps(tree, indent=2).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(tree, indent=2) + "\n")


def test_another_format_is_refused_with_both_numbers(folder):
    rewrite(folder, update=7)
    assert read_manifest(folder)["update"] == 7, "rewrite produces a manifest that can be read"
    rewrite(folder, format_version=2)
    message = assert_damaged(folder, "manifest.json")
    assert "format 2" in message and "reads 1" in message


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "..", "x/y", "x\\y"])
def test_a_manifest_cannot_name_files_elsewhere(folder, name):
    rewrite(folder, files={name: {"sha256": "0" * 64, "bytes": 1}})
    assert "outside" in assert_damaged(folder, "manifest.json")
