"""train.py: a real training on two workers. One run serves most tests here."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image

from diffusion.manifest import read_manifest
from diffusion.training.checkpoints import TrainedModel, best_model, read_checkpoint
from export.sampler import Sampler
from tests.workflows.conftest import user_environment
from workflows.storage.storage import Storage
from workflows.training.checkpoint_store import CheckpointStore

ROOT = Path(__file__).parents[3]
SMALL = (
    "--data heart --schedule.num-train-timesteps 20 --schedule.beta-end 0.5 "
    "--training.num-updates 300 --training.num-evaluations 3 --training.batch-size 64 "
    "--metrics.num-samples 200 --metrics.num-examples 256 --network.hidden-size 32 --sampler.num-steps 10 "
    "--experiment shapes --tracking-uri sqlite:///store/mlflow.db"
).split()
POINTS = [100, 200, 300]


def train(folder, *arguments):
    """Run train.py; returns the completed process and every process that it started."""
    environment = user_environment()
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "workflows" / "train.py"), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started: set[psutil.Process] = set()
    finished = threading.Event()

    def watch_children():
        while not finished.wait(0.2):
            try:
                started.update(psutil.Process(process.pid).children(recursive=True))
            except psutil.Error:
                return

    thread = threading.Thread(target=watch_children, daemon=True)
    thread.start()
    try:
        output, errors = process.communicate(timeout=900)
    finally:
        process.kill()
        finished.set()
        thread.join()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors), started


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "store").mkdir()
    result, started = train(folder, *SMALL, "--num-workers", "2", "--name", "one")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result, started


@pytest.fixture
def run_folder(training):
    return training[0] / "runs" / "one"


def test_the_output_is_clean_and_has_one_line_per_evaluation(training):
    _, result, _ = training
    assert result.stderr == ""
    assert "(pid=" not in result.stdout and "Warning" not in result.stdout and "╭" not in result.stdout
    lines = re.findall(r"update (\d+)/300: objective \S+, train MSE \S+, val MSE \S+", result.stdout)
    assert [int(update) for update in lines] == POINTS


def test_the_summary_names_the_files_and_the_next_command(training):
    folder, result, _ = training
    for name in ("samples.png", "animation.gif", "sampler.onnx"):
        assert f"runs/one/model/{name}" in result.stdout
        assert (folder / "runs/one/model" / name).stat().st_size > 0
    assert "next: python -m workflows.ui" in result.stdout
    assert "python -m export.sampler runs/one/model/sampler.onnx" in result.stdout


def test_no_ray_process_is_left_behind(training):
    _, _, started = training
    assert len(started) > 4, "Ray's servers and the workers"
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive


def test_the_published_model_is_complete_and_passed_parity(run_folder):
    assert read_manifest(run_folder / "model")["update"] in POINTS
    assert {path.name for path in (run_folder / "model").iterdir()} == {
        *("config.json", "model.safetensors", "sampler.onnx", "parity.json", "model_card.md"),
        *("samples.png", "samples_onnx.png", "animation.gif", "manifest.json"),
    }
    parity = json.loads((run_folder / "model" / "parity.json").read_text())
    assert parity["passed"] and len(parity["cases"]) >= 8
    metrics = TrainedModel.load(run_folder / "model").provenance["metrics"]
    assert {"val/mse", "train/mse", "sample/distance", "test/sample_distance", "test/elbo_window"} <= set(
        metrics
    )


def test_the_onnx_file_samples_and_both_runtimes_drew_the_same_picture(run_folder):
    points = Sampler(run_folder / "model" / "sampler.onnx", provider="cpu").sample(20, seed=3)
    assert points.shape == (20, 2) and np.isfinite(points).all()
    ours, theirs = (
        np.asarray(Image.open(run_folder / "model" / name).convert("L"), dtype=float)[40:]
        for name in ("samples.png", "samples_onnx.png")
    )
    assert ours.std() > 0 and np.abs(ours - theirs).mean() < 0.5


def test_every_evaluation_wrote_a_checkpoint_and_the_best_weights_are_the_model(run_folder):
    folders = sorted((run_folder / "checkpoints").iterdir())
    assert [int(folder.name) for folder in folders] == POINTS
    for folder in folders:
        model, state, facts = read_checkpoint(folder)
        assert facts["update"] == state.update == int(folder.name) and facts["workers"] == 2
        assert [entry["update"] for entry in state.history] == [
            update for update in POINTS if update <= state.update
        ]
        assert facts["objective"] == state.history[-1]["metrics"]["val/elbo_window"]
    published = TrainedModel.load(run_folder / "model")
    assert published.provenance["update"] == state.best.update
    for name, weight in best_model(model, state).network.state_dict().items():
        assert torch.equal(weight, published.network.state_dict()[name])
        assert not torch.equal(weight, state.network[name]), "live weights differ from averaged ones"


def test_the_record_is_finished_and_contains_the_config(run_folder):
    record = json.loads((run_folder / "run.json").read_text())
    assert record["status"] == "finished" and record["experiment"] == "shapes"
    assert record["config"]["training"]["num_updates"] == 300
    (session,) = record["provenance"]
    assert "--num-workers 2 --name one" in session["command"] and session["packages"]["torch"]
    assert session.items() <= TrainedModel.load(run_folder / "model").provenance.items()
    assert not list(run_folder.rglob(".part-*"))


def test_mlflow_has_one_run_with_metrics_and_pictures_by_step(training, run_folder):
    client = MlflowClient(f"sqlite:///{training[0] / 'store' / 'mlflow.db'}")
    (mlflow_run,) = client.search_runs([client.get_experiment_by_name("shapes").experiment_id])
    assert mlflow_run.info.status == "FINISHED" and mlflow_run.info.run_name == "one"
    record = json.loads((run_folder / "run.json").read_text())
    assert mlflow_run.info.run_id == record["run_id"]
    assert mlflow_run.data.tags["status"] == "finished" and mlflow_run.data.tags["num_workers"] == "2"
    assert mlflow_run.data.tags["data_fingerprint"] == record["data_fingerprint"]
    assert (
        mlflow_run.data.params["network.hidden_size"] == "32"
        and mlflow_run.data.params["data.name"] == "heart"
    )

    history = json.loads((run_folder / "checkpoints" / "000000300" / "history.json").read_text())
    at_every_evaluation = {"train/mse", "val/mse", "val/elbo_window", "objective", "training/learning_rate"}
    assert at_every_evaluation <= set(mlflow_run.data.metrics)
    for name in mlflow_run.data.metrics:
        if name.startswith("system/"):
            continue
        entries = client.get_metric_history(mlflow_run.info.run_id, name)
        only_at_the_end = name.startswith(("sample/", "test/", "val/nats_per_dim"))
        assert [entry.step for entry in entries] == ([300] if only_at_the_end else POINTS), name
        for entry, line in zip(entries, history, strict=False):
            if name in line["metrics"] and not only_at_the_end:
                assert entry.value == line["metrics"][name]
    assert {"sample/distance", "test/elbo_window"} <= set(mlflow_run.data.metrics)

    pictures = [Path(file.path).name for file in client.list_artifacts(mlflow_run.info.run_id, "images")]
    steps = [int(re.search(r"step\D(\d+)", name)[1]) for name in pictures if name.endswith(".png")]
    assert sorted(steps) == [0, POINTS[-1]], "those in between would cost more than a tenth of the training"
    files = {Path(file.path).name for file in client.list_artifacts(mlflow_run.info.run_id, "model")}
    assert files >= {"sampler.onnx", "samples.png", "animation.gif", "model.safetensors"}


def test_an_existing_name_is_refused_and_nothing_is_lost(training, run_folder, here, capsys):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    assert here.refused([*SMALL, "--name", "one"], training[0]).startswith(
        "error: --name one: runs/one exists"
    )
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


def test_a_finished_run_is_not_trained_again(training, here, run_folder):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    for flags in (["--resume"], [*SMALL, "--start-or-resume"]):
        status, output, errors = here([*flags, "--name", "one"], training[0])
        assert (status, errors) == (0, "") and "one is finished" in output
        assert "--config runs/one/model/config.json --init-from runs/one" in output
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


@pytest.mark.slow
def test_training_can_start_from_another_models_weights(training, here, run_folder, database):
    """--init-from takes the network from the other run's folder as well; the run itself is a new one."""
    few = ["--training.num-updates", "1", "--training.learning-rate", "1e-12", "--name", "two", *database]
    small = ["--metrics.num-samples", "50", "--sampler.num-steps", "5"]
    status, output, errors = here(["--data", "heart", "--init-from", str(run_folder), *few, *small])
    assert (status, errors) == (0, ""), output + errors
    first, second = (TrainedModel.load(folder / "model") for folder in (run_folder, here.folder / "runs/two"))
    assert second.config.network == first.config.network and second.config.training.num_updates == 1
    for name, weight in first.network.state_dict().items():
        torch.testing.assert_close(second.network.state_dict()[name], weight, rtol=0.0, atol=1e-9)
    mse = [model.provenance["metrics"]["val/mse"] for model in (first, second)]
    # With other timesteps and examples; a fresh network has about 1.
    assert mse[1] == pytest.approx(mse[0], rel=0.3)
    assert ray.util.placement_group_table() is not None
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}


def test_initial_weights_that_do_not_fit_are_refused(training, here, run_folder, database):
    for arguments in (
        ["--data", "digits"],
        ["--data", "heart", "--network.hidden-size", "16"],
        ["--data", "heart", "--network.num-blocks", "7"],
    ):
        message = here.refused([*arguments, "--init-from", str(run_folder / "model"), *database])
        assert f"--init-from {run_folder / 'model'}" in message and "shape" in message


@pytest.mark.slow
def test_a_run_that_was_killed_while_publishing_is_finished_without_duplicate_steps(training, here, tmp_path):
    """As after a kill between sending the last metrics to MLflow and recording the run as finished."""
    shutil.copytree(training[0], tmp_path / "copy")
    folder = tmp_path / "copy" / "runs" / "one"
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    before = CheckpointStore(Storage(str(folder / "checkpoints")), 3).updates()
    status, output, errors = here(
        ["--resume", "--num-workers", "2", "--tracking-uri", "sqlite:///store/mlflow.db"], tmp_path / "copy"
    )
    assert (status, errors) == (0, ""), output + errors
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert CheckpointStore(Storage(str(folder / "checkpoints")), 3).updates() == before
    client = MlflowClient(f"sqlite:///{tmp_path / 'copy' / 'store' / 'mlflow.db'}")
    metrics = client.get_run(record["run_id"]).data.metrics
    for name in metrics:
        steps = [entry.step for entry in client.get_metric_history(record["run_id"], name)]
        assert len(steps) == len(set(steps)), name
    assert client.get_run(record["run_id"]).info.status == "FINISHED"
