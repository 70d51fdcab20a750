"""What a sweep's log says at its end, and what it refuses when it is resumed; no trial runs."""

import json
import shlex
from unittest.mock import Mock

import pytest

from diffusion.errors import InputError
from workflows.cli.parsing import parse_tune_options
from workflows.storage.run_record import RunRecord, read_record
from workflows.storage.storage import Storage
from workflows.sweep import run_sweep
from workflows.sweep.sweep_logger import SweepLogger
from workflows.sweep.trial_records import TrialRecords


class SilentTracker:
    """Replaces the connection to MLflow."""

    name, unsent, refused, location = "MLflow", 0, (), "nowhere"

    def __init__(self):
        self.resumed, self.ended = [], []

    def resume_sweep(self, run_id, trial_ids):
        self.resumed.append(run_id)
        return set()

    def end_trial(self, trial_id, status, reason):
        assert (status, reason) == ("failed", "the sweep was interrupted")
        self.ended.append(trial_id)

    def close(self, status):
        self.closed = status


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


def test_trials_that_run_when_a_sweep_ends_are_ended_and_run_again_later(open_log):
    log, tracker = open_log("--num-trials 40")
    for trial_id, status in (("c", "out of memory"), ("b", "running")):
        log.records.start(trial_id, {"network.channel_multipliers": (1, 2)})
        log.records[trial_id].status = status
    log.end_running_trials()
    assert tracker.ended == ["c", "b"]
    assert log.records["b"].unfinished and not log.records["a"].unfinished
    assert log.records["b"].reason == log.records["c"].reason == "the sweep was interrupted"
    again = TrialRecords(log.directory)
    assert again["b"].params == {"network.channel_multipliers": (1, 2)}, "not a list, which has another text"


def test_an_interrupt_of_the_wait_for_the_tracker_still_records_how_the_sweep_ended(open_log, monkeypatch):
    log, tracker = open_log("--num-trials 40", "running")
    monkeypatch.setattr(tracker, "close", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        log.close("stopped")
    assert read_record(log.folder).status == "stopped"


def test_a_report_that_cannot_be_written_is_a_warning(open_log, monkeypatch, capsys):
    log, tracker = open_log("--num-trials 40")
    tracker.location_hint = lambda: ""
    monkeypatch.setattr(run_sweep, "write_report", lambda *_, **__: 1 / 0)
    run_sweep._write_report(log, None, {}, {}, interrupted=False)
    assert capsys.readouterr().out == (
        "warning: report.html could not be written (ZeroDivisionError: division by zero)\n"
    )


def test_what_could_not_be_sent_is_said_with_the_command_that_sends_it(open_log, capsys):
    log, tracker = open_log("--num-trials 40 --tracking-uri sqlite:///other.db")
    (log.directory / "tracking").mkdir()
    (log.directory / "tracking" / "entries.jsonl").touch()
    tracker.unsent, tracker.refused = 3, ["a parameter"]
    log.close("finished")
    output = capsys.readouterr().out
    assert "MLflow refused 1 entries for good, such as: a parameter" in output
    assert (
        "3 entries could not be sent to MLflow at nowhere; runs/mine/tracking/entries.jsonl has them"
        in output
    )
    assert output.endswith("python -m workflows.sync mine --tracking-uri sqlite:///other.db\n")
