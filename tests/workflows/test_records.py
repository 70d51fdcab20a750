"""What is kept of each trial."""

import numpy as np
import pandas as pd
import pytest

from workflows.journal import read_journal
from workflows.records import INTERRUPTED, TrialRecords


@pytest.fixture
def records(tmp_path):
    records = TrialRecords(tmp_path)
    for trial_id, status, objective in (
        ("a", "stopped", 0.5),
        ("b", "finished", 2.0),
        ("c", "finished", 1.0),
        ("d", "diverged", 0.1),
        ("e", "pruned", None),
        ("f", "failed", 0.2),
    ):
        records.begin(trial_id, {"schedule.beta_end": 0.1})
        if objective is not None:
            records.evaluated(trial_id, 10, {"objective": objective, "val/mse": 0.3})
        records.end(trial_id, status, "", 1.5)
    return records


def test_only_whole_trainings_can_win_and_the_best_comes_first(records):
    assert [record.trial_id for record in records.ranked()] == ["c", "b"]


def test_stopped_trials_can_win_only_where_none_finished(records):
    records["b"].status = records["c"].status = "failed"
    assert [record.trial_id for record in records.ranked()] == ["a"]


def test_nothing_can_win_where_nothing_ended_well(tmp_path):
    records = TrialRecords(tmp_path)
    records.begin("d", {})
    records.evaluated("d", 1, {"objective": 0.1})
    records.end("d", "diverged", "", 0.0)
    assert records.ranked() == []


def test_trials_csv_has_a_row_a_trial_under_the_contracts_names(records):
    table = pd.read_csv(records.write_csv())
    assert list(table.columns[:5]) == ["trial_id", "status", "seconds", "updates", "objective"]
    assert {"schedule.beta_end", "val/mse"} <= set(table.columns)
    assert list(table["trial_id"]) == list("abcdef")


def test_paired_errors_see_through_what_all_trials_share(records, tmp_path):
    """Examples differ a lot, trials by a constant: the difference is known exactly."""
    examples = np.random.default_rng(0).normal(size=50)
    for trial_id, shift in (("a", 0.5), ("b", 1.0), ("c", 0.0)):
        records.folder(trial_id).mkdir(parents=True)
        np.save(records.folder(trial_id) / "elbo_per_example.npy", examples + shift)
    records.add_paired_errors()
    for trial_id in "abc":
        assert records[trial_id].metrics["val/elbo_window_paired_se"] == pytest.approx(0.0, abs=1e-12)
    assert "val/elbo_window_paired_se" not in records["d"].metrics


def test_the_newest_model_replaces_the_one_before(records, tmp_path):
    for content in ("old", "new"):
        checkpoint = tmp_path / content
        checkpoint.mkdir()
        for name in ("config.json", "model.safetensors", "samples.png", "elbo_per_example.npy"):
            (checkpoint / name).write_text(content)
        records.keep_files("a", checkpoint)
    kept = records.folder("a")
    assert sorted(path.name for path in kept.iterdir()) == [
        "config.json",
        "elbo_per_example.npy",
        "model.safetensors",
        "samples.png",
    ]
    assert (kept / "model.safetensors").read_text() == "new"


def test_another_process_reads_what_was_noted(records, tmp_path):
    again = TrialRecords(tmp_path)
    assert [vars(record) for record in again] == [vars(record) for record in records]
    assert again.elapsed >= again.seconds_before > 0.0
    assert not any(record.unfinished for record in again)


def test_a_trial_that_starts_anew_forgets_what_it_found_and_keeps_its_place(records):
    records.end("a", "stopped", INTERRUPTED, 1.0)
    assert records["a"].unfinished
    records.begin("a", {"schedule.beta_end": 0.1})
    assert records["a"].evaluations == {} and records["a"].status == "running"
    assert [record.trial_id for record in records] == list("abcdef")


def test_whatever_byte_the_power_goes_at_the_events_before_it_are_known(records, tmp_path):
    path = tmp_path / "journal.jsonl"
    content = path.read_bytes()
    events = len(content.splitlines())
    for length in range(0, len(content), 37):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(content[:length])
        TrialRecords(folder).begin("z", {"schedule.beta_end": 0.2})
        whole = content[:length].count(b"\n")
        assert len(read_journal(folder / "journal.jsonl")) == whole + 1 <= events
        assert TrialRecords(folder)["z"].params == {"schedule.beta_end": 0.2}
