"""The laboratory of clusters: what is missing is named, and a busy machine has more time."""

import subprocess
import sys

import lab
import pytest


@pytest.mark.parametrize(
    ("variable", "outcome"),
    [(None, pytest.skip.Exception), ("false", pytest.skip.Exception), ("true", pytest.fail.Exception)],
)
def test_what_is_missing_is_named_and_fails_in_ci(monkeypatch, variable, outcome):
    monkeypatch.delenv("CI", raising=False)
    if variable:
        monkeypatch.setenv("CI", variable)
    monkeypatch.setattr(lab.shutil, "which", lambda tool: None if tool == "rsync" else tool)
    monkeypatch.setattr(lab.os, "geteuid", lambda: 0)
    with pytest.raises(outcome, match="needs rsync"):
        lab.require_hosts()


def test_nothing_stops_tests_that_can_run(monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(lab, "unsupported_reason", lambda: None)
    assert lab.require_hosts() is None, "it neither skips nor fails"


def test_a_busy_machine_has_more_time(monkeypatch):
    load = [0.0]
    monkeypatch.setattr(lab.os, "getloadavg", lambda: (load[0], 0.0, 0.0))
    monkeypatch.setattr(lab.os, "cpu_count", lambda: 2)
    now = [100.0]
    monkeypatch.setattr(lab.time, "monotonic", lambda: now[0])
    patience = lab.Patience(10.0)
    now[0] += 9.0
    assert not patience.is_over
    load[0] = 6.0
    now[0] += 20.0
    assert not patience.is_over, "three processes a core"
    load[0] = 0.0
    assert not patience.is_over, "what was lost is not made up for at once"
    now[0] += 2.0
    assert patience.is_over


def test_a_process_that_does_not_end_is_killed_and_shown(monkeypatch):
    monkeypatch.setattr(lab.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    command = [sys.executable, "-u", "-c", "import time; print('so far'); time.sleep(60)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with pytest.raises(AssertionError, match="a test: not done in 0 s\nso far"):
        lab.output_of(process, 0.0, "a test")
    assert process.returncode < 0
    process = subprocess.Popen([sys.executable, "-c", "print('done')"], stdout=subprocess.PIPE, text=True)
    assert lab.output_of(process, 60.0, "a test") == "done\n"
