"""Fixtures: train.py in this process."""

import shutil

import pytest


@pytest.fixture
def here(in_process):
    return in_process("train")


@pytest.fixture
def database(_empty_database, tmp_path_factory):
    """Flags for an MLflow database that exists already, outside the current folder."""
    path = shutil.copy(_empty_database, tmp_path_factory.mktemp("store") / "mlflow.db")
    return ["--tracking-uri", f"sqlite:///{path}"]
