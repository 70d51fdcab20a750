"""A sweep whose driver is killed at any moment, and gone on with: nothing lost, nothing twice."""

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

ROOT = Path(__file__).parents[2]
NUM_TRIALS, UPDATES = 4, 1200
SWEEP = (
    f"--data heart --num-trials {NUM_TRIALS} --training.num-updates {UPDATES} --training.num-evaluations 4 "
    "--metrics.num-samples 200 --metrics.num-examples 128 --network.hidden-size 16 --sampler.num-steps 5"
).split()

pytestmark = pytest.mark.slow


def start(folder, *arguments):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "RAY"))
    }
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "workflows" / "tune.py"), *arguments],
            cwd=folder,
            env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def said(folder):
    return (folder / "output.txt").read_text()


def events(folder):
    path = folder / "runs" / "cut" / "journal.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def finish(folder, process, seconds=240):
    try:
        assert process.wait(seconds) == 0, said(folder)
    finally:
        process.kill()
        process.wait()


def assert_whole(folder, num_trials=NUM_TRIALS):
    """Every trial once, in the records, in the table and in MLflow, with each of its steps once."""
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
        each = UPDATES // 4
        assert [entry.step for entry in history] == list(range(each, row["updates"] + 1, each)), trial_id
        assert history[-1].value == pytest.approx(row["objective"])
        assert (directory / "trials" / trial_id / "model.safetensors").exists()
    versions = client.search_model_versions("name = 'ray-ddpm-heart'")
    assert len(versions) == 1 and versions[0].run_id == parent.info.run_id
    assert client.get_model_version_by_alias("ray-ddpm-heart", "champion").version == versions[0].version
    assert (directory / "champion" / "sampler.onnx").exists() and not (directory / "tune").exists()
    assert "Traceback" not in said(folder)


@pytest.fixture
def moments():
    """The seed is told where a test fails, so that it can be run again."""
    seed = int(os.environ.get("FAULTS_SEED", time.time_ns() % 10**6))
    print(f"FAULTS_SEED={seed}")
    return random.Random(seed)


def test_a_driver_killed_again_and_again_repeats_no_finished_trial(tmp_path, moments):
    kills, ended = 0, {}
    process = start(tmp_path, *SWEEP, "--name", "cut")
    try:
        while kills < 2:
            seen = len(events(tmp_path))
            deadline = time.monotonic() + 120
            wanted = seen + moments.randint(1, 6)
            while len(events(tmp_path)) < wanted and process.poll() is None:
                assert time.monotonic() < deadline, said(tmp_path)
                time.sleep(0.02)
            time.sleep(moments.uniform(0.0, 0.5))
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            kills += 1
            for event in events(tmp_path):
                if event["event"] == "end" and event["status"] in ("finished", "stopped"):
                    ended.setdefault(event["trial_id"], event)
            process = start(tmp_path, "--resume", "--name", "cut")
    finally:
        if sys.exc_info()[0]:
            process.kill()
    finish(tmp_path, process)
    assert kills >= 1
    assert_whole(tmp_path)
    for trial_id, first_end in ended.items():
        of_trial = [event for event in events(tmp_path) if event["trial_id"] == trial_id]
        assert of_trial[-1] == first_end, "nothing happened to a trial that was over"


def test_an_interrupted_sweep_gives_the_best_so_far_and_can_be_gone_on_with(tmp_path):
    process = start(tmp_path, *SWEEP, "--name", "cut")
    deadline = time.monotonic() + 120
    while sum(event["event"] == "end" for event in events(tmp_path)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, said(tmp_path)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    finish(tmp_path, process)
    assert re.search(rf"Interrupted after \d of {NUM_TRIALS} trials", said(tmp_path))
    assert (tmp_path / "runs" / "cut" / "champion" / "sampler.onnx").exists()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert not client.get_registered_model("ray-ddpm-heart").aliases
    runs = client.search_runs([client.get_experiment_by_name("heart").experiment_id])
    statuses = {run.info.run_name: run.info.status for run in runs}
    assert statuses.pop("cut") == "KILLED" and "RUNNING" not in statuses.values()
    finish(tmp_path, start(tmp_path, "--resume"))
    assert_whole(tmp_path)
    again = start(tmp_path, "--resume")
    assert again.wait(60) == 2 and "no unfinished run of tune.py" in said(tmp_path)


def test_a_sweep_killed_before_its_first_trial_starts_afresh_under_the_same_run(tmp_path):
    process = start(tmp_path, *SWEEP, "--num-trials", "2", "--name", "cut")
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs" / "cut").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    record = tmp_path / "runs" / "cut" / "run.json"
    if not record.exists():  # else the kill came after it was written, which is as good
        assert not events(tmp_path)
    finish(tmp_path, start(tmp_path, *SWEEP, "--num-trials", "2", "--name", "cut", "--resume"))
    assert_whole(tmp_path, 2)
