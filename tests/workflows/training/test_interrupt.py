"""A sweep that receives SIGTERM closes every run and keeps its results, as after Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.faults


def test_a_sweep_that_receives_sigterm_keeps_the_best_so_far(tmp_path):
    command = [sys.executable, str(ROOT / "workflows" / "tune.py"), "--data", "heart", "--name", "cut"]
    command += ["--num-trials", "8", "--training.num-updates", "20000", "--metrics.num-samples", "500"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 600
        while len(list(tmp_path.glob("runs/cut/trials/*/samples.png"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, output + errors
    assert "Traceback" not in errors and "Interrupted after" in output
    table = pd.read_csv(tmp_path / "runs" / "cut" / "trials.csv")
    assert set(table["status"]) <= {"stopped", "failed"} and "stopped" in set(table["status"])
    assert (tmp_path / "runs" / "cut" / "champion" / "sampler.onnx").exists()

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("heart")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + len(table)
    assert "RUNNING" not in {run.info.status for run in runs}
    (parent,) = [run for run in runs if run.info.run_name == "cut"]
    assert parent.info.status == "KILLED"
    assert not client.get_registered_model("ray-ddpm-heart").aliases
