"""Runs of earlier versions: `format_1/` was written before run.json had a format version, see its README."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diffusion.data.dataset import load_dataset
from diffusion.files import FormatError, check_format
from diffusion.training.checkpoints import TrainedModel, read_checkpoint
from diffusion.training.loop import Request, Training, TrainingStopped
from export.sampler import Sampler
from export.to_onnx import main as export_main
from workflows.cli.model_reference import model_folder
from workflows.cli.parsing import parse_train_options, parse_tune_options
from workflows.cli.resume import run_to_resume
from workflows.cli.run_options import TrainFlags
from workflows.storage.run_record import FORMAT_VERSION, check_same_config, read_record
from workflows.storage.storage import Storage
from workflows.sweep.trial_records import TrialRecords
from workflows.training.checkpoint_store import CheckpointStore


@pytest.fixture
def runs(tmp_path):
    shutil.copytree(Path(__file__).parent / "format_1", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def checkpoint(runs, tmp_path):
    store = CheckpointStore(Storage(str(runs / "stopped-training" / "checkpoints")), 3)
    return store.load_newest(tmp_path / "copy", pytest.fail)


def test_the_newest_unfinished_run_is_the_stopped_training(runs):
    record = run_to_resume(TrainFlags(output_dir=str(runs)), "train", any_data=True)
    assert (record.name, record.status, record.command) == ("stopped-training", "stopped", "train")
    assert record.provenance == []


def test_its_options_are_those_of_the_record(runs):
    command_line = parse_train_options(["--resume", "--output-dir", str(runs)])
    (_, options), record = command_line.open_data(), command_line.record
    assert options.training.num_updates == 20_000 and options.network.hidden_size == 8
    check_same_config(options.config(), record.config)


def test_its_checkpoint_loads_and_the_training_goes_on(checkpoint, runs):
    model, state, facts = read_checkpoint(checkpoint)
    assert state.update == facts["update"] == 410 and len(state.history) == 2
    dataset = load_dataset(model.config.data)
    fingerprint = read_record(Storage(str(runs / "stopped-training"))).data_fingerprint
    assert dataset.spec.fingerprint == fingerprint == facts["data_fingerprint"], "the data are the same"
    training = Training(
        model.config,
        dataset,
        lambda _: None,
        resume=(model, state),
        request=lambda: Request.STOP if training.updates >= 412 else Request.CONTINUE,
    )
    with pytest.raises(TrainingStopped):
        training.run()
    assert training.updates >= 412


def test_a_resumed_record_is_written_in_the_present_format(runs):
    folder = Storage(str(runs / "stopped-training"))
    record = read_record(folder).with_session({"command": "train.py --resume"})
    record.write(folder, "running")
    assert (
        json.loads((runs / "stopped-training" / "run.json").read_text())["format_version"] == FORMAT_VERSION
    )
    assert read_record(folder).provenance == [{"command": "train.py --resume"}]


def test_a_finished_sweep_is_known_to_be_finished(runs):
    resume = ["--resume", "--name", "finished-sweep", "--output-dir", str(runs)]
    assert parse_tune_options(resume).is_finished
    assert "finished (3 trials)" in parse_tune_options(resume).finished_lines()[0]
    assert not parse_tune_options([*resume, "--num-trials", "4"]).is_finished, "it can be extended"


def test_an_unfinished_sweep_keeps_its_options_and_search_space(runs):
    path = runs / "finished-sweep" / "run.json"
    path.write_text(path.read_text().replace('"status": "finished"', '"status": "stopped"'))
    _, options = parse_tune_options(["--resume", "--output-dir", str(runs)]).open_data()
    assert options.num_trials == 3 and options.search.time_embedding_size == (16,)


def test_trial_records_replay_as_in_trials_csv(runs):
    records = TrialRecords(runs / "finished-sweep")
    table = pd.read_csv(runs / "finished-sweep" / "trials.csv").set_index("trial_id")
    assert [record.trial_id for record in records] == list(table.index)
    assert records.previous_seconds > 0.0
    for record in records:
        row = table.loc[record.trial_id]
        assert (record.status, record.updates) == (row["status"], row["updates"]) == ("finished", 20)
        assert record.objective == row["objective"]
        assert record.params["training.learning_rate"] == row["training.learning_rate"]
    assert [record.trial_id for record in records.ranked()] == list(table["objective"].sort_values().index)


def test_the_champion_loads_and_is_exported_as_it_was(runs, tmp_path, capsys):
    champion = model_folder(str(runs / "finished-sweep"))
    assert champion.name == "champion"
    assert TrainedModel.load(champion).provenance["metrics"]["test/sample_distance"] > 0.0
    assert export_main([str(champion), "--output", str(tmp_path / "new.onnx")]) == 0, capsys.readouterr().err
    old, new = (
        Sampler(path, provider="cpu").sample(20, seed=1)
        for path in (champion / "sampler.onnx", tmp_path / "new.onnx")
    )
    np.testing.assert_allclose(new, old, rtol=0.0, atol=1e-5)


def of_the_future(path):
    """Write a record as a later version might."""
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({"format_version": 99, "ray_ddpm_version": "9.8.7", "fields": tree}))


def assert_names_the_version(error, path):
    message = str(error.value)
    assert message.startswith(f"{path} has format 99, written by ray-ddpm 9.8.7; this version")
    assert message.endswith("use ray-ddpm 9.8.7 for it") and "\n" not in message


def test_a_run_of_a_later_version_is_refused_with_that_version(runs):
    path = runs / "stopped-training" / "run.json"
    of_the_future(path)
    for name in ("stopped-training", None):
        with pytest.raises(FormatError) as error:
            run_to_resume(TrainFlags(output_dir=str(runs), name=name), "train", any_data=True)
        assert_names_the_version(error, path)
        assert "reads format 1 or 2" in str(error.value)


def test_a_run_of_a_later_version_does_not_hide_one_that_can_be_resumed(runs):
    shutil.copytree(runs / "stopped-training", runs / "newer")
    of_the_future(runs / "newer" / "run.json")
    assert run_to_resume(TrainFlags(output_dir=str(runs)), "train", any_data=True).name == "stopped-training"


def test_a_model_of_a_later_version_is_refused_with_that_version(runs, checkpoint):
    for folder in (runs / "finished-sweep" / "champion", checkpoint):
        path = folder / "config.json"
        tree = json.loads(path.read_text()) | {"format_version": 99}
        tree["provenance"]["packages"] = {"ray-ddpm": "9.8.7"}
        path.write_text(json.dumps(tree))
        with pytest.raises(FormatError) as error:
            TrainedModel.load(folder)
        assert_names_the_version(error, path)


def test_a_file_that_does_not_say_who_wrote_it_is_refused_as_well():
    with pytest.raises(FormatError, match="^x has format 0, written by another version of ray-ddpm; this"):
        check_format("x", 0, (1, 2), None)
