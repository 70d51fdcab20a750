"""Trainings that are killed, stopped and starved end with the weights of one that was left in peace."""

import contextlib
import json
import os
import random
import re
import signal
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

from diffusion.checkpoints import read_checkpoint
from workflows.checkpoint_store import CheckpointStore
from workflows.storage import Storage

ROOT = Path(__file__).parents[2]
UPDATES, BETWEEN = 3000, 300
AT_THE_END = ("sample/", "test/", "val/nats_per_dim", "val/bits_per_dim")
POINTS = list(range(BETWEEN, UPDATES + 1, BETWEEN))
HEART = (
    f"--data heart --training.num-updates {UPDATES} --training.num-evaluations {len(POINTS)} "
    "--training.batch-size 64 --network.hidden-size 32 --network.dropout 0.1 --metrics.num-samples 100 "
    "--metrics.num-examples 64 --sampler.num-steps 10 --keep-checkpoints 100 --name run"
).split()

pytestmark = pytest.mark.faults


class Training:
    """train.py in a process group of its own, as in a terminal; its folder keeps what its sessions print."""

    def __init__(self, folder, *arguments, workers=2, output_dir="runs", **environment):
        self.folder, self.output = folder, folder / "output.txt"
        self.start = self.output.stat().st_size if self.output.exists() else 0
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "RAY"))}
        command = [sys.executable, str(ROOT / "workflows" / "train.py"), *arguments]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--num-workers", str(workers), "--output-dir", output_dir],
                cwd=folder,
                env={**kept, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.store = CheckpointStore(Storage(output_dir_of(folder, output_dir)).child("run/checkpoints"), 100)
        self.shared = "RAY_ADDRESS" in environment
        self.started: set[psutil.Process] = set()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.look()
        for process in self.started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()

    def look(self):
        """The processes below the command now; they are remembered."""
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(self.process.pid).children(recursive=True)
            self.started.update(below)
            return below
        return []

    def workers(self):
        """The processes that train, of this command or of a Ray that was there before it."""
        found = []
        for process in psutil.Process().children(recursive=True) if self.shared else self.look():
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def said(self):
        with self.output.open("rb") as file:
            file.seek(self.start)
            return file.read().decode()

    def until(self, holds, seconds=120.0):
        """Wait for something that must come before the command ends, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            self.look()
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said()}"
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        return found

    def until_update(self, update):
        """Wait for a checkpoint of this update or a later one; the newest there is."""
        return self.until(lambda: next((done for done in self.store.updates()[-1:] if done >= update), 0))

    def end(self, seconds=120.0):
        """Exit status, and the seconds that it took from now."""
        began = time.monotonic()
        while self.process.poll() is None:
            assert time.monotonic() < began + seconds, self.said()
            self.look()
            time.sleep(0.05)
        return self.process.returncode, time.monotonic() - began

    def left_behind(self, seconds=45.0):
        """Processes that outlive the command, but for two of Ray's that seek its server for a minute."""
        deadline = time.monotonic() + seconds
        while alive := [process for process in self.started if lives(process)]:
            if time.monotonic() > deadline:
                return alive
            time.sleep(0.1)
        return []

    def interrupt(self):
        """Ctrl-C, which the whole process group hears."""
        os.killpg(self.process.pid, signal.SIGINT)


def lives(process):
    with contextlib.suppress(psutil.Error):
        name = " ".join(process.cmdline())
        helps = name.startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE and not helps
    return False


def output_dir_of(folder, output_dir):
    return output_dir if "://" in output_dir else str(folder / output_dir)


@pytest.fixture(scope="module")
def moments():
    """Random numbers whose seed is printed."""
    seed = int(os.environ.get("FAULTS_SEED", time.time()))
    print(f"FAULTS_SEED={seed}")
    return random.Random(seed)


def wait_somewhat(moments, most):
    seconds = moments.uniform(0.0, most)
    print(f"waited {seconds:.3f} s")
    time.sleep(seconds)


@pytest.fixture(scope="module")
def on_shared_ray(ray_here):
    """Has a command join the Ray of this process, which spares its start."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}


@dataclass(frozen=True)
class Undisturbed:
    """A training that was left in peace: its folder, and the seconds from its first trace to its end."""

    folder: Path
    seconds: float


def run_undisturbed(folder, workers):
    with Training(folder, *HEART, workers=workers) as training:
        training.until((folder / "runs/run/run.json").exists)
        status, seconds = training.end()
        assert status == 0, training.said()
        assert training.store.updates() == POINTS
    return Undisturbed(folder, seconds)


@pytest.fixture(scope="module")
def undisturbed_2(tmp_path_factory):
    return run_undisturbed(tmp_path_factory.mktemp("peace"), 2)


@pytest.fixture(scope="module")
def undisturbed_1(tmp_path_factory):
    return run_undisturbed(tmp_path_factory.mktemp("peace"), 1)


def evaluated_at(storage, into):
    """Both kinds of weights and the metrics at each evaluation, from the checkpoints that are kept."""
    store, found = CheckpointStore(storage.child("run/checkpoints"), 100), {}
    for update in store.updates():
        if update % BETWEEN == 0:
            folder = store.load(f"{update:09d}", into)
            history = read_checkpoint(folder)[1].history
            assert [entry["update"] for entry in history] == POINTS[: len(history)]
            assert history[-1]["update"] == update, "no evaluation is missing"
            found[update] = (
                (folder / "network.safetensors").read_bytes(),
                (folder / "model.safetensors").read_bytes(),
                history[-1]["metrics"],
            )
    return found


def assert_same_training(storage, undisturbed, tmp_path):
    """Bit-identical weights wherever both were evaluated, the end included."""
    ours = evaluated_at(storage, tmp_path / "ours")
    theirs = evaluated_at(Storage(str(undisturbed.folder / "runs")), tmp_path / "theirs")
    assert UPDATES in ours
    for update, (network, model, metrics) in ours.items():
        assert metrics == pytest.approx(theirs[update][2], rel=1e-9), update
        assert network == theirs[update][0] and model == theirs[update][1], update


def assert_one_run_with_every_step_once(folder):
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("heart").experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["status"] == "finished"
    for name in run.data.metrics:
        steps = [entry.step for entry in client.get_metric_history(run.info.run_id, name)]
        assert steps == ([UPDATES] if name.startswith(AT_THE_END) else POINTS), name
    files = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    pictured = {int(re.search(r"step\D(\d+)", name)[1]) for name in files if name.endswith(".png")}
    assert pictured == set(POINTS)


def runs_status(folder):
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return [
        run.info.status for run in client.search_runs([client.get_experiment_by_name("heart").experiment_id])
    ]


def recorded_status(folder):
    return json.loads((folder / "runs" / "run" / "run.json").read_text())["status"]


@dataclass
class Facts:
    """What was seen at each fault of the training that meets them all."""

    folder: Path
    said: dict = field(default_factory=dict)
    status: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    left_behind: dict = field(default_factory=dict)
    recorded: dict = field(default_factory=dict)
    in_mlflow: dict = field(default_factory=dict)
    went_on_from: dict = field(default_factory=dict)
    newest_before: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def beset(tmp_path_factory, moments):
    """One training of two workers that meets one fault after the other, each at a random moment."""
    facts = Facts(tmp_path_factory.mktemp("beset"))

    def ended(fault, training, seconds):
        facts.status[fault], facts.seconds[fault] = training.end(seconds)
        facts.left_behind[fault] = training.left_behind()
        facts.said[fault] = training.said()
        facts.recorded[fault], facts.in_mlflow[fault] = (
            recorded_status(facts.folder),
            runs_status(facts.folder),
        )

    def starts(training):
        return re.findall(r"Going on from update (\d+)", training.said())

    with Training(facts.folder, *HEART) as training:
        for fault, number in (("worker killed", signal.SIGKILL), ("worker terminated", signal.SIGTERM)):
            training.until_update(facts.went_on_from.get("worker killed", 0) + 1)
            wait_somewhat(moments, 0.5)
            facts.newest_before[fault] = training.store.updates()[-1]
            known, before = len(starts(training)), len(training.said())
            moments.choice(training.until(training.workers)).send_signal(number)
            began = time.monotonic()
            training.until(lambda: len(starts(training)) > known)  # noqa: B023
            facts.seconds[fault] = time.monotonic() - began
            facts.went_on_from[fault] = int(starts(training)[-1])
            facts.said[fault] = training.said()[before:]
        wait_somewhat(moments, 0.5)
        training.look()
        training.process.kill()
        ended("driver killed", training, 5.0)
    wait_somewhat(moments, 0.5)
    with Training(facts.folder, "--resume", "--name", "run", "--keep-checkpoints", "100") as training:
        training.until(lambda: starts(training))
        wait_somewhat(moments, 0.5)
        training.interrupt()
        ended("interrupted", training, 60.0)
    newest = training.store.updates()[-1]
    facts.newest_before["damaged"] = training.store.updates()[-2]
    weights = facts.folder / "runs/run/checkpoints" / f"{newest:09d}" / "network.safetensors"
    content = bytearray(weights.read_bytes())
    content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    weights.write_bytes(content)
    with Training(facts.folder, "--resume", "--name", "run", "--keep-checkpoints", "100") as training:
        training.until(lambda: starts(training))
        facts.went_on_from["damaged"] = int(starts(training)[-1])
        facts.said["damaged"] = training.said()
        wait_somewhat(moments, 0.5)
        training.interrupt()
        time.sleep(0.2)
        training.interrupt()
        ended("interrupted twice", training, 60.0)
    with Training(facts.folder, "--resume", "--keep-checkpoints", "100") as training:
        ended("last", training, 180.0)
    return facts


def test_a_worker_that_is_killed_is_replaced_from_the_newest_checkpoint(beset):
    assert "A worker ended (the process of worker" in beset.said["worker killed"]
    assert beset.went_on_from["worker killed"] >= beset.newest_before["worker killed"]
    assert beset.went_on_from["worker killed"] in POINTS, "it had no time to write another"


def test_a_worker_that_is_told_to_end_writes_a_checkpoint_first(beset):
    assert (
        "(SIGTERM)" in beset.said["worker terminated"] and "Traceback" not in beset.said["worker terminated"]
    )
    assert beset.went_on_from["worker terminated"] >= beset.newest_before["worker terminated"]
    assert beset.went_on_from["worker terminated"] % 10 == 0
    assert beset.seconds["worker terminated"] < 30.0, "a spot machine's grace, with the new start"


def test_a_killed_driver_takes_its_workers_along(beset):
    assert beset.status["driver killed"] == -signal.SIGKILL
    assert not beset.left_behind["driver killed"]
    assert beset.recorded["driver killed"] == "running" and beset.in_mlflow["driver killed"] == ["RUNNING"]


def test_one_interrupt_is_a_clean_stop_after_a_checkpoint(beset):
    said = beset.said["interrupted"]
    assert beset.status["interrupted"] == 1 and "Traceback" not in said
    assert "Stopping after a checkpoint" in said
    assert re.search(r"Stopped.* update (\d+)", said) and "--resume --name run" in said
    assert not beset.left_behind["interrupted"]
    assert beset.recorded["interrupted"] == "stopped" and beset.in_mlflow["interrupted"] == ["KILLED"]


def test_two_interrupts_are_a_stop_at_once(beset):
    assert beset.status["interrupted twice"] == 1 and beset.seconds["interrupted twice"] < 10.0
    assert "Traceback" not in beset.said["interrupted twice"]
    assert not beset.left_behind["interrupted twice"]
    assert beset.recorded["interrupted twice"] == "stopped"
    assert beset.in_mlflow["interrupted twice"] == ["KILLED"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(beset):
    (warning,) = [line for line in beset.said["damaged"].splitlines() if line.startswith("warning:")]
    assert "network.safetensors" in warning and "damaged" in warning
    assert beset.went_on_from["damaged"] == beset.newest_before["damaged"]


def test_after_all_faults_the_weights_are_those_of_an_undisturbed_training(beset, undisturbed_2, tmp_path):
    assert beset.status["last"] == 0, beset.said["last"]
    assert not beset.left_behind["last"] and beset.recorded["last"] == "finished"
    assert_same_training(Storage(str(beset.folder / "runs")), undisturbed_2, tmp_path)


def test_after_all_faults_mlflow_holds_one_run_and_every_step_once(beset):
    assert_one_run_with_every_step_once(beset.folder)


def test_a_driver_killed_at_any_moment_is_resumed_from_its_bucket(undisturbed_1, tmp_path, moments, s3):
    """From its start to the handing over of its model, checkpoints being written all the time."""
    output_dir = f"s3://{s3}/some/prefix"
    storage = Storage(output_dir)
    often = ["--training.checkpoint-minutes", "0.01"]
    with Training(tmp_path, *HEART, *often, workers=1, output_dir=output_dir) as training:
        training.until(lambda: storage.exists("run/run.json"))
        wait_somewhat(moments, undisturbed_1.seconds)
        training.look()
        training.process.kill()
        ended = training.end()[0] == 0
        assert not training.left_behind()
    # It may have been killed between its record of being finished and its end.
    finished = ended or json.loads(storage.child("run").read_text("run.json"))["status"] == "finished"
    if not finished:
        again = ["--resume", "--keep-checkpoints", "100"]
        with Training(tmp_path, *again, workers=1, output_dir=output_dir) as training:
            status, _ = training.end()
            assert status == 0, training.said()
    assert_same_training(storage, undisturbed_1, tmp_path)
    assert_one_run_with_every_step_once(tmp_path)
    (named,) = re.findall(r"(\S+sampler\.onnx) +the file to ship", training.said())
    assert named.startswith(output_dir) and storage.exists(named.removeprefix(f"{output_dir}/"))


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


def test_a_full_disk_is_told_in_a_line_and_what_was_written_is_gone_on_from(
    small_disk, undisturbed_2, tmp_path
):
    filler = small_disk / "filler"
    with Training(tmp_path, *HEART, output_dir="disk") as training:
        training.until_update(BETWEEN)
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        status, _ = training.end(60.0)
        said = training.said()
    assert status == 1 and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "No space left on device" in line and "checkpoint of update" in line
    kept = training.store.updates()
    assert kept and max(kept) < UPDATES
    assert training.store.load_newest(tmp_path / "copy", pytest.fail).name == f"{kept[-1]:09d}"
    assert not list(small_disk.rglob("checkpoints/.part-*"))
    assert runs_status(tmp_path) == ["FAILED"]
    filler.unlink()
    arguments = ["--resume", "--name", "run", "--keep-checkpoints", "3"]
    with Training(tmp_path, *arguments, output_dir="disk") as training:
        status, _ = training.end()
        assert status == 0, training.said()
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


def test_a_folder_streamed_from_disk_is_learned_as_one_in_memory(tmp_path, on_shared_ray):
    """Though its files go missing on the way, which ends all workers in one line, until they are back."""
    photos(tmp_path / "memory" / "photos")
    with Training(tmp_path / "memory", *STREAMED, **on_shared_ray) as training:
        assert training.end()[0] == 0, training.said()
    assert "streamed from disk" not in training.said()
    in_memory = final_weights(training, tmp_path / "copy")

    files = photos(tmp_path / "disk" / "photos")
    limit = ["--memory-limit-gb", "1e-6"]
    with Training(tmp_path / "disk", *STREAMED, *limit, **on_shared_ray) as training:
        training.until_update(400)
        kept = {path: path.read_bytes() for path in files}
        for path in files:
            path.unlink()
        status, _ = training.end(60.0)
        said = training.said()
    assert "streamed from disk" in said and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert status == 2 and "photos/" in line and "put the file back" in line
    for path, content in kept.items():
        path.write_bytes(content)
    with Training(tmp_path / "disk", "--resume", **on_shared_ray) as training:
        assert training.end()[0] == 0, training.said()
    assert final_weights(training, tmp_path / "copy") == in_memory
