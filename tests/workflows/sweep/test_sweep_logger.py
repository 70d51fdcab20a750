"""What a sweep's log says at its end, and what it refuses when it is resumed; no trial runs."""

import json
import shlex

import pytest

from diffusion.errors import InputError
from workflows.cli.parsing import parse_tune_options
from workflows.storage.run_record import RunRecord
from workflows.storage.storage import Storage
from workflows.sweep.sweep_logger import SweepLogger


class SilentTracker:
    """Replaces the connection to MLflow."""

    name, unsent, location = "MLflow", 0, "nowhere"

    def __init__(self):
        self.resumed = []

    def resume_sweep(self, run_id, trial_ids):
        self.resumed.append(run_id)
        return set()

    def close(self, status):
        pass


@pytest.fixture
def open_log(tmp_path, monkeypatch):
    """Function (flags, status) -> the log of a sweep that has taken 1000 seconds."""
    monkeypatch.chdir(tmp_path)

    def make(flags, status="finished"):
        options = parse_tune_options(["--data", "heart", *flags.split()]).open_data()[1]
        folder = tmp_path / "runs" / "mine"
        folder.mkdir(parents=True)
        begin = {"event": "begin", "trial_id": "a", "params": options.config().flat(), "at": 1.0}
        end = {
            "event": "end",
            "trial_id": "a",
            "status": "pruned",
            "reason": "",
            "seconds": 1.0,
            "at": 1000.0,
        }
        (folder / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (begin, end)))
        record = RunRecord(
            "mine",
            "e",
            "id",
            options.config(),
            "f",
            status=status,
            command="tune",
            options=options.resume_options(),
        )
        tracker = SilentTracker()
        monkeypatch.setattr(SweepLogger, "_send_missing", lambda self, sent: None)
        return SweepLogger(Storage(str(folder)), record, tracker, options), tracker

    return make


def test_a_finished_sweep_is_not_extended_without_time(open_log):
    log, tracker = open_log("--time-budget 900s --num-trials 40")
    with pytest.raises(InputError, match="--num-trials 40: .*time budget of 900s; give a larger"):
        log.resume("id")
    assert tracker.resumed == [], "the sweep stays finished in the tracker"


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ("--time-budget 30m --num-trials 40", "finished"),
        ("--num-trials 40", "finished"),
        ("--time-budget 900s", "stopped"),  # its champion is to be chosen
    ],
)
def test_other_sweeps_are_resumed(open_log, flags, status):
    log, tracker = open_log(flags, status)
    log.resume("id")
    assert tracker.resumed == ["id"]


@pytest.mark.parametrize("status", ["stopped", "failed", "finished"])
def test_the_end_of_an_unfinished_sweep_says_how_to_go_on(open_log, capsys, status):
    log, _ = open_log("--output-dir runs --tracking-uri sqlite:///other.db --num-trials 40")
    log.close(status)
    output = capsys.readouterr().out
    if status == "finished":
        assert output == ""
        return
    assert "trials that have ended are kept" in output
    command = output.split("next: ")[1].strip()
    prefix = "python -m workflows.tune "
    assert command.startswith(prefix)
    resumed = parse_tune_options(shlex.split(command.removeprefix(prefix)))
    assert resumed.record is not None and resumed.options.tracking_uri == "sqlite:///other.db"
