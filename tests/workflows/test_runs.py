"""Runs are listed, compared and deleted; no run takes place here."""

import json

import pytest
from mlflow import MlflowClient

from diffusion.errors import InputError
from diffusion.presets import preset
from workflows import runs
from workflows.cli.tune_options import TuneOptions
from workflows.storage.run_record import RunRecord
from workflows.storage.storage import Storage
from workflows.tracking.mlflow_tracker import MlflowTracker


def save_model(folder, config, metrics, **provenance):
    folder.mkdir(parents=True)
    tree = {"config": config.to_dict(), "provenance": {"metrics": metrics, **provenance}}
    (folder / "config.json").write_text(json.dumps(tree))


@pytest.fixture
def store(tmp_path, database_uri, monkeypatch):
    """A folder with a finished sweep of two trials, and a training without a model yet; both in MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database_uri)
    config = preset("heart")
    for name, command, status, started in (("s", "tune", "finished", 2.0), ("t", "train", "running", 1.0)):
        tracker = MlflowTracker(database_uri, "heart")
        run_id = tracker.start(name, {})
        for trial_id in ("ta", "tb") if command == "tune" else ():
            tracker.start_trial(trial_id, {})
            tracker.end_trial(trial_id, "finished", "")
        tracker.close("finished")
        options = TuneOptions(data="heart").resume_options() if command == "tune" else {}
        record = RunRecord(name, "e", run_id, config, "f", command=command, options=options, started=started)
        (tmp_path / "runs" / name).mkdir(parents=True)
        record.write(Storage(str(tmp_path / "runs" / name)), status)
    sweep = tmp_path / "runs" / "s"
    (sweep / "trials.csv").write_text("trial_id,status\nta,finished\ntb,stopped\ntc,running\n")
    lr = {"training.learning_rate": 0.002}
    save_model(sweep / "trials" / "ta", config, {"objective": 1.25, "val/mse": 0.5})
    save_model(sweep / "trials" / "tb", config.with_values(lr), {"objective": 2.5, "val/mse": 0.25})
    save_model(sweep / "champion", config, {"test/sample_distance": 0.75}, trial_id="ta")
    return sweep.parent


def rows(text):
    """Cells of each row of the printed tables, by the first one."""
    lines = [line.strip("│┃ ") for line in text.splitlines() if line[:1] in "│┃"]
    cells = [[cell.strip() for cell in line.replace("┃", "│").split("│")] for line in lines]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize("arguments", [[], ["list"], ["--output-dir", "runs"]])
def test_the_list_has_every_run_with_its_state_and_its_champion(store, arguments, capsys):
    assert runs.main(arguments) == 0
    output = capsys.readouterr().out
    found = rows(output)
    assert found["s"][:6] == ["sweep", "finished", "heart", "2/12", "1.25", "0.75"]
    assert found["t"][:6] == ["training", "running", "heart", "", "-", "-"]
    assert list(found).index("t") < list(found).index("s"), "the newest is the last"
    assert "may mean that it was killed" in output


def test_a_comparison_shows_what_differs_side_by_side(store, capsys):
    assert runs.main(["compare", "runs/s", "s/trials/tb", "t"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["parameter"] == ["s", "s/trials/tb", "t"]
    assert found["training.learning_rate"] == ["0.001", "0.002", "0.001"]
    assert "schedule.beta_end" not in found
    assert found["objective"] == ["1.25", "2.5", "-"] and found["val/mse"] == ["0.5", "0.25", "-"]
    assert found["test/sample_distance"] == ["0.75", "-", "-"]
    assert runs.main(["compare", "s", "s/tb", "--all"]) == 0
    assert "schedule.beta_end" in rows(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "sss"], "sss: no run of that name.*give one of s, t"),
        (["compare", "s/tx"], "s has no such trial with a model; give one of ta, tb"),
        (["compare", "t/tx"], "it has no trials"),
        (["delete", "x", "--yes"], "no run of that name"),
        (["delete", "s"], "there is no terminal to answer in: add --yes"),
        (["list", "--output-dir", "nowhere"], "nowhere: there are no runs"),
        (["delete", "s", "--yes", "--tracking-uri", "sqlite:////nowhere/x.db"], "--tracking-uri"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(store, arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        runs.main(arguments)
    assert "\n" not in str(caught.value) and sorted(each.name for each in store.iterdir()) == ["s", "t"]


def active_runs(uri):
    client = MlflowClient(uri)
    return {
        run.info.run_name
        for run in client.search_runs([client.get_experiment_by_name("heart").experiment_id])
    }


@pytest.fixture
def answer(monkeypatch):
    """Function that makes a terminal of the standard input, in which the user gives this answer."""

    def give(text):
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda _: text)

    return give


def test_a_run_is_deleted_with_its_records_once_the_user_agrees(store, database_uri, answer, capsys):
    client = MlflowClient(database_uri)
    (sweep,) = client.search_runs(["1"], "attributes.run_name = 's'")
    client.create_registered_model("m")
    client.create_model_version("m", "x", sweep.info.run_id)
    client.set_registered_model_alias("m", "champion", "1")
    answer("")
    assert runs.main(["delete", "s"]) == 1
    assert (store / "s").exists() and active_runs(database_uri) == {"s", "ta", "tb", "t"}
    assert "the runs of 2 trials, m version 1 (champion)" in capsys.readouterr().out
    answer("y")
    assert runs.main(["delete", "s"]) == 0
    assert not (store / "s").exists() and active_runs(database_uri) == {"t"}
    assert not client.search_registered_models()
    assert "mlflow gc" in capsys.readouterr().out


def test_the_records_can_be_kept_and_a_store_without_them_is_no_obstacle(store, database_uri, capsys):
    assert runs.main(["delete", "s", "--yes", "--files-only"]) == 0
    assert active_runs(database_uri) == {"s", "ta", "tb", "t"}
    elsewhere = ["--tracking-uri", "sqlite:///other.db"]
    assert runs.main(["delete", "runs/t", "--yes", *elsewhere]) == 0
    assert "nothing in sqlite" in capsys.readouterr().out
    assert not any(store.iterdir()) and not (store.parent / "other.db").exists()


def test_a_damaged_run_hides_no_other(store, capsys):
    (store / "t" / "run.json").write_bytes(bytes(300))
    (store / "s" / "champion" / "config.json").unlink()
    (store / "s" / "champion" / "config.json").mkdir()
    assert runs.main([]) == 0
    output = capsys.readouterr()
    assert "s" in rows(output.out) and "t" not in rows(output.out)
    assert output.err.startswith("warning: ") and "t/run.json is damaged" in output.err
