"""What the code is and what it runs on: revision, versions, hardware."""

import os
import platform
import subprocess

import numpy as np
import pytest

from workflows import installation
from workflows.installation import git_state, package_versions


def git(folder, *arguments):
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def module(tmp_path):
    """A tracked file in a subfolder of a new repository with one commit."""
    folder = tmp_path / "repository"
    (folder / "package").mkdir(parents=True)
    (folder / "other.txt").write_text("one")
    (folder / "package" / "module.py").write_text("one")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder / "package" / "module.py"


def test_a_clean_tree_has_its_revision(module):
    revision, clean = git_state(module)
    assert len(revision) == 40 and int(revision, 16) and clean is True


@pytest.mark.parametrize("staged", [False, True])
def test_a_changed_tracked_file_anywhere_makes_the_tree_dirty(module, staged):
    revision, _ = git_state(module)
    (module.parents[1] / "other.txt").write_text("two")
    if staged:
        git(module.parent, "add", "-A", "..")
    assert git_state(module) == (revision, False)


def test_untracked_files_do_not_make_the_tree_dirty(module):
    (module.parent / "notes.txt").write_text("new")
    assert git_state(module)[1] is True


def test_code_outside_a_repository_has_no_revision(tmp_path):
    (tmp_path / "module.py").write_text("")
    assert git_state(tmp_path / "module.py") == (None, None)


def test_code_in_a_repository_that_does_not_track_it_has_no_revision(module):
    """Such as an environment inside the repository of other code."""
    (module.parent / "installed.py").write_text("")
    assert git_state(module.parent / "installed.py") == (None, None)


def test_without_git_there_is_no_revision(module, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(module) == (None, None)


def test_versions_are_those_that_run():
    versions = package_versions()
    assert set(versions) == {"python", "ray-ddpm", "torch", "ray", "mlflow", "onnx", "onnxruntime", "numpy"}
    assert versions["numpy"] == np.__version__ and versions["python"] == platform.python_version()


def test_hardware_is_that_of_this_machine():
    found = installation.hardware()
    assert found["cpu"] and found["cores"] == os.cpu_count()
    assert found["memory_gb"] is None or found["memory_gb"] > 0.1
    assert isinstance(found["gpus"], list)


def test_gpus_are_named_one_by_one(monkeypatch):
    monkeypatch.setattr(installation, "_output", lambda *_: "NVIDIA H100\nNVIDIA A10")
    assert installation._gpu_names() == ["NVIDIA H100", "NVIDIA A10"]
    monkeypatch.setenv("PATH", "")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert installation._gpu_names() == []
