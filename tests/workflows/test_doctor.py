"""The report on an installation: complete, without secrets, and whole if a part of it is broken."""

import subprocess
import sys
from pathlib import Path

import pytest

from workflows import doctor
from workflows.installation import hardware


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "set_defaults", lambda verbose: None)  # stays after the test
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def ray_starts(monkeypatch):
    """Ray starts, as far as the report knows: that it does takes seconds."""

    def start(command, **arguments):
        return subprocess.CompletedProcess(command, 0, 'line of Ray\n[1, {"CPU": 3.0}]\n', "")

    hardware()  # asked for once, by the real function
    monkeypatch.setattr(doctor.subprocess, "run", start)


def report(capsys, *arguments):
    """Exit status, text, and text by subject."""
    status = doctor.main(list(arguments))
    text = capsys.readouterr().out
    parts, subject = {}, ""
    for line in text.splitlines()[:-1]:
        subject = line[:14].strip() or subject
        parts[subject] = f"{parts.get(subject, '')} {line[14:]}".strip()
    return status, text, parts


def test_ray_starts_in_a_process_of_its_own():
    (line,) = doctor._ray()
    assert line.startswith("starts; machines: 1, CPU cores: ")


def test_one_page_names_what_a_bug_report_needs(capsys, ray_starts, tmp_path):
    status, text, parts = report(capsys)
    assert status == 0 and text.endswith("All of this works.\n")
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) <= 110
    for package in ("torch", "ray", "mlflow", "numpy", "pillow"):
        assert f"{package} " in parts["packages"]
    assert parts["system"].count(sys.executable) == 1
    assert f"{tmp_path}/mlflow.db does not exist yet" in parts["MLflow"]
    assert not Path("mlflow.db").exists(), "a report makes nothing"
    assert parts["Ray"] == "starts; machines: 1, CPU cores: 3, GPUs: 0"
    assert "GB free" in parts["disk"] and "cores" in parts["hardware"] and "built for" in parts["PyTorch"]


def test_no_secret_is_in_the_report(capsys, ray_starts, monkeypatch, tmp_path):
    for name, value in {
        "MLFLOW_TRACKING_URI": "http://me:s3cr3t@127.0.0.1:9/?token=t0ken",
        "MLFLOW_TRACKING_PASSWORD": "passw0rd",
        "RAY_AUTH_TOKEN": "ray-t0ken",
        "AWS_SECRET_ACCESS_KEY": "aws-key",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    status, text, parts = report(capsys, "--output-dir", "s3://key:s4cret@bucket/runs")
    assert status == 1 and "127.0.0.1:9" in parts["MLflow"] and "DOES NOT WORK" in parts["MLflow"]
    for secret in ("s3cr3t", "t0ken", "passw0rd", "aws-key", "s4cret", str(tmp_path)):
        assert secret not in text
    assert "MLFLOW_TRACKING_URI=http://***@127.0.0.1:9/?token=***" in parts["settings"]


def test_a_broken_part_hides_none_of_the_others(capsys, monkeypatch, ray_starts):
    def fail(command, **arguments):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: no shared memory\n")

    def explode():
        yield "half of it"
        raise OSError("undefined symbol")

    monkeypatch.setattr(doctor.subprocess, "run", fail)
    monkeypatch.setattr(doctor, "_torch", explode)
    status, text, parts = report(capsys)
    assert status == 1 and text.endswith("does not work: PyTorch, Ray\n")
    assert parts["PyTorch"] == "half of it DOES NOT WORK: OSError: undefined symbol"
    assert parts["Ray"] == "DOES NOT WORK: status 1: RuntimeError: no shared memory"


def test_a_part_of_an_extra_that_is_not_installed_is_named(capsys, monkeypatch, ray_starts):
    monkeypatch.setattr(doctor, "_EXTRA", {"MLflow": "no_such_package", "PyTorch": "torch", "Ray": "no_such"})
    status, _, parts = report(capsys)
    assert status == 0
    assert parts["MLflow"] == parts["Ray"] == "not installed: pip install 'ray-ddpm[train]'"


def test_a_full_disk_and_a_folder_that_is_not_writable_are_named(capsys, monkeypatch, ray_starts):
    usage = type("usage", (), {"free": 1e6, "total": 1e9})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: not str(path).startswith("/var"))
    status, _, parts = report(capsys, "--output-dir", "/var/nowhere/runs")
    assert status == 1
    assert "/var is not writable" in parts["disk"]
    assert "less than 2 GB are free for temporary files" in parts["disk"]
