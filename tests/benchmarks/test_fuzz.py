"""What benchmarks.fuzz finds: each way in which a reader can fail, planted."""

import random

import pytest

from benchmarks import fuzz
from tests.benchmarks import wrong_readers


@pytest.fixture(name="file")
def _file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"good")
    return path


@pytest.mark.parametrize(
    ("reader", "found"),
    [
        ("good", None),
        ("raises", "ZeroDivisionError"),
        ("rambles", "not in one short line"),
        ("dies", "died, exit code 7"),
        ("waits", "no answer after 1 s"),
        ("loops", "no answer after"),
        ("grows", "grew by 1"),
    ],
)
def test_a_reader_that_fails_is_found_and_its_copy_kept(file, tmp_path, monkeypatch, reader, found):
    if reader == "waits":
        monkeypatch.setattr(fuzz, "_LONGEST_WAIT", 1.0)
    if reader == "loops":
        monkeypatch.setattr(fuzz, "_LONGEST", 0.5)
    if reader == "grows":
        bytearray(1_400_000_000)  # this process's own peak does not hide it
    fuzzing = fuzz.Fuzzing(file, 0, tmp_path, getattr(wrong_readers, reader))
    fuzzing.read_copies(4)
    fuzzing.close()
    if found is None:
        assert not fuzzing.found and fuzzing.counts["refused"] >= 3 and fuzzing.counts.total() == 4
        assert "nothing" in fuzzing.row()
        return
    assert found in fuzzing.found[0]
    assert (tmp_path / "found-0-file.bin").read_bytes() != b"good"
    assert fuzzing.row().endswith(f"| {len(fuzzing.found)} |")


def test_damage_is_the_same_for_the_same_seed_and_changes_most_copies():
    content = bytes(range(256)) * 4
    first, second = ([fuzz.damaged(content, rng) for _ in range(50)] for rng in map(random.Random, (3, 3)))
    assert first == second and sum(each != content for each in first) > 45


def test_files_that_do_not_exist_or_cannot_be_read_are_refused(file, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        fuzz.main(["nowhere.onnx"])
    assert "nowhere.onnx: give files that exist" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        fuzz.main([str(file), "--folder", str(tmp_path)])
    assert f"{file} cannot be read undamaged" in capsys.readouterr().err


def test_the_files_of_its_own_can_be_read(fuzz_files):
    assert [path.suffix for path in fuzz_files] == [".onnx"] * 3 + [".csv", ".parquet", ".npy"]
    for path in fuzz_files:
        read = fuzz.read_model if path.suffix == ".onnx" else fuzz.read_table
        assert fuzz.outcome(read, path) == "read"
