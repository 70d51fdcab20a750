"""Records of trials: ranking, trials.csv, files and the journal."""

import json
import os

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from diffusion.errors import InputError
from workflows.sweep import trial_records
from workflows.sweep.journal import read_journal
from workflows.sweep.trial_records import INTERRUPTED, TrialRecords
from workflows.training.evaluation_files import MODEL_FILES


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
        records.start(trial_id, {"schedule.beta_end": 0.1})
        if objective is not None:
            records.add_evaluation(trial_id, 10, {"objective": objective, "val/mse": 0.3})
        records.end(trial_id, status, "", 1.5)
    return records


def test_trials_are_ranked_by_objective_however_they_ended(records):
    assert [record.trial_id for record in records.ranked()] == ["a", "c", "b"]


def evaluated(records, trial_id, *objectives, best, status="finished", mse=0.5):
    """Add a trial with these objectives, whose best evaluation is number `best`; the step is 10 updates."""
    records.start(trial_id, {"metrics.objective": "val/elbo_window"})
    for number, objective in enumerate(objectives, start=1):
        is_after = number >= best
        metrics = {
            "objective": objective,
            "val/mse": mse,
            "best_update": 10 * (best if is_after else number),
            "best_objective": objectives[best - 1] if is_after else objective,
        }
        records.add_evaluation(trial_id, 10 * number, metrics)
    records.end(trial_id, status, "", 1.0)
    records.folder(trial_id).mkdir(parents=True)
    (records.folder(trial_id) / "model.safetensors").touch()


def test_a_trials_objective_is_that_of_its_best_weights_also_after_a_restart(tmp_path):
    records = TrialRecords(tmp_path)
    evaluated(records, "a", 0.9, 0.5, 0.7, best=2)
    for each in (records["a"], TrialRecords(tmp_path)["a"]):
        assert (each.objective, each.best_update, each.updates) == (0.5, 20, 30)
    row = pd.read_csv(records.write_csv()).iloc[0]
    assert (row["objective"], row["best_update"], row["updates"]) == (0.5, 20, 30)
    assert "best_objective" not in row.index


def test_a_trial_that_was_cut_is_a_finalist_if_its_objective_leads(tmp_path):
    """Five trained to the end; the best objective is that of one that the time budget cut."""
    records = TrialRecords(tmp_path)
    for number in range(5):
        evaluated(records, f"t{number}", 1.0 + 0.1 * number, best=1)
    evaluated(records, "cut", 0.5, best=1, status="stopped")
    evaluated(records, "diverged", 0.1, best=1, status="diverged")
    assert list(records.finalists(0.001)) == ["cut", "t0", "t1", "t2"]
    assert records.finalists(0.001)["cut"] == records.folder("cut")
    assert len(records.finalists(1.0)) == 6, "a training seed could have changed their order"


def test_a_trial_without_a_model_is_no_finalist(tmp_path):
    records = TrialRecords(tmp_path)
    evaluated(records, "a", 0.5, best=1)
    (records.folder("a") / "model.safetensors").unlink()
    assert records.finalists(0.001) == {}


def test_the_pick_of_the_mean_squared_error_is_known(tmp_path):
    records = TrialRecords(tmp_path)
    assert records.picked_by_mse() == ""
    evaluated(records, "a", 0.5, best=1, mse=0.3)
    evaluated(records, "b", 0.9, best=1, mse=0.2)
    evaluated(records, "c", 0.1, best=1, mse=0.1, status="failed")
    assert records.picked_by_mse() == "b"


def test_no_trial_is_ranked_if_none_finished_or_was_stopped(tmp_path):
    records = TrialRecords(tmp_path)
    records.start("d", {})
    records.add_evaluation("d", 1, {"objective": 0.1})
    records.end("d", "diverged", "", 0.0)
    assert records.ranked() == []


def test_trials_csv_has_one_row_per_trial_and_the_documented_columns(records):
    table = pd.read_csv(records.write_csv())
    assert list(table.columns[:5]) == ["trial_id", "status", "seconds", "updates", "objective"]
    assert {"schedule.beta_end", "val/mse"} <= set(table.columns)
    assert list(table["trial_id"]) == list("abcdef")


def test_paired_errors_exclude_what_all_trials_share(records, tmp_path):
    """Examples differ a lot, but trials only by a constant: their difference has no error."""
    examples = np.random.default_rng(0).normal(size=50)
    for trial_id, shift in (("a", 0.5), ("b", 1.0), ("c", 0.0)):
        records.folder(trial_id).mkdir(parents=True)
        np.save(records.folder(trial_id) / "elbo_per_example.npy", examples + shift)
    records.add_paired_errors()
    for trial_id in "abc":
        assert records[trial_id].metrics["val/elbo_window_paired_se"] == pytest.approx(0.0, abs=1e-12)
    assert "val/elbo_window_paired_se" not in records["d"].metrics


def test_the_files_are_those_of_the_best_evaluation_and_the_newest_picture(tmp_path):
    records = TrialRecords(tmp_path)
    records.start("a", {})
    for updates, best, files in (
        (10, 10, ("untrained.png",)),
        (20, 20, ("samples.png",)),
        (30, 20, ()),
        (40, 20, ("samples.png",)),
    ):
        checkpoint = tmp_path / str(updates)
        checkpoint.mkdir()
        for name in ("config.json", "model.safetensors", "elbo_per_example.npy", *files):
            (checkpoint / name).write_text(str(updates))
        records.add_evaluation("a", updates, {"best_update": best})
        records.save_files("a", checkpoint)
    found = {path.name: path.read_text() for path in records.folder("a").iterdir()}
    assert set(json.loads(found.pop("manifest.json"))["files"]) == set(MODEL_FILES)
    assert found == {
        "config.json": "20",
        "elbo_per_example.npy": "20",
        "model.safetensors": "20",
        "samples.png": "40",
        "untrained.png": "10",
    }


def test_trials_csv_is_written_in_a_twentieth_of_the_time_and_has_every_trial_in_the_end(
    tmp_path, monkeypatch
):
    """Each write takes as many seconds as there are trials; one of them ends every second."""
    now, spent = [0.0], [0.0]
    monkeypatch.setattr(trial_records.time, "monotonic", lambda: now[0])
    to_csv = pd.DataFrame.to_csv

    def slow(table, *arguments, **keywords):
        spent[0] += len(table)
        now[0] += len(table)
        to_csv(table, *arguments, **keywords)

    monkeypatch.setattr(pd.DataFrame, "to_csv", slow)
    records = TrialRecords(tmp_path)
    for number in range(100):
        records.start(f"t{number}", {})
        now[0] += 1.0
        records.end(f"t{number}", "finished", "", 1.0)
        records.refresh_csv()
    assert 0.0 < spent[0] <= now[0] / 20.0 + 100.0
    now[0] += 20.0 * 100.0
    records.refresh_csv()
    assert list(pd.read_csv(tmp_path / "trials.csv")["trial_id"]) == [f"t{number}" for number in range(100)]
    before = spent[0]
    now[0] += 1e6
    records.refresh_csv()
    assert spent[0] == before, "nothing has changed"


def test_another_process_reads_the_same_records(records, tmp_path):
    again = TrialRecords(tmp_path)
    assert [vars(record) for record in again] == [vars(record) for record in records]
    assert again.elapsed >= again.previous_seconds > 0.0
    assert not any(record.unfinished for record in again)


def test_the_time_of_all_sessions_counts(tmp_path, monkeypatch):
    """Three sessions of 10 s with 100 s in between, in which nothing runs."""
    now = [0.0]
    monkeypatch.setattr(trial_records.time, "monotonic", lambda: now[0])
    for session in range(3):
        records = TrialRecords(tmp_path)
        assert records.previous_seconds == 10.0 * session
        now[0] += 4.0
        records.start(f"t{session}", {})
        now[0] += 6.0
        records.end(f"t{session}", "finished", "", 6.0)
        assert records.elapsed == 10.0 * (session + 1)
        now[0] += 100.0


def test_a_full_disk_leaves_the_records_as_the_journal_has_them(records, tmp_path, max_file_size):
    with max_file_size((tmp_path / "journal.jsonl").stat().st_size):
        for write in (
            lambda: records.start("z", {}),
            lambda: records.add_evaluation("a", 20, {"objective": 0.1}),
            lambda: records.end("a", "failed", "", 1.0),
        ):
            with pytest.raises(OSError):
                write()
    assert [vars(record) for record in TrialRecords(tmp_path)] == [vars(record) for record in records]


def test_a_trial_that_starts_again_loses_its_evaluations_and_keeps_its_position(records):
    records.end("a", "stopped", INTERRUPTED, 1.0)
    assert records["a"].unfinished
    records.start("a", {"schedule.beta_end": 0.1})
    assert records["a"].evaluations == {} and records["a"].status == "running"
    assert [record.trial_id for record in records] == list("abcdef")


def test_a_journal_cut_off_at_any_byte_keeps_its_complete_events(records, tmp_path):
    path = tmp_path / "journal.jsonl"
    content = path.read_bytes()
    num_events = len(content.splitlines())
    for length in range(0, len(content), 37):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(content[:length])
        TrialRecords(folder).start("z", {"schedule.beta_end": 0.2})
        num_complete = content[:length].count(b"\n")
        assert len(read_journal(folder / "journal.jsonl")) == num_complete + 1 <= num_events
        assert TrialRecords(folder)["z"].params == {"schedule.beta_end": 0.2}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b""),
        ("config.json", bytes(100)),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", bytes(200)),
        ("model.safetensors", 0.9),
        ("elbo_per_example.npy", b""),
        ("elbo_per_example.npy", 0.9),
        ("elbo_per_example.npy", bytes(200)),
    ],
)
def test_a_trial_with_damaged_files_is_left_out_and_named(tmp_path, file, content):
    """It would be the best; without a word another one would be the champion, or each resume would fail."""
    records = TrialRecords(tmp_path)
    for trial_id, objective in (("a", 0.1), ("b", 0.5)):
        evaluated(records, trial_id, objective, best=1)
        folder = records.folder(trial_id)
        save_file({"weight": np.zeros(50)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        np.save(folder / "elbo_per_example.npy", np.full(50, objective))
    assert records.leave_out_damaged() == []
    path = records.folder("a") / file
    if content is None:
        path.unlink()
    elif isinstance(content, float):
        os.truncate(path, int(content * path.stat().st_size))
    else:
        path.write_bytes(content)
    (line,) = records.leave_out_damaged()
    assert line.startswith("trial a is left out: ") and file in line and "\n" not in line
    records.add_paired_errors()
    assert list(records.finalists(0.0)) == ["b"] and records.picked_by_mse() == "b"
    assert records["a"].status == "finished", "it is kept as it was"


def test_a_changed_bit_in_the_weights_of_a_trial_is_noticed(tmp_path):
    records, checkpoint = TrialRecords(tmp_path), tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_file({"weight": np.ones(50)}, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text("{}")
    np.save(checkpoint / "elbo_per_example.npy", np.full(50, 0.5))
    for trial_id in ("a", "b"):
        evaluated(records, trial_id, 0.5, best=1)
        records.save_files(trial_id, checkpoint)
    assert records.leave_out_damaged() == []
    path = records.folder("a") / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    (line,) = TrialRecords(tmp_path).leave_out_damaged()
    assert line.startswith("trial a is left out: ") and "sha256" in line


@pytest.mark.parametrize("size", [None, 0, 0.5])
def test_finished_trials_do_not_get_lost_with_the_journal(tmp_path, size):
    """Without a word they would be missing from trials.csv and among the finalists."""
    records = TrialRecords(tmp_path)
    for trial_id in ("a", "b"):
        evaluated(records, trial_id, 0.5, best=1)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    if size is None:
        journal.unlink()
    else:
        journal.write_text("".join(lines[: int(size * len(lines))]))
    with pytest.raises(InputError, match=r"journal.jsonl is (damaged|missing) \(it had trial [ab]") as error:
        TrialRecords(tmp_path)
    assert "\n" not in str(error.value)
    assert journal.exists() == (size is not None), "nothing is written"
    assert len(TrialRecords(tmp_path, is_copy=True)) == (1 if size else 0), "a bucket has the journal last"
