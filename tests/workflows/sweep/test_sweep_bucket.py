"""A sweep on a cluster whose trials upload their models to a bucket."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from workflows.storage.storage import Storage

ROOT = Path(__file__).parents[3]
SMALL = (
    "--data heart --training.num-updates 200 --training.num-evaluations 2 --metrics.num-samples 200 "
    "--network.hidden-size 32 --sampler.num-steps 10 --num-trials 3 --name first --final-epochs 1"
).split()


@pytest.mark.slow
def test_a_sweep_with_a_bucket_needs_no_shared_folder(s3, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "RAY_DDPM_STORAGE": f"s3://{s3}/some"}
    command = [sys.executable, str(ROOT / "workflows" / "tune.py"), *SMALL]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "runs" / "first"  # on the head node
    assert (folder / "champion" / "sampler.onnx").exists()
    for trial_id in pd.read_csv(folder / "trials.csv")["trial_id"]:
        assert (folder / "trials" / trial_id / "model.safetensors").exists()
    assert not (folder / "tune").exists() and not (folder / "final").exists()
    assert Storage(f"s3://{s3}/some/first").names() == []
