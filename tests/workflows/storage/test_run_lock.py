"""A run's folder has one writer, and its lock leaves nothing behind."""

import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from diffusion.errors import InputError
from workflows.storage.run_lock import RunLock, remove_parts

ROOT = Path(__file__).parents[3]


def can_be_locked(folder):
    try:
        RunLock(folder).release()
    except InputError:
        return False
    return True


def test_the_second_is_refused_until_the_first_is_done(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(InputError, match=f"--name {tmp_path.name}: another process runs it"):
        RunLock(tmp_path)
    assert not can_be_locked(tmp_path)
    first.release()
    first.release()
    assert can_be_locked(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_lock_ends_with_its_process(tmp_path):
    program = f"""
import os, pathlib, signal
from workflows.storage.run_lock import RunLock
lock = RunLock(pathlib.Path({str(tmp_path)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=300)
    assert killed.returncode == -signal.SIGKILL, "it had the lock"
    assert can_be_locked(tmp_path)


def test_a_folder_that_does_not_exist_or_cannot_be_locked_is_free(tmp_path, monkeypatch):
    assert can_be_locked(tmp_path / "new") and not (tmp_path / "new").exists()
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(95, "not supported")))
    first = RunLock(tmp_path)
    assert can_be_locked(tmp_path), "though another one has it"
    first.release()


def test_what_a_killed_process_left_half_written_is_removed_but_not_from_under_workers(tmp_path):
    for name in ("champion", "checkpoints", ".part-0123abcd-folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".part-0123abcd-file").touch()
        (tmp_path / name / "file").touch()
    remove_parts(tmp_path, except_in=("checkpoints",))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["champion/file", "checkpoints/.part-0123abcd-file", "checkpoints/file"]
