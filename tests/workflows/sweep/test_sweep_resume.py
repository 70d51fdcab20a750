"""Sweeps that are killed or stopped in any phase, and resumed: no trial is lost or run twice."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient

from tests.workflows.conftest import left_behind, user_environment
from workflows.status import STOPPED
from workflows.storage.run_lock import RunLock

ROOT = Path(__file__).parents[3]
NUM_TRIALS, UPDATES = 4, 1200
SWEEP = (
    f"--data heart --num-trials {NUM_TRIALS} --training.num-updates {UPDATES} --training.num-evaluations 4 "
    "--metrics.num-samples 200 --metrics.num-examples 128 --network.hidden-size 16 --sampler.num-steps 5"
).split()


def start(folder, *arguments):
    environment = user_environment()
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "workflows" / "tune.py"), *arguments],
            cwd=folder,
            env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def output_of(folder):
    return (folder / "output.txt").read_text()


def events(folder):
    path = folder / "runs" / "cut" / "journal.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def finish(folder, process, seconds=900, status=0):
    try:
        assert process.wait(seconds) == status, output_of(folder)
    finally:
        process.kill()
        process.wait()


def assert_complete(folder, num_trials=NUM_TRIALS):
    """Check that trials.csv, the trial folders and MLflow have every trial, and each of its steps, once."""
    directory = folder / "runs" / "cut"
    table = pd.read_csv(directory / "trials.csv").set_index("trial_id")
    assert len(table) == num_trials and table.index.is_unique
    assert set(table["status"]) <= {"finished", "stopped"}
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("heart").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["trial_id"]: run for run in runs if run is not parent}
    assert len(runs) == 1 + num_trials and set(children) == set(table.index)
    assert parent.info.status == "FINISHED" and parent.info.run_name == "cut"
    assert parent.data.tags["champion"] in set(table.index)
    for trial_id, run in children.items():
        row = table.loc[trial_id]
        assert run.info.status == "FINISHED" and run.data.tags["status"] == row["status"]
        assert float(run.data.params["schedule.beta_end"]) == row["schedule.beta_end"]
        history = client.get_metric_history(run.info.run_id, "objective")
        interval = UPDATES // 4
        expected = list(range(interval, row["updates"] + 1, interval))
        assert [entry.step for entry in history] == expected, trial_id
        at_best = {entry.step: entry.value for entry in history}[row["best_update"]]
        assert at_best == pytest.approx(row["objective"])
        assert (directory / "trials" / trial_id / "model.safetensors").exists()
    versions = client.search_model_versions("name = 'ray-ddpm-heart'")
    assert len(versions) == 1 and versions[0].run_id == parent.info.run_id
    assert client.get_model_version_by_alias("ray-ddpm-heart", "champion").version == versions[0].version
    assert (directory / "champion" / "sampler.onnx").exists() and not (directory / "tune").exists()
    assert "Traceback" not in output_of(folder)


@pytest.fixture
def rng():
    """Random generator; its seed is printed, so that a failure can be reproduced."""
    seed = int(os.environ.get("FAULTS_SEED", time.time_ns() % 10**6))
    print(f"FAULTS_SEED={seed}")
    return random.Random(seed)


@pytest.mark.parametrize(
    "max_kills", [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.faults)]
)
def test_a_driver_that_is_killed_repeats_no_finished_trial(tmp_path, rng, max_kills):
    num_kills, first_ends = 0, {}
    process = start(tmp_path, *SWEEP, "--name", "cut")
    try:
        while num_kills < max_kills:
            deadline = time.monotonic() + 900
            kill_at = len(events(tmp_path)) + rng.randint(1, 6)
            while len(events(tmp_path)) < kill_at and process.poll() is None:
                assert time.monotonic() < deadline, output_of(tmp_path)
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.5))
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            num_kills += 1
            for event in events(tmp_path):
                if event["event"] == "end" and event["status"] in ("finished", "stopped"):
                    first_ends.setdefault(event["trial_id"], event)
            process = start(tmp_path, "--resume", "--name", "cut")
    finally:
        if sys.exc_info()[0]:
            process.kill()
    finish(tmp_path, process)
    assert num_kills >= 1
    assert_complete(tmp_path)
    for trial_id, first_end in first_ends.items():
        of_trial = [event for event in events(tmp_path) if event["trial_id"] == trial_id]
        assert of_trial[-1] == first_end, "a completed trial has no further events"


@pytest.mark.slow
def test_an_interrupted_sweep_exports_the_best_so_far_and_can_be_resumed(tmp_path):
    process = start(tmp_path, *SWEEP, "--name", "cut")
    deadline = time.monotonic() + 900
    while sum(event["event"] == "end" for event in events(tmp_path)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, output_of(tmp_path)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    finish(tmp_path, process, status=STOPPED)
    assert re.search(rf"Interrupted after \d of {NUM_TRIALS} trials", output_of(tmp_path))
    assert "Ending the trials; then the best model so far is exported." in output_of(tmp_path)
    assert "next: python -m workflows.tune --resume --name cut" in output_of(tmp_path)
    assert (tmp_path / "runs" / "cut" / "champion" / "sampler.onnx").exists()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert not client.get_registered_model("ray-ddpm-heart").aliases
    runs = client.search_runs([client.get_experiment_by_name("heart").experiment_id])
    statuses = {run.info.run_name: run.info.status for run in runs}
    assert statuses.pop("cut") == "KILLED" and "RUNNING" not in statuses.values()
    finish(tmp_path, start(tmp_path, "--resume"))
    assert_complete(tmp_path)
    again = start(tmp_path, "--resume")
    assert again.wait(60) == 2 and "no unfinished run of tune.py" in output_of(tmp_path)


@pytest.mark.faults
def test_a_sweep_killed_before_its_first_trial_restarts_under_the_same_run(tmp_path):
    process = start(tmp_path, *SWEEP, "--num-trials", "2", "--name", "cut")
    deadline = time.monotonic() + 900
    while not (tmp_path / "runs" / "cut").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    record = tmp_path / "runs" / "cut" / "run.json"
    if not record.exists():  # if it does, the kill came a moment later
        assert not events(tmp_path)
    finish(tmp_path, start(tmp_path, *SWEEP, "--num-trials", "2", "--name", "cut", "--resume"))
    assert_complete(tmp_path, 2)


PHASES = {
    "start": None,
    "trials": None,
    "confirmation": "confirming ",
    "export": "exporting it to ONNX",
    "registration": "sending the champion to MLflow",
}
AFTER_THE_TRIALS = ("confirmation", "export", "registration")
# Signals, the seconds between them, and whether the whole process group gets them, as SLURM sends them.
ENDINGS = {
    "SIGINT": ([signal.SIGINT], 0.0, False),
    "SIGINT twice": ([signal.SIGINT] * 2, 0.5, False),
    "SIGTERM": ([signal.SIGTERM], 0.0, False),
    "SIGHUP": ([signal.SIGHUP], 0.0, False),
    "SIGKILL": ([signal.SIGKILL], 0.0, False),
    "SIGINT to the group": ([signal.SIGINT], 0.0, True),
    "SIGTERM to the group": ([signal.SIGTERM], 0.0, True),
    "SIGTERM and SIGHUP to the group": ([signal.SIGTERM, signal.SIGHUP], 0.0, True),
}
TRIALS = ["--num-trials", "2", "--training.num-updates", str(UPDATES)]
SLOW = [("trials", "SIGTERM to the group"), ("export", "SIGTERM")]


class Sweep:
    """A sweep, and the processes that it has started."""

    def __init__(self, folder, *arguments):
        self.folder, self.started = folder, set()
        output = folder / "output.txt"
        self.output_start = output.stat().st_size if output.exists() else 0
        self.process = start(folder, *arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.process.kill()
        self.process.wait()
        for process in self.started:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def printed(self):
        return (self.folder / "output.txt").read_bytes()[self.output_start :].decode()

    def wait(self, is_over, seconds=600):
        deadline = time.monotonic() + seconds
        while not is_over():
            with contextlib.suppress(psutil.Error):
                self.started.update(psutil.Process(self.process.pid).children(recursive=True))
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.02)

    def wait_for(self, phase, rng):
        """Wait for a moment in a phase."""
        text, began = PHASES[phase], time.monotonic()
        if phase == "start":
            seconds = rng.uniform(0.5, 8.0)
            self.wait(lambda: time.monotonic() > began + seconds or events(self.folder))
            return
        if phase == "trials":
            self.wait(lambda: any(event["event"] == "evaluated" for event in events(self.folder)))
        else:
            self.wait(lambda: text in self.printed() or self.process.poll() is not None)
        time.sleep(rng.uniform(0.0, 1.0))

    def end(self, ending):
        """Send the signals of an ending; returns the exit status and the seconds until then."""
        signals, pause, to_group = ENDINGS[ending]
        began = time.monotonic()
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if to_group else os.kill)(self.process.pid, number)
            time.sleep(pause)
        self.wait(lambda: self.process.poll() is not None)
        return self.process.returncode, time.monotonic() - began

    def left_behind(self):
        return left_behind(self.started)


@pytest.fixture(scope="module")
def trials_done(tmp_path_factory):
    """Folder of a sweep that was killed after its last trial, and a copy of it."""
    folder, copy = tmp_path_factory.mktemp("sweep"), tmp_path_factory.mktemp("copy") / "of it"
    with Sweep(folder, *SWEEP, *TRIALS, "--name", "cut") as sweep:
        sweep.wait(lambda: "choosing the finalists" in sweep.printed())
        sweep.process.kill()
        sweep.process.wait()
        assert not sweep.left_behind()
    shutil.copytree(folder, copy)
    return folder, copy


def statuses_in_mlflow(folder):
    """Status of each run; none before there is a database."""
    if not (folder / "mlflow.db").exists():
        return []
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return [status for (status,) in database.execute("SELECT status FROM runs")]


@pytest.mark.parametrize(
    ("phase", "ending"),
    [
        pytest.param(
            phase, ending, marks=[pytest.mark.slow] * ((phase, ending) in SLOW) + [pytest.mark.faults]
        )
        for phase in PHASES
        for ending in ENDINGS
    ],
)
def test_a_sweep_that_is_ended_in_any_phase_leaves_nothing_open_and_goes_on(
    phase, ending, request, tmp_path, rng
):
    folder, arguments = tmp_path, (*SWEEP, *TRIALS, "--name", "cut")
    if phase in AFTER_THE_TRIALS:
        folder, copy = request.getfixturevalue("trials_done")
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        arguments = ("--resume", "--name", "cut")
    directory = folder / "runs" / "cut"
    with Sweep(folder, *arguments) as sweep:
        sweep.wait_for(phase, rng)
        status, seconds = sweep.end(ending)
        alive = sweep.left_behind()
    record = directory / "run.json"
    recorded = json.loads(record.read_text())["status"] if record.exists() else None
    print(f"{phase}, {ending}: status {status} after {seconds:.1f} s, recorded as {recorded}")
    assert not alive, sweep.printed()
    if directory.exists():
        RunLock(directory).release()
    if ending == "SIGKILL":
        assert status == (0 if recorded == "finished" else -signal.SIGKILL)
    else:
        assert status == (0 if recorded == "finished" else STOPPED), sweep.printed()
        assert recorded in (None, "stopped", "finished")
        # The second Ctrl-C leaves for later what MLflow has not been sent, as the first one says.
        is_left = ending == "SIGINT twice" and "could not be sent" in sweep.printed()
        assert is_left or "RUNNING" not in statuses_in_mlflow(folder)
        assert "Traceback" not in sweep.printed()
        assert not list(folder.rglob(".part-*"))
        is_graceful = phase == "trials" and ending != "SIGINT twice"
        assert seconds < (300 if is_graceful else 60), "what it waits for is said, see the sweep's output"
        if is_graceful:
            assert "Ending the trials" in sweep.printed()
            assert (directory / "champion" / "sampler.onnx").exists()
    if recorded != "finished":
        finish(folder, start(folder, *SWEEP, *TRIALS, "--name", "cut", "--start-or-resume"))
    assert_complete(folder, 2)
    assert not list(folder.rglob(".part-*"))


@pytest.mark.faults
@pytest.mark.parametrize("name", ["cut", "other"])
def test_of_two_sweeps_with_one_name_the_second_is_refused_and_two_names_finish(tmp_path, name):
    first = start(tmp_path, *SWEEP, *TRIALS, "--name", "cut")
    deadline = time.monotonic() + 600
    while name == "cut" and not events(tmp_path):
        assert first.poll() is None and time.monotonic() < deadline, output_of(tmp_path)
        time.sleep(0.05)
    second = start(tmp_path, *SWEEP, *TRIALS, "--name", name, *(["--resume"] if name == "cut" else []))
    finish(tmp_path, second, status=2 if name == "cut" else 0)
    finish(tmp_path, first)
    if name == "cut":
        assert "--name cut: another process runs it" in output_of(tmp_path)
        assert_complete(tmp_path, 2)
    else:
        assert statuses_in_mlflow(tmp_path).count("FINISHED") == 6
        assert (tmp_path / "runs" / "other" / "champion" / "sampler.onnx").exists()


@pytest.mark.faults
@pytest.mark.parametrize("phase", ["trials", "registration"])
@pytest.mark.parametrize("fault", ["locked", "deleted", "overwritten"])
def test_a_sweep_whose_database_is_taken_away_ends_with_its_champion_and_is_sent_later(
    tmp_path, rng, fault, phase
):
    path, other = tmp_path / "mlflow.db", None
    with Sweep(tmp_path, *SWEEP, *TRIALS, "--name", "cut") as sweep:
        sweep.wait_for(phase, rng)
        if fault == "locked":
            other = sqlite3.connect(path, isolation_level=None, timeout=60)
            other.execute("BEGIN EXCLUSIVE")
        elif fault == "deleted":
            path.unlink()
        else:
            path.write_bytes(b"nonsense" * 10_000)
        finish(tmp_path, sweep.process)
    printed = sweep.printed()
    assert (tmp_path / "runs" / "cut" / "champion" / "sampler.onnx").exists()
    assert "Traceback" not in printed and len(printed.splitlines()) < 80, printed
    (line,) = [line for line in printed.splitlines() if "could not be sent" in line]
    command = line.partition("this sends them: ")[2].split()
    if other is not None:
        other.close()
    else:
        path.unlink(missing_ok=True)
    result = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=tmp_path,
        env=user_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert_complete(tmp_path, 2)
    assert not (tmp_path / "runs" / "cut" / "tracking").exists()
