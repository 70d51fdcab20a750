"""train.py: a real training on two workers, and input that is refused. One run serves most tests here."""

import json
import os
import re
import shlex
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

from diffusion.data.dataset import load_dataset
from diffusion.manifest import read_manifest
from diffusion.training.checkpoints import TrainedModel, best_model, read_checkpoint
from export.sampler import Sampler
from workflows.cli.parsing import parse_train_options
from workflows.cli.run_options import TrainOptions
from workflows.storage.run_record import RunRecord
from workflows.storage.storage import Storage
from workflows.training.checkpoint_store import CheckpointStore
from workflows.training.run_logger import RunLogger

ROOT = Path(__file__).parents[3]
SMALL = (
    "--data heart --training.num-updates 300 --training.num-evaluations 3 --training.batch-size 64 "
    "--metrics.num-samples 200 --metrics.num-examples 256 --network.hidden-size 32 --sampler.num-steps 10 "
    "--experiment shapes --tracking-uri sqlite:///store/mlflow.db"
).split()
POINTS = [100, 200, 300]


def train(folder, *arguments):
    """Run train.py; returns the completed process and every process that it started."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "RAY"))
    }
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
        output, errors = process.communicate(timeout=240)
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
    _, alive = psutil.wait_procs(started, timeout=20)
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
        entries = client.get_metric_history(mlflow_run.info.run_id, name)
        only_at_the_end = name.startswith(("sample/", "test/", "val/nats_per_dim"))
        assert [entry.step for entry in entries] == ([300] if only_at_the_end else POINTS), name
        for entry, line in zip(entries, history, strict=False):
            if name in line["metrics"] and not only_at_the_end:
                assert entry.value == line["metrics"][name]
    assert {"sample/distance", "test/elbo_window"} <= set(mlflow_run.data.metrics)

    pictures = [Path(file.path).name for file in client.list_artifacts(mlflow_run.info.run_id, "images")]
    steps = [int(re.search(r"step\D(\d+)", name)[1]) for name in pictures if name.endswith(".png")]
    assert sorted(steps) == POINTS
    files = {Path(file.path).name for file in client.list_artifacts(mlflow_run.info.run_id, "model")}
    assert files >= {"sampler.onnx", "samples.png", "animation.gif", "model.safetensors"}


def test_an_existing_name_is_refused_and_nothing_is_lost(training, run_folder, here, capsys):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    assert here.refused([*SMALL, "--name", "one"], training[0]).startswith(
        "error: --name one: runs/one exists"
    )
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


def test_a_finished_run_is_not_resumed(training, here):
    message = here.refused(["--resume", "--name", "one"], training[0])
    assert "--resume --name one" in message and "finished" in message


@pytest.fixture
def here(in_process):
    return in_process("train")


@pytest.fixture
def database(_empty_database, tmp_path_factory):
    """Flags for an MLflow database that exists already, outside the current folder."""
    path = shutil.copy(_empty_database, tmp_path_factory.mktemp("store") / "mlflow.db")
    return ["--tracking-uri", f"sqlite:///{path}"]


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
    assert mse[1] == pytest.approx(mse[0], rel=0.05), "a fresh network has about 1"
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


def test_a_dry_run_describes_the_training_and_writes_nothing(training, here, database):
    client = MlflowClient(database[1])
    runs_before = len(client.search_runs([each.experiment_id for each in client.search_experiments()]))
    status, output, errors = here(["--data", "heart", "--num-workers", "2", "--dry-run", *database])
    assert (status, errors) == (0, "")
    for words in (
        "10000 updates of 256",
        "5600 examples",
        "workers   2, each with 1 CPU thread",
        "alphas_cumprod",
    ):
        assert words in output
    assert re.search(r"about \d[\d.]* (s|min|h)\b", output) and "█" in output and "log-SNR" in output
    assert not list(here.folder.iterdir())
    assert (
        len(client.search_runs([each.experiment_id for each in client.search_experiments()])) == runs_before
    )


def test_too_many_workers_are_refused(here, database):
    message = here.refused(
        ["--data", "heart", "--num-workers", "4000", "--training.batch-size", "4000", *database]
    )
    assert message.startswith("error: --num-workers 4000: the cluster has ")


def test_half_precision_that_cpus_do_not_support_is_refused(here, database):
    message = here.refused(["--data", "heart", "--training.precision", "fp16", *database])
    assert "--training.precision fp16" in message and "bf16" in message


def images(folder, count=60, size=16):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def empty_folder(data):
    data.mkdir()


def corrupt_image(data):
    (images(data) / "30.png").write_bytes((data / "30.png").read_bytes()[:100])


def too_few_images(data):
    images(data, count=9)


def images_of_6(data):
    images(data, size=6)


def not_a_number(data):
    data.write_text("x,y,kind\n" + "1,2,a\n3,4,b\n" * 40 + "5,nan,a\n")


def not_a_table(data):
    data.write_bytes(b"\x00\x01\x02")


@pytest.mark.parametrize(
    ("make", "name", "arguments", "words"),
    [
        (empty_folder, "photos", "", ["photos holds no images"]),
        (corrupt_image, "photos", "", ["30.png", "--skip-bad-images"]),
        (too_few_images, "photos", "", ["9 examples: too few"]),
        (images_of_6, "photos", "", ["--image-size 6", "8 or more"]),
        (images, "photos", "--image-size 4", ["--image-size 4", "from 8"]),
        (
            images,
            "photos",
            "--network.channel-multipliers 1 2 2 2",
            ["--network.channel-multipliers", "4 levels", "16x16", "1 to 3"],
        ),
        (images, "photos", "--label-column kind", ["--label-column kind", "only tables"]),
        (not_a_number, "table.csv", "", ["table.csv", "row 81", "column y"]),
        (not_a_number, "table.csv", "--label-column colour", ["--label-column colour", "x, y, kind"]),
        (
            not_a_number,
            "table.csv",
            "--label-column kind --horizontal-flips",
            ["--horizontal-flips", "points"],
        ),
        (not_a_number, "table.csv", "--network.kind unet --label-column y", ["table.csv", "row"]),
        (not_a_table, "table.parquet", "", ["table.parquet cannot be read"]),
        (not_a_table, "gone.csv", "--data nowhere.csv", ["--data nowhere.csv"]),
    ],
)
def test_unusable_data_is_refused_in_one_line(here, database, make, name, arguments, words):
    make(here.folder / name)
    message = here.refused(["--data", name, *arguments.split(), *database])
    for word in words:
        assert word in message


def test_bad_images_can_be_skipped(here, database):
    corrupt_image(here.folder / "photos")
    status, output, errors = here(
        ["--data", "photos", "--skip-bad-images", "--image-size", "8", "--dry-run", *database]
    )
    assert (status, errors) == (0, "")
    train, val, test = map(
        int, re.search(r"(\d+) examples .* (\d+) for val.* (\d+) for testing", output).groups()
    )
    assert train + val + test == 59


@pytest.fixture
def stopped_run(here, database):
    """A stopped run on a table: only its record, without a training; returns the table and its rows."""
    rows = np.random.default_rng(0).normal(size=(200, 2))
    table = here.folder / "table.csv"
    np.savetxt(table, rows, delimiter=",", header="x,y", comments="")
    config = TrainOptions.for_data(str(table)).config()
    fingerprint = load_dataset(config.data).spec.fingerprint
    record = RunRecord("cut", "table", "0" * 32, config, fingerprint)
    record.write(Storage(str(here.folder / "runs")).child("cut"), "stopped")
    return table, rows


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--training.learning-rate 0.5", ["--training.learning-rate 0.5", "0.001"]),
        ("--seed 7", ["--seed 7", "0"]),
        ("--network.dropout 0.5", ["--network.dropout 0.5", "0.0"]),
        ("--training.num-updates 20000", ["--training.num-updates 20000", "10000"]),
        ("--training.num-epochs 1", ["--training.num-updates", "10000"]),
        ("--data heart", ["--data heart", "table.csv"]),
        ("--num-workers 4000 --training.batch-size 4000", ["--training.batch-size 4000", "256"]),
        ("--init-from runs/cut", ["--init-from", "--resume"]),
    ],
)
def test_a_run_is_resumed_only_with_its_own_config(here, stopped_run, database, arguments, words):
    message = here.refused(["--resume", "--name", "cut", *arguments.split(), *database])
    for word in words:
        assert word in message


def test_a_run_is_not_resumed_with_data_that_have_changed(here, stopped_run, database):
    table, rows = stopped_run
    rows[17, 1] += 0.5
    np.savetxt(table, rows, delimiter=",", header="x,y", comments="")
    message = here.refused(["--resume", "--name", "cut", *database])
    assert "table.csv have changed" in message


def test_a_run_is_resumed_only_in_the_mlflow_store_that_has_it(here, stopped_run, database):
    message = here.refused(["--resume", "--name", "cut", *database])
    assert "--tracking-uri" in message and "has no run 000000" in message


def test_resuming_without_an_unfinished_run_is_refused(here):
    assert "--resume --name nope" in here.refused(["--resume", "--name", "nope"])
    assert "no unfinished run" in here.refused(["--resume"])


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


class SilentTracker:
    """Replaces the connection to MLflow."""

    name, unsent, run_id = "MLflow", 0, "0" * 32

    def __init__(self, uri, experiment):
        self.uri = uri

    def start(self, name, params, folder=None, *, reuse=False):
        return self.run_id

    def tag(self, tags):
        pass

    def close(self, status):
        pass


@pytest.mark.parametrize("store", ["", "sqlite:///store/mlflow.db"])
@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_the_printed_command_resumes_the_run_with_the_same_options(
    monkeypatch, tmp_path, capsys, store, status
):
    """That includes its folder, its MLflow store and the number of workers, on which the weights depend."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("workflows.training.base_logger.open_tracker", SilentTracker)
    given = "--data heart --num-workers 2 --keep-checkpoints 50 --output-dir elsewhere --name cut".split()
    _, options = parse_train_options([*given, *(["--tracking-uri", store] if store else [])]).open_data()
    dataset = load_dataset(options.config().data)
    log = RunLogger.open(options, options.config(), dataset, None, store or "sqlite:////somewhere/mlflow.db")
    capsys.readouterr()
    log.close(status)
    command = re.search(r"next: python -m workflows\.train (.*)", capsys.readouterr().out)[1]
    command_line = parse_train_options(shlex.split(command))
    resumed, record = command_line.options, command_line.record
    assert record is not None and record.run_id == SilentTracker.run_id and resumed.resume
    assert resumed.config() == options.config()
    for name in ("name", "num_workers", "keep_checkpoints", "output_dir", "tracking_uri"):
        assert getattr(resumed, name) == getattr(options, name), name
