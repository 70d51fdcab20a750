"""What counts as lost by a kill."""

import pandas as pd
import pytest

from benchmarks import kills


def test_what_is_gone_or_has_changed_is_lost_and_what_is_new_is_not():
    before = {"a": "1", "b": "2", "c": "3"}
    assert kills.changed(before, {"a": "1", "b": "2", "c": "3", "d": "4"}) == []
    assert kills.changed(before, {"a": "1", "c": "0"}) == ["b is gone", "c has changed"]


def test_results_are_compared_by_every_name():
    expected = {"runs in MLflow": 5, "objectives": [0.1, 0.2]}
    assert kills.differences(expected, dict(expected)) == []
    assert kills.differences(expected, {"runs in MLflow": 6}) == [
        "runs in MLflow: 6 instead of 5",
        "objectives: null instead of [0.1, 0.2]",
    ]


def test_trials_of_a_sweep_are_told_apart_by_their_parameters():
    expected = {"objective of a": 1.0, "objective of b": 2.0}
    assert kills.differences(expected, {"objective of b": 2.0, "objective of a": 1.0}) == []
    (line,) = kills.differences(expected, {"objective of a": 1.0, "objective of c": 2.0})
    assert line == "objective of b: null instead of 2.0"


def test_only_finished_trials_must_stay_as_they_are(tmp_path):
    assert kills.finished_trials(tmp_path) == {}
    rows = {
        "trial_id": ["a", "b"],
        "status": ["finished", "running"],
        "rank": [1, 2],
        "objective": [0.125, None],
        "sample/auc": [None, None],
        "val/sample_auc": [0.75, None],
    }
    pd.DataFrame(rows).to_csv(tmp_path / "trials.csv", index=False)
    assert kills.finished_trials(tmp_path) == {"a status": "finished", "a objective": "0.125"}


def test_weights_are_compared_bit_by_bit(tmp_path):
    folder = tmp_path / "checkpoints" / "000000300"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"\x00\x01")
    before = kills.evaluations(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x00\x03")
    assert kills.changed(before, kills.evaluations(tmp_path)) == ["000000300/model.safetensors has changed"]


@pytest.mark.parametrize("arguments", [["nothing"], ["--kills", "0"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        kills.main(arguments)
    assert "give" in capsys.readouterr().err
