"""A real sweep, started as a user does: Ray Tune, MLflow on SQLite, ONNX. Most tests share one sweep."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image

from export.sampler import main as sample
from export.to_onnx import main as to_onnx

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SMALL = (
    "--data heart --training.num-updates 400 --training.num-evaluations 4 --metrics.num-samples 300 "
    "--network.hidden-size 32 --sampler.num-steps 10 --experiment shapes --tracking-uri sqlite:///store/mlflow.db"
).split()


def tune(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    command = [sys.executable, str(ROOT / "workflows" / "tune.py"), *SMALL, *arguments]
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "store").mkdir()
    # The upper ends of both ranges together are infeasible, so a few trials may be pruned.
    result = tune(folder, "--num-trials", "5", "--name", "first")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result


@pytest.fixture
def run_folder(sweep):
    return sweep[0] / "runs" / "first"


@pytest.fixture
def table(run_folder):
    return pd.read_csv(run_folder / "trials.csv")


def test_the_terminal_is_clean(sweep):
    _, result = sweep
    assert result.stderr == ""
    assert "(pid=" not in result.stdout and "Warning" not in result.stdout and "╭" not in result.stdout
    assert "trial 5/5" in result.stdout


def test_the_summary_lists_the_files_and_the_next_commands(sweep):
    folder, result = sweep
    champion = Path("runs/first/champion")
    for name in ("samples.png", "animation.gif", "sampler.onnx"):
        assert str(champion / name) in result.stdout and (folder / champion / name).stat().st_size > 0
    assert (
        "python -m workflows.ui" in result.stdout
        and "python -m export.sampler runs/first/champion/sampler.onnx" in result.stdout
    )


def test_trials_csv_agrees_with_the_trials_folders(run_folder, table):
    assert len(table) == 5 and table["trial_id"].is_unique
    assert set(table["status"]) <= {"finished", "stopped", "pruned"}
    for row in table.itertuples():
        folder = run_folder / "trials" / row.trial_id
        if row.status in ("finished", "stopped"):
            assert (folder / "model.safetensors").exists()
            config = json.loads((folder / "config.json").read_text())["config"]
            assert (
                config["schedule"]["num_train_timesteps"]
                == table.loc[row.Index, "schedule.num_train_timesteps"]
            )
            assert config["training"]["learning_rate"] == table.loc[row.Index, "training.learning_rate"]


def test_the_search_varies_only_the_searched_parameters(table):
    for name in ("schedule.beta_start", "schedule.beta_end", "training.learning_rate"):
        assert table[name].nunique() > 1
    assert set(table["schedule.num_train_timesteps"]) <= {50, 100, 200, 500, 1000}
    assert table["network.hidden_size"].nunique() == 1
    first = table.iloc[table["seconds"].index[0]]
    assert (table["schedule.beta_start"] <= table["schedule.beta_end"]).all() and first["updates"] >= 0


def test_trials_are_ranked_by_the_windowed_bound_and_not_by_mse(table):
    evaluated = table[table["updates"] > 0]
    np.testing.assert_allclose(evaluated["objective"], evaluated["val/elbo_window"])
    assert evaluated["val/mse"].notna().all() and evaluated["train/mse"].notna().all()
    usable = evaluated[evaluated["status"].isin(["finished", "stopped"])]
    assert usable.loc[usable["objective"].idxmin(), "val/elbo_window_paired_se"] == 0.0


def test_the_champion_is_confirmed_tested_and_equal_in_onnx(run_folder, table):
    champion = run_folder / "champion"
    tree = json.loads((champion / "config.json").read_text())
    row = table[table["rank"] == 1].iloc[0]
    assert tree["provenance"]["trial_id"] == row["trial_id"] and row["decision"].startswith("champion: ")
    assert tree["provenance"]["update"] == row["best_update"]
    decision = json.loads((champion / "decision.json").read_text())
    assert decision["champion"] == row["trial_id"]
    confirmed = table[["val/sample_distance", "val/sample_auc_se"]].notna().all(axis=1)
    assert set(decision["finalists"]) == set(table[confirmed]["trial_id"]) and confirmed.sum() >= 4
    usable = table[table["status"].isin(["finished", "stopped"])]
    assert sorted(usable["rank"]) == list(range(1, len(usable) + 1))
    assert (table.loc[confirmed, "rank"] <= confirmed.sum()).all()
    assert {"val/sample_distance", "test/sample_distance", "test/elbo_window"} <= set(
        tree["provenance"]["metrics"]
    )
    parity = json.loads((champion / "parity.json").read_text())
    assert parity["passed"] and len(parity["cases"]) >= 8
    assert all(case["max_abs_error"] <= 1e-3 * case["output_scale"] for case in parity["cases"])
    card = (champion / "model_card.md").read_text()
    assert "## Limitations" in card and "training example" in card
    assert tree["provenance"]["command"] in card and "--num-trials" in tree["provenance"]["command"]
    metrics = tree["provenance"]["metrics"]
    for name in ("distance", "sliced_wasserstein", "precision", "recall"):
        assert {f"test/sample_{name}", f"test/sample_{name}_floor"} <= set(metrics)
    assert metrics["test/sample_distance_se"] > 0.0
    assert metrics["test/sample_nn_train"] > 0.0 and metrics["test/sample_copied"] < 0.5


def test_pytorch_and_onnx_runtime_drew_the_same_picture(run_folder):
    pytorch, onnx = (
        np.asarray(Image.open(run_folder / "champion" / name).convert("L"), dtype=float)[40:]
        for name in ("samples.png", "samples_onnx.png")
    )
    assert pytorch.shape == onnx.shape and pytorch.std() > 0
    assert np.abs(pytorch - onnx).mean() < 0.5


def test_the_animation_goes_from_data_to_noise_and_back(run_folder):
    with Image.open(run_folder / "champion" / "animation.gif") as animation:
        assert animation.n_frames >= 20

        def spread(frame: int) -> float:
            animation.seek(frame)
            ink = np.argwhere(np.asarray(animation.convert("L"))[40:440, 40:440] < 128)
            return float(ink.std(axis=0).mean())

        data, noise = spread(0), spread(animation.n_frames // 2)
    assert data != noise


def test_mlflow_has_one_parent_run_with_a_child_run_per_trial(sweep, table):
    client = MlflowClient(f"sqlite:///{sweep[0] / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("shapes")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["trial_id"]: run for run in runs if run is not parent}
    assert parent.info.run_name == "first" and parent.info.status == "FINISHED"
    assert set(children) == set(table["trial_id"])
    for row in table.itertuples():
        run = children[row.trial_id]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("KILLED" if row.status == "pruned" else "FINISHED")
        assert float(run.data.params["schedule.beta_end"]) == table.loc[row.Index, "schedule.beta_end"]
        if row.updates:
            history = client.get_metric_history(run.info.run_id, "val/elbo_window")
            assert [metric.step for metric in history] == list(range(100, row.updates + 1, 100))
            at_best = {metric.step: metric.value for metric in history}[row.best_update]
            assert at_best == pytest.approx(row.objective)
            assert any(
                file.path.endswith(".png") for file in client.list_artifacts(run.info.run_id, "images")
            )
    assert parent.data.metrics["test/sample_distance"] == pytest.approx(
        json.loads((sweep[0] / "runs/first/champion/config.json").read_text())["provenance"]["metrics"][
            "test/sample_distance"
        ]
    )
    assert {Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "champion")} >= {
        "sampler.onnx",
        "samples.png",
        "animation.gif",
    }


def test_the_registered_model_draws_the_champions_samples(sweep, run_folder, monkeypatch):
    import mlflow

    from export.sampler import Sampler

    uri = f"sqlite:///{sweep[0] / 'store' / 'mlflow.db'}"
    version = MlflowClient(uri).get_model_version_by_alias("ray-ddpm-shapes", "champion")
    assert version.version in ("1", 1)
    monkeypatch.chdir(sweep[0])
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/ray-ddpm-shapes@champion")
    drawn = model.predict(pd.DataFrame({"num_samples": [5], "seed": [3]}))
    np.testing.assert_array_equal(drawn, Sampler(run_folder / "champion" / "sampler.onnx").sample(5, seed=3))


def test_any_trial_can_be_exported_and_sampled_from_the_command_line(sweep, table, monkeypatch):
    folder = sweep[0]
    monkeypatch.chdir(folder)
    trial = table[table["status"].isin(["finished", "stopped"])]["trial_id"].iloc[0]
    assert to_onnx([f"runs/first/trials/{trial}", "--output", "again.onnx"]) == 0
    assert sample(["again.onnx", "--num-samples", "20", "--steps", "5", "--output", "points.csv"]) == 0
    points = pd.read_csv(folder / "points.csv")
    assert list(points.columns) == ["x", "y"] and len(points) == 20 and np.isfinite(points).all(axis=None)


@pytest.fixture
def here(in_process):
    return in_process("tune")


def test_a_name_that_is_taken_is_refused_and_changes_no_file(sweep, run_folder, here):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    assert here.refused([*SMALL, "--name", "first"], sweep[0]).startswith("error: --name first")
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


def test_a_sweep_without_a_feasible_schedule_fails_with_the_reasons(sweep, here):
    arguments = (
        *("--num-trials", "2", "--name", "hopeless", "--search.num-train-timesteps", "1000"),
        *("--search.beta-start", "0.01", "--search.beta-end", "0.9"),
    )
    status, output, errors = here([*SMALL, *arguments], sweep[0])
    assert status == 1
    assert "No trial produced a usable model" in output and "Traceback" not in errors
    table = pd.read_csv(sweep[0] / "runs" / "hopeless" / "trials.csv")
    assert list(table["status"]) == ["pruned", "pruned"]
    assert table["reason"].str.contains("alphas_cumprod_T").all()
    client = MlflowClient(f"sqlite:///{sweep[0] / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("shapes")
    runs = client.search_runs([experiment.experiment_id], filter_string="attributes.run_name = 'hopeless'")
    assert [run.info.status for run in runs] == ["FAILED"]


def test_a_folder_of_images_is_swept_with_a_u_net_and_a_final_training(sweep):
    folder = sweep[0]
    (folder / "My photos").mkdir()
    for number in range(60):
        pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "My photos" / f"{number}.png")
    result = tune(
        folder,
        *("--data", "My photos", "--num-trials", "1", "--name", "photos", "--training.num-updates", "4"),
        *("--network.base-channels", "8", "--metrics.num-examples", "8", "--metrics.num-samples", "8"),
        *("--final-epochs", "5", "--final-workers", "2"),
    )
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    tree = json.loads((folder / "runs/photos/champion/config.json").read_text())
    assert tree["config"]["network"]["kind"] == "unet" and tree["data"]["shape"] == [3, 10, 10]
    assert str(folder).encode() not in (folder / "runs/photos/champion/sampler.onnx").read_bytes()
    assert not (folder / "runs/photos/tune").exists(), "no second copy of the weights"
    assert tree["config"]["metrics"]["features"] == "degradations"
    with Image.open(folder / "runs/photos/champion/nearest.png") as pairs:
        assert min(pairs.size) > 0
    assert "for 7 updates (2 workers)" in result.stdout and not (folder / "runs/photos/final").exists()
    is_used = re.search("the model of the final training is (not )?used", result.stdout)[1] is None
    assert tree["config"]["training"]["num_updates"] == (7 if is_used else 4)
    client = MlflowClient(f"sqlite:///{folder / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("shapes")
    (parent,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'photos'")
    history = client.get_metric_history(parent.info.run_id, "final/objective")
    assert [entry.step for entry in history] == [2, 4, 5, 7]
