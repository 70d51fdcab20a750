"""Provenance: the command line without secrets, and a record of every session."""

import json
import sys

from diffusion.config import Config
from workflows.publishing.provenance import command_line, session_provenance
from workflows.storage.run_record import RunRecord, read_record
from workflows.storage.storage import Storage


def test_the_command_line_can_be_pasted_into_a_shell():
    assert command_line(["train.py", "--data", "My photos"]) == "train.py --data 'My photos'"


def test_the_command_line_has_no_passwords():
    assert command_line(["train.py", "--tracking-uri=https://me:s3cr3t@host/path"]) == (
        "train.py '--tracking-uri=https://***@host/path'"
    )


def test_a_record_keeps_every_session_and_no_secret(tmp_path, monkeypatch):
    record = RunRecord("one", "shapes", "0" * 32, Config(), "f" * 64)
    folder = Storage(str(tmp_path))
    for flag in ("--data", "--resume"):
        monkeypatch.setattr(sys, "argv", ["train.py", flag, "--tracking-uri", "http://me:s3cr3t@host"])
        record = record.with_session(session_provenance())
    record.write(folder, "stopped")
    text = (tmp_path / "run.json").read_text()
    assert "s3cr3t" not in text and json.loads(text)["format_version"] == 2
    sessions = read_record(folder).provenance
    assert [session["command"].split()[1] for session in sessions] == ["--data", "--resume"]
    assert set(sessions[0]) == {"git_revision", "git_clean", "command", "packages", "hardware"}
