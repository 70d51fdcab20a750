"""Sweeps whose folder is in a bucket, which outlives the machine that they run on."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from export.sampler import Sampler
from tests.workflows.conftest import user_environment
from workflows.results import SweepResult
from workflows.storage.storage import Storage

ROOT = Path(__file__).parents[3]
SMALL = (
    "--data heart --training.num-updates 600 --training.num-evaluations 2 --metrics.num-samples 200 "
    "--network.hidden-size 32 --sampler.num-steps 10 --num-trials 3 --name first --final-epochs 1"
).split()


def start(folder, home, *arguments):
    """Start a sweep on a machine with this home directory."""
    environment = user_environment() | {"PYTHONPATH": str(ROOT), "HOME": str(home)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": ""}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    home.mkdir(exist_ok=True)
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "workflows" / "tune.py"), *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def ends(storage):
    """IDs of the trials that have ended according to the journal in the bucket."""
    lines = (storage.read_text("journal.jsonl") or "").splitlines()
    return [event["trial_id"] for event in map(json.loads, lines) if event["event"] == "end"]


@pytest.mark.slow
def test_another_machine_goes_on_with_a_sweep_whose_machine_was_lost(s3, tmp_path):
    uri = f"s3://{s3}/some"
    storage, place = Storage(uri).child("first"), ["--output-dir", uri]
    process = start(tmp_path, tmp_path / "lost", *SMALL, *place)
    try:
        deadline = time.monotonic() + 600
        while not ends(storage):
            assert process.poll() is None and time.monotonic() < deadline, (
                tmp_path / "output.txt"
            ).read_text()
            time.sleep(0.2)
        process.kill()
        process.wait()
        before = ends(storage)
        process = start(tmp_path, tmp_path / "new", "--resume", "--name", "first", *place)
        status = process.wait(600)
    finally:
        process.kill()
        process.wait()
    output = (tmp_path / "output.txt").read_text()
    assert status == 0 and "Traceback" not in output, output
    assert f"{uri}/first/champion" in output and ".cache" not in output
    table = pd.read_csv(io.StringIO(storage.read_text("trials.csv")))
    assert len(table) == 3 and table["trial_id"].is_unique
    assert all(ends(storage).count(trial_id) == 1 for trial_id in before), "a finished trial never runs again"
    for trial_id in table["trial_id"]:
        assert storage.exists(f"trials/{trial_id}/model.safetensors")
    for name in ("tune", "final", "running"):
        assert not storage.exists(name)
    result = SweepResult.load(f"{uri}/first")
    assert result.status == "finished" and len(result.trials) == 3
    assert Sampler(result.model_dir / "sampler.onnx").sample(4).shape == (4, 2)
    result._download.cleanup()
    assert not list((tmp_path / "new").rglob("model.safetensors")), "the working copy is removed at the end"
