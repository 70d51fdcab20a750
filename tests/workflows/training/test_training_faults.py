"""Trainings that are killed, stopped or run out of disk end with the weights of an undisturbed training."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from mlflow import MlflowClient
from PIL import Image
from pyarrow import fs

from diffusion.training.checkpoints import read_checkpoint
from tests.workflows.conftest import left_behind, user_environment
from workflows.status import STOPPED
from workflows.storage.storage import Storage
from workflows.training.checkpoint_store import CheckpointStore

ROOT = Path(__file__).parents[3]
NUM_UPDATES, UPDATES_PER_EVALUATION = 3000, 300
ONLY_AT_THE_END = ("sample/", "test/", "val/nats_per_dim", "val/bits_per_dim")
POINTS = list(range(UPDATES_PER_EVALUATION, NUM_UPDATES + 1, UPDATES_PER_EVALUATION))
HEART = (
    f"--data heart --training.num-updates {NUM_UPDATES} --training.num-evaluations {len(POINTS)} "
    "--training.batch-size 64 --network.hidden-size 32 --network.dropout 0.1 --metrics.num-samples 100 "
    "--metrics.num-examples 64 --sampler.num-steps 10 --keep-checkpoints 100 --name run"
).split()

pytestmark = pytest.mark.faults


class Training:
    """A run of train.py in its own process group, as in a terminal; all its sessions write to `output`."""

    def __init__(self, folder, *arguments, workers=2, output_dir="runs", **environment):
        self.folder, self.output = folder, folder / "output.txt"
        self.output_start = self.output.stat().st_size if self.output.exists() else 0
        inherited = user_environment()
        command = [sys.executable, str(ROOT / "workflows" / "train.py"), *arguments]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--num-workers", str(workers), "--output-dir", output_dir],
                cwd=folder,
                env={**inherited, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.store = CheckpointStore(Storage(output_dir_of(folder, output_dir)).child("run/checkpoints"), 100)
        self.uses_shared_ray = "RAY_ADDRESS" in environment
        self.started: set[psutil.Process] = set()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.find_children()
        for process in self.started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()

    def find_children(self):
        """The command's current child processes, recursively; they are also added to `started`."""
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.started.update(children)
            return children
        return []

    def workers(self):
        """The worker processes, below this command or below a Ray that was started before it."""
        children = psutil.Process().children(recursive=True) if self.uses_shared_ray else self.find_children()
        workers = []
        for process in children:
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    workers.append(process)
        return workers

    def printed(self):
        """Output of this session."""
        with self.output.open("rb") as file:
            file.seek(self.output_start)
            return file.read().decode()

    def wait_for(self, condition, seconds=120.0):
        """Wait until a condition is true, which must be before the command ends, and return its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            self.find_children()
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.printed()}"
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.05)
        return value

    def wait_for_update(self, update):
        """Wait for a checkpoint of this update or a later one; returns the update of the newest."""
        return self.wait_for(
            lambda: next((saved for saved in self.store.updates()[-1:] if saved >= update), 0)
        )

    def wait(self, seconds=120.0):
        """Wait for the command to end; returns its exit status and the seconds that this took."""
        started = time.monotonic()
        while self.process.poll() is None:
            assert time.monotonic() < started + seconds, self.printed()
            self.find_children()
            time.sleep(0.05)
        return self.process.returncode, time.monotonic() - started

    def left_behind(self):
        return left_behind(self.started)

    def interrupt(self):
        """Press Ctrl-C, which signals the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)


def output_dir_of(folder, output_dir):
    return output_dir if "://" in output_dir else str(folder / output_dir)


@pytest.fixture(scope="module")
def rng():
    """Random number generator whose seed is printed."""
    seed = int(os.environ.get("FAULTS_SEED", time.time()))
    print(f"FAULTS_SEED={seed}")
    return random.Random(seed)


def sleep_randomly(rng, max_seconds):
    seconds = rng.uniform(0.0, max_seconds)
    print(f"waited {seconds:.3f} s")
    time.sleep(seconds)


@pytest.fixture(scope="module")
def on_shared_ray(ray_here):
    """Environment with which a command joins the Ray of this process, to save the time to start its own."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}


@dataclass(frozen=True)
class Undisturbed:
    """A training without faults: its folder, and the seconds from its run record to its end."""

    folder: Path
    seconds: float


def run_undisturbed(folder, workers):
    with Training(folder, *HEART, workers=workers) as training:
        training.wait_for((folder / "runs/run/run.json").exists)
        status, seconds = training.wait()
        assert status == 0, training.printed()
        assert training.store.updates() == POINTS
    return Undisturbed(folder, seconds)


@pytest.fixture(scope="module")
def undisturbed_2(tmp_path_factory):
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), 2)


@pytest.fixture(scope="module")
def undisturbed_1(tmp_path_factory):
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), 1)


def load_evaluations(storage, into):
    """Live weights, averaged weights and metrics at each evaluation, from the checkpoints, by update."""
    store, evaluations = CheckpointStore(storage.child("run/checkpoints"), 100), {}
    for update in store.updates():
        if update % UPDATES_PER_EVALUATION == 0:
            folder = store.load(f"{update:09d}", into)
            history = read_checkpoint(folder)[1].history
            assert [entry["update"] for entry in history] == POINTS[: len(history)]
            assert history[-1]["update"] == update, "no evaluation is missing"
            evaluations[update] = (
                (folder / "network.safetensors").read_bytes(),
                (folder / "model.safetensors").read_bytes(),
                history[-1]["metrics"],
            )
    return evaluations


def assert_same_training(storage, undisturbed, tmp_path):
    """Check that weights are bit-identical at every evaluation of this training, including the last."""
    actual = load_evaluations(storage, tmp_path / "actual")
    expected = load_evaluations(Storage(str(undisturbed.folder / "runs")), tmp_path / "expected")
    assert NUM_UPDATES in actual
    for update, (network, model, metrics) in actual.items():
        assert metrics == pytest.approx(expected[update][2], rel=1e-9), update
        assert network == expected[update][0] and model == expected[update][1], update


def assert_one_run_with_every_step_once(folder):
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("heart").experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["status"] == "finished"
    for name in run.data.metrics:
        steps = [entry.step for entry in client.get_metric_history(run.info.run_id, name)]
        if not name.startswith("system/"):
            assert steps == ([NUM_UPDATES] if name.startswith(ONLY_AT_THE_END) else POINTS), name
    files = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    pictured = [int(re.search(r"step\D(\d+)", name)[1]) for name in files if name.endswith(".png")]
    assert {0, NUM_UPDATES} <= set(pictured) <= {0, *POINTS}  # those between are drawn if that is cheap
    assert len(set(pictured)) == len(pictured)


def mlflow_statuses(folder):
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return [
        run.info.status for run in client.search_runs([client.get_experiment_by_name("heart").experiment_id])
    ]


def recorded_status(folder):
    return json.loads((folder / "runs" / "run" / "run.json").read_text())["status"]


@dataclass
class Facts:
    """Observations at each fault, by the fault's name."""

    folder: Path
    printed: dict = field(default_factory=dict)
    status: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    left_behind: dict = field(default_factory=dict)
    recorded: dict = field(default_factory=dict)
    in_mlflow: dict = field(default_factory=dict)
    resumed_from: dict = field(default_factory=dict)
    newest_before: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory, rng):
    """One training of two workers with one fault after the other, each at a random time."""
    facts = Facts(tmp_path_factory.mktemp("disturbed"))

    def record_end(fault, training, seconds):
        facts.status[fault], facts.seconds[fault] = training.wait(seconds)
        facts.left_behind[fault] = training.left_behind()
        facts.printed[fault] = training.printed()
        facts.recorded[fault], facts.in_mlflow[fault] = (
            recorded_status(facts.folder),
            mlflow_statuses(facts.folder),
        )

    def restarts(training):
        return re.findall(r"Resuming from update (\d+)", training.printed())

    with Training(facts.folder, *HEART) as training:
        for fault, number in (("worker killed", signal.SIGKILL), ("worker terminated", signal.SIGTERM)):
            training.wait_for_update(facts.resumed_from.get("worker killed", 0) + 1)
            sleep_randomly(rng, 0.5)
            facts.newest_before[fault] = training.store.updates()[-1]
            num_restarts, num_printed = len(restarts(training)), len(training.printed())
            rng.choice(training.wait_for(training.workers)).send_signal(number)
            signalled = time.monotonic()
            training.wait_for(lambda: len(restarts(training)) > num_restarts)  # noqa: B023
            facts.seconds[fault] = time.monotonic() - signalled
            facts.resumed_from[fault] = int(restarts(training)[-1])
            facts.printed[fault] = training.printed()[num_printed:]
        sleep_randomly(rng, 0.5)
        training.find_children()
        training.process.kill()
        record_end("driver killed", training, 5.0)
    sleep_randomly(rng, 0.5)
    with Training(facts.folder, "--resume", "--name", "run", "--keep-checkpoints", "100") as training:
        training.wait_for(lambda: restarts(training))
        sleep_randomly(rng, 0.5)
        training.interrupt()
        record_end("interrupted", training, 60.0)
    newest = training.store.updates()[-1]
    facts.newest_before["damaged"] = training.store.updates()[-2]
    weights = facts.folder / "runs/run/checkpoints" / f"{newest:09d}" / "network.safetensors"
    content = bytearray(weights.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    weights.write_bytes(content)
    with Training(facts.folder, "--resume", "--name", "run", "--keep-checkpoints", "100") as training:
        training.wait_for(lambda: restarts(training))
        facts.resumed_from["damaged"] = int(restarts(training)[-1])
        facts.printed["damaged"] = training.printed()
        sleep_randomly(rng, 0.5)
        training.interrupt()
        time.sleep(0.2)
        training.interrupt()
        record_end("interrupted twice", training, 60.0)
    with Training(facts.folder, "--resume", "--keep-checkpoints", "100") as training:
        record_end("last", training, 180.0)
    return facts


def test_a_worker_that_is_killed_is_replaced_from_the_newest_checkpoint(disturbed):
    assert "A worker ended (the process of worker" in disturbed.printed["worker killed"]
    assert disturbed.resumed_from["worker killed"] >= disturbed.newest_before["worker killed"]
    assert disturbed.resumed_from["worker killed"] in POINTS, "a killed worker writes no other checkpoint"


def test_a_worker_that_receives_sigterm_writes_a_checkpoint_first(disturbed):
    printed = disturbed.printed["worker terminated"]
    assert "A worker ended (a machine will be taken away (SIGTERM" in printed and "Traceback" not in printed
    assert disturbed.resumed_from["worker terminated"] >= disturbed.newest_before["worker terminated"]
    assert disturbed.resumed_from["worker terminated"] % 10 == 0
    assert disturbed.seconds["worker terminated"] < 30.0, "a spot machine's grace period, restart included"


def test_the_workers_of_a_killed_driver_end(disturbed):
    assert disturbed.status["driver killed"] == -signal.SIGKILL
    assert not disturbed.left_behind["driver killed"]
    assert disturbed.recorded["driver killed"] == "running" and disturbed.in_mlflow["driver killed"] == [
        "RUNNING"
    ]


def test_one_interrupt_is_a_clean_stop_after_a_checkpoint(disturbed):
    output = disturbed.printed["interrupted"]
    assert disturbed.status["interrupted"] == STOPPED and "Traceback" not in output
    assert "Stopping after a checkpoint" in output
    assert re.search(r"Stopped.* update (\d+)", output) and "--resume --name run" in output
    assert not disturbed.left_behind["interrupted"]
    assert disturbed.recorded["interrupted"] == "stopped" and disturbed.in_mlflow["interrupted"] == ["KILLED"]


def test_two_interrupts_are_an_immediate_stop(disturbed):
    assert disturbed.status["interrupted twice"] == STOPPED and disturbed.seconds["interrupted twice"] < 10.0
    assert "Traceback" not in disturbed.printed["interrupted twice"]
    assert not disturbed.left_behind["interrupted twice"]
    assert disturbed.recorded["interrupted twice"] == "stopped"
    assert disturbed.in_mlflow["interrupted twice"] == ["KILLED"]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(disturbed):
    (warning,) = [line for line in disturbed.printed["damaged"].splitlines() if line.startswith("warning:")]
    assert "network.safetensors" in warning and "damaged" in warning
    assert disturbed.resumed_from["damaged"] == disturbed.newest_before["damaged"]


def test_after_all_faults_the_weights_are_those_of_an_undisturbed_training(
    disturbed, undisturbed_2, tmp_path
):
    assert disturbed.status["last"] == 0, disturbed.printed["last"]
    assert not disturbed.left_behind["last"] and disturbed.recorded["last"] == "finished"
    assert_same_training(Storage(str(disturbed.folder / "runs")), undisturbed_2, tmp_path)


def test_after_all_faults_mlflow_has_one_run_and_every_step_once(disturbed):
    assert_one_run_with_every_step_once(disturbed.folder)


@pytest.mark.parametrize("printed", ["update 300/", "evaluating the model on the test split"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_stops_a_training_that_goes_on_later(tmp_path, printed, number):
    """As SLURM, systemd and a closed terminal send it; Ray is still there to write a checkpoint."""
    with Training(tmp_path, *HEART, workers=1) as training:
        training.wait_for(lambda: printed in training.printed())
        os.killpg(training.process.pid, number)
        status, _ = training.wait(60.0)
        assert status == STOPPED and not training.left_behind(), training.printed()
        assert "Traceback" not in training.printed()
    assert recorded_status(tmp_path) == "stopped" and mlflow_statuses(tmp_path) == ["KILLED"]
    with Training(tmp_path, "--resume", "--keep-checkpoints", "100", workers=1) as training:
        assert training.wait()[0] == 0, training.printed()
    assert_one_run_with_every_step_once(tmp_path)


def test_a_driver_killed_at_any_moment_is_resumed_from_its_bucket(undisturbed_1, tmp_path, rng, s3):
    """At any time from its start to publishing its model, while checkpoints are written all the time."""
    output_dir = f"s3://{s3}/some/prefix"
    storage = Storage(output_dir)
    frequent_checkpoints = ["--training.checkpoint-minutes", "0.01"]
    with Training(tmp_path, *HEART, *frequent_checkpoints, workers=1, output_dir=output_dir) as training:
        training.wait_for(lambda: storage.exists("run/run.json"))
        sleep_randomly(rng, undisturbed_1.seconds)
        training.find_children()
        training.process.kill()
        succeeded = training.wait()[0] == 0
        assert not training.left_behind()
    # It may have been killed after it was recorded as finished, just before it ended.
    finished = succeeded or json.loads(storage.child("run").read_text("run.json"))["status"] == "finished"
    if not finished:
        resume = ["--resume", "--keep-checkpoints", "100"]
        with Training(tmp_path, *resume, workers=1, output_dir=output_dir) as training:
            status, _ = training.wait()
            assert status == 0, training.printed()
    assert_same_training(storage, undisturbed_1, tmp_path)
    assert_one_run_with_every_step_once(tmp_path)
    (onnx_file,) = re.findall(r"(\S+sampler\.onnx) +the file to ship", training.printed())
    assert onnx_file.startswith(output_dir) and storage.exists(onnx_file.removeprefix(f"{output_dir}/"))


@pytest.fixture
def silent_server(monkeypatch):
    """An S3 server in a process of its own, which can be suspended as if the network were down."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    files = fs.S3FileSystem(
        endpoint_override=f"http://127.0.0.1:{port}", region="us-east-1", allow_bucket_creation=True
    )
    for _ in range(60):
        with contextlib.suppress(OSError):
            files.create_dir("bucket")
            break
        time.sleep(0.5)
    yield psutil.Process(server.pid)
    server.kill()
    server.wait()


def test_a_bucket_that_is_silent_costs_a_training_only_time(silent_server, undisturbed_1, tmp_path):
    """It is silent until after the last update, whose checkpoint is written once the server answers."""
    output_dir = "s3://bucket/prefix"
    with Training(tmp_path, *HEART, workers=1, output_dir=output_dir) as training:
        training.wait_for_update(UPDATES_PER_EVALUATION)
        silent_server.suspend()
        training.wait_for(lambda: "training goes on" in training.printed(), 300.0)
        training.wait_for(lambda: f"{NUM_UPDATES}" in training.printed(), 600.0)
        silent_server.resume()
        status, _ = training.wait(300.0)
        output = training.printed()
    assert status == 0 and "Traceback" not in output, output
    assert output.count("could not be written") == 1 and "answers again" in output, output
    assert_same_training(Storage(output_dir), undisturbed_1, tmp_path)
    assert_one_run_with_every_step_once(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    with contextlib.suppress(OSError):
        if subprocess.run(command, capture_output=True).returncode == 0:
            yield disk
            subprocess.run(["umount", "-l", str(disk)], check=True)
            return
    pytest.skip("only root can mount a small file system")


def test_a_full_disk_is_reported_in_one_line_and_the_run_can_be_resumed(small_disk, undisturbed_2, tmp_path):
    filler = small_disk / "filler"
    with Training(tmp_path, *HEART, output_dir="disk") as training:
        training.wait_for_update(UPDATES_PER_EVALUATION)
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        status, _ = training.wait(60.0)
        output = training.printed()
    assert status == 1 and "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "No space left on device" in line and "checkpoint of update" in line
    updates = training.store.updates()
    assert updates and max(updates) < NUM_UPDATES
    assert training.store.load_newest(tmp_path / "copy", pytest.fail).name == f"{updates[-1]:09d}"
    assert not list(small_disk.rglob("checkpoints/.part-*"))
    assert mlflow_statuses(tmp_path) == ["FAILED"]
    filler.unlink()
    arguments = ["--resume", "--name", "run", "--keep-checkpoints", "3"]
    with Training(tmp_path, *arguments, output_dir="disk") as training:
        status, _ = training.wait()
        assert status == 0, training.printed()
    assert_same_training(Storage(str(small_disk)), undisturbed_2, tmp_path)
    assert_one_run_with_every_step_once(tmp_path)


STREAMED = (
    "--data photos --training.num-updates 1600 --training.num-evaluations 4 --training.batch-size 128 "
    "--network.hidden-size 16 --network.num-blocks 1 --metrics.num-samples 20 --metrics.num-examples 16 "
    "--sampler.num-steps 5 --sampler.name ddim --horizontal-flips --name run"
).split()


def photos(folder):
    folder.mkdir(parents=True)
    for number in range(200):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return sorted(folder.iterdir())


def final_weights(training, into):
    folder = training.store.load_newest(into, pytest.fail)
    assert folder.name == "000001600"
    return [(folder / f"{kind}.safetensors").read_bytes() for kind in ("network", "model")]


def test_a_folder_streamed_from_disk_gives_the_same_model_as_in_memory(tmp_path, on_shared_ray):
    """Even if its files are missing for a while, which ends the training with a one-line error."""
    photos(tmp_path / "memory" / "photos")
    with Training(tmp_path / "memory", *STREAMED, **on_shared_ray) as training:
        assert training.wait()[0] == 0, training.printed()
    assert "streamed from disk" not in training.printed()
    in_memory = final_weights(training, tmp_path / "copy")

    files = photos(tmp_path / "disk" / "photos")
    limit = ["--memory-limit-gb", "1e-6"]
    with Training(tmp_path / "disk", *STREAMED, *limit, **on_shared_ray) as training:
        training.wait_for_update(400)
        contents = {path: path.read_bytes() for path in files}
        for path in files:
            path.unlink()
        status, _ = training.wait(60.0)
        output = training.printed()
    assert "streamed from disk" in output and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert status == 2 and "photos/" in line and "put the file back" in line
    for path, content in contents.items():
        path.write_bytes(content)
    with Training(tmp_path / "disk", "--resume", **on_shared_ray) as training:
        assert training.wait()[0] == 0, training.printed()
    assert final_weights(training, tmp_path / "copy") == in_memory
