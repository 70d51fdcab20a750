"""Tests of clusters that cannot run are skipped, but not in CI."""

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
    lab.require_hosts()
