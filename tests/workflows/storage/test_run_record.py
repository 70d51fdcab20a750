"""Records of runs, and the choice of the run to resume."""

import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.config import Config, SamplerConfig
from diffusion.errors import InputError
from diffusion.files import FormatError
from diffusion.presets import preset
from tests.export.conftest import POINTS, make_model
from workflows.cli.model_reference import model_folder
from workflows.cli.resume import run_to_resume
from workflows.cli.run_options import TrainFlags
from workflows.cli.search_space import SearchSpace
from workflows.cli.tune_options import TuneFlags, TuneOptions
from workflows.storage.run_record import RunRecord, check_same_config, read_record
from workflows.storage.storage import Storage
from workflows.sweep.sweep_logger import SweepLogger


@pytest.fixture
def runs(tmp_path):
    return Storage(str(tmp_path / "runs"))


def write_record(runs, name, status="stopped", started=1.0, data="heart", experiment="shapes"):
    record = RunRecord(name, experiment, "0" * 32, preset(data), "f" * 64, started=started)
    return record.write(runs.child(name), status)


def flags(runs, **options):
    return TrainFlags(output_dir=str(runs.path), **options)


def test_a_written_record_is_read_back_with_its_config(runs):
    record = write_record(runs, "one")
    assert read_record(runs.child("one")) == record and record.status == "stopped"
    assert read_record(runs.child("one")).config == preset("heart")
    record.write(runs.child("one"), "finished")
    assert read_record(runs.child("one")) == replace(record, status="finished")


def test_a_missing_record_is_none(runs):
    assert read_record(runs.child("one")) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"name": "one"}', '{"colour": 1}', "[" * 100_000])
def test_a_damaged_record_is_refused_in_one_line(runs, text):
    """A run whose record is taken for missing would start afresh in the folder of the old one."""
    runs.child("one").write_text("run.json", text)
    with pytest.raises(InputError, match="run.json is damaged .*: restore it") as caught:
        read_record(runs.child("one"))
    assert "\n" not in str(caught.value)


def test_a_parameter_that_only_another_version_knows_is_refused_in_one_line(runs):
    write_record(runs, "one")
    folder = runs.child("one")
    tree = json.loads(folder.read_text("run.json"))
    tree["config"]["training"]["momentum"] = 0.9
    folder.write_text("run.json", json.dumps(tree))
    with pytest.raises(FormatError, match=r"run.json, written by ray-ddpm \S+: .*momentum.*; use ray-ddpm"):
        read_record(folder)
    write_record(runs, "two")
    assert run_to_resume(flags(runs), "train", any_data=True).name == "two"


def test_the_newest_unfinished_run_is_resumed_by_default(runs):
    write_record(runs, "a", started=3.0, status="failed")
    write_record(runs, "b", started=5.0, status="running")
    write_record(runs, "c", started=4.0)
    write_record(runs, "d", started=9.0, status="finished")
    runs.child("sweep").write_text("trials.csv", "")
    assert run_to_resume(flags(runs), "train", any_data=True).name == "b"


def test_data_and_experiment_restrict_which_run_is_resumed(runs):
    write_record(runs, "hearts", started=1.0)
    write_record(runs, "digits", started=2.0, data="digits")
    write_record(runs, "others", started=3.0, experiment="other")
    assert run_to_resume(flags(runs, data="digits"), "train").name == "digits"
    assert run_to_resume(flags(runs, data="heart", experiment="shapes"), "train").name == "hearts"
    with pytest.raises(InputError, match="no unfinished run"):
        run_to_resume(flags(runs, data="digits", experiment="other"), "train")


def test_a_named_run_is_found_whatever_its_status(runs):
    """A finished one has nothing left to do, or is extended."""
    for status in ("running", "stopped", "failed", "finished"):
        write_record(runs, status, status)
        assert run_to_resume(flags(runs, name=status), "train", any_data=True).status == status


def test_the_newest_finished_run_is_extended_only_without_an_unfinished_one(runs):
    for started, name in ((1.0, "old"), (2.0, "new")):
        write_record(runs, name, "finished", started=started)
    with pytest.raises(InputError, match="no unfinished run"):
        run_to_resume(flags(runs), "train", any_data=True)
    assert run_to_resume(flags(runs), "train", any_data=True, extends=True).name == "new"
    write_record(runs, "stopped", "stopped", started=0.5)
    assert run_to_resume(flags(runs), "train", any_data=True, extends=True).name == "stopped"


def test_a_named_run_killed_before_its_record_was_written_starts_from_scratch(runs):
    (runs.path / "early").mkdir(parents=True)
    assert run_to_resume(flags(runs, name="early"), "train", any_data=True) is None
    with pytest.raises(InputError, match="never: no such run in "):
        run_to_resume(flags(runs, name="never"), "train", any_data=True)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"training.learning_rate": 0.5}, "--training.learning-rate 0.5"),
        ({"seed": 3}, "--seed 3"),
        ({"data.image_size": 16}, "--image-size 16"),
        ({"data.label_column": "kind"}, "--label-column kind"),
        ({"data.name": "digits"}, "--data digits"),
        ({"network.hidden_size": 3}, "--network.hidden-size 3"),
        ({"schedule.beta_end": 0.03}, "--schedule.beta-end 0.03"),
    ],
)
def test_a_changed_value_is_named_by_its_flag(values, flag):
    recorded = preset("heart")
    check_same_config(preset("heart"), recorded)
    with pytest.raises(InputError) as caught:
        check_same_config(recorded.with_values(values), recorded)
    assert str(caught.value).startswith(f"{flag}: the run to be resumed was started with ")


def test_the_memory_limit_may_change():
    recorded = preset("heart")
    check_same_config(recorded.with_values({"data.memory_limit_gb": 1e-6}), recorded)


def test_every_other_value_of_a_config_must_stay():
    """The recorded config went through JSON, as in run.json."""
    recorded = Config.from_dict(json.loads(json.dumps(preset("heart").to_dict())))
    check_same_config(preset("heart"), recorded)
    for name, value in recorded.flat().items():
        changed = {**recorded.flat(), name: object()}

        class Given:
            def flat(self, changed=changed):
                return changed

        if name == "data.memory_limit_gb":
            check_same_config(Given(), recorded)
        else:
            with pytest.raises(InputError, match="was started with"):
                check_same_config(Given(), recorded)
        assert recorded.flat()[name] == value


@pytest.fixture
def model():
    return make_model(POINTS, SamplerConfig())


def test_a_model_is_found_in_its_folder_its_run_or_its_newest_checkpoint(model, tmp_path):
    run = tmp_path / "run"
    for update in ("000000100", "000000200"):
        model.save(run / "checkpoints" / update)
    assert model_folder(str(run)) == run / "checkpoints" / "000000200"
    shutil.rmtree(run / "checkpoints" / "000000200")
    (run / "checkpoints" / "000000300").mkdir()
    assert model_folder(str(run)) == run / "checkpoints" / "000000100", "an incomplete checkpoint is skipped"
    for name in ("champion", "model"):
        model.save(run / name)
        assert model_folder(str(run)) == run / name
    assert model_folder(str(run / "champion")) == run / "champion"
    (run / "champion" / "model.safetensors").unlink()
    for path in (run / "champion", tmp_path, run / "run.json", tmp_path / "missing"):
        with pytest.raises(InputError, match="--init-from .*: no model there"):
            model_folder(str(path))


def test_a_damaged_record_is_never_a_fresh_start_and_keeps_no_other_from_being_resumed(runs):
    write_record(runs, "good", started=1.0)
    damaged = ["{", "[]", '{"started": "x"}', "\x00"]
    for number, text in enumerate(damaged):
        runs.child(f"bad{number}").write_text("run.json", text)
    (runs.path / "link" / "run.json").parent.mkdir()
    (runs.path / "link" / "run.json").symlink_to(runs.path / "link" / "run.json")
    (runs.path / "endless").mkdir()
    (runs.path / "endless" / "run.json").symlink_to("/dev/zero")
    (runs.path / "folder" / "run.json").mkdir(parents=True)
    assert run_to_resume(flags(runs), "train", any_data=True).name == "good"
    for name in ("bad0", "link", "endless", "folder"):
        with pytest.raises(InputError, match="run.json") as caught:
            run_to_resume(flags(runs, name=name), "train", any_data=True)
        assert "\n" not in str(caught.value)
    shutil.rmtree(runs.path / "good")
    with pytest.raises(InputError, match="run.json"):
        run_to_resume(flags(runs), "train", any_data=True)


def test_a_copied_or_renamed_folder_is_not_taken_for_the_run_itself(runs):
    write_record(runs, "one")
    shutil.copytree(runs.path / "one", runs.path / "copy")
    with pytest.raises(InputError, match="--name copy: this folder holds the run one"):
        run_to_resume(flags(runs, name="copy"), "train", any_data=True)
    assert run_to_resume(flags(runs), "train", any_data=True).name == "one"


@pytest.mark.parametrize("left", ["checkpoints", "trials", "model", "champion"])
def test_a_folder_with_results_but_no_record_is_no_fresh_start(runs, left):
    runs.child("one").write_text(f"{left}/file", "")
    with pytest.raises(InputError, match=f"has no run.json, but {left}/ of a run"):
        run_to_resume(flags(runs, name="one"), "train", any_data=True)


VALUES = st.sampled_from(
    [None, True, 0, -1, 10**30, 2.5, float("nan"), "", "x", "../up", "\ud800", [], [1], {}, {"a": 1}]
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.data())
def test_a_record_with_any_value_replaced_is_resumed_or_refused_in_one_line(tmp_path_factory, data):
    runs = Storage(str(tmp_path_factory.mktemp("runs")))
    options = TuneOptions().resume_options()
    record = RunRecord(
        "one", "shapes", "0" * 32, preset("heart"), "f" * 64, command="tune", options=options
    ).write(runs.child("one"), "stopped")
    tree = json.loads(runs.child("one").read_text("run.json"))
    node = tree
    while True:
        key = data.draw(st.sampled_from(sorted(node)))
        if not (isinstance(node[key], dict) and node[key] and data.draw(st.booleans())):
            break
        node = node[key]
    node[key] = data.draw(VALUES)
    runs.child("one").write_text("run.json", json.dumps(tree))
    given_flags = TuneFlags(output_dir=str(runs.path), name="one")
    try:
        found = run_to_resume(given_flags, "tune", any_data=True)
        assert found is not None, "a damaged record is never a fresh start"
        resumed, _ = TuneOptions.defaults(found, limits_time=False)
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert resumed.config().flat() and found.name == record.name


def test_a_sweep_is_resumed_only_with_its_own_search_workers_and_data(runs):
    options = TuneOptions(data="heart", search=SearchSpace(num_train_timesteps=(10, 20)))
    RunRecord(
        "one",
        "shapes",
        "0" * 32,
        options.config(),
        "f" * 64,
        command="tune",
        options=options.resume_options(),
    ).write(runs.child("one"), "stopped")
    record = read_record(runs.child("one"))  # in which tuples have become lists

    def check(options, fingerprint="f" * 64):
        record.check_unchanged(options.config(), fingerprint, SweepLogger.fixed_options(options))

    check(options)
    check(replace(options, num_trials=99))  # the budget may change
    with pytest.raises(InputError, match="--search differs from what the sweep to be resumed was started"):
        check(replace(options, search=SearchSpace(num_train_timesteps=(10, 30))))
    with pytest.raises(InputError, match="--workers-per-trial differs from"):
        check(replace(options, workers_per_trial=2))
    with pytest.raises(InputError, match="the data of heart have changed since the sweep one was started"):
        check(options, "e" * 64)
