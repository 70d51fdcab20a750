"""Sweeps whose driver is killed at a random moment and resumed: no trial is lost or run twice."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from tests.workflows.conftest import user_environment

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


def finish(folder, process, seconds=900):
    try:
        assert process.wait(seconds) == 0, output_of(folder)
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
    finish(tmp_path, process)
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
