"""Trials whose machine is taken away go on from their last checkpoint on another one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workflows.conftest import user_environment

ROOT = Path(__file__).parents[3]
PROGRAM = Path(__file__).with_name("dying_nodes.py")
SWEEP = (
    "--data heart --num-trials 3 --training.num-updates 6000 --training.num-evaluations 4 "
    "--training.checkpoint-minutes 0.02 --metrics.num-samples 200 --metrics.num-examples 128 "
    "--network.hidden-size 16 --search.num-blocks 3 --search.hidden-size 64 --sampler.num-steps 5 "
    "--early-stopping off"
).split()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "workers"), [("dies", 1), ("drained", 1), ("dies", 2)], ids=["dies", "drained", "workers"]
)
def test_a_trial_whose_node_is_taken_away_goes_on_and_is_not_failed(tmp_path, how, workers):
    finished = subprocess.run(
        [sys.executable, PROGRAM, tmp_path, how, *SWEEP, "--workers-per-trial", str(workers)],
        env=user_environment() | {"PYTHONPATH": str(ROOT), "HOME": os.environ["HOME"]},
        capture_output=True,
        text=True,
        timeout=500,
    )
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0 and "a node was taken away" in output, finished.stderr[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("events ")]
    events = json.loads(line.removeprefix("events "))
    begun = [event["trial_id"] for event in events if event["event"] == "begin"]
    ended = {event["trial_id"]: event["status"] for event in events if event["event"] == "end"}
    assert len(begun) == len(set(begun)) == 3 and ended == dict.fromkeys(begun, "finished")
    for trial_id in begun:
        updates = [
            event["updates"]
            for event in events
            if event["event"] == "evaluated" and event["trial_id"] == trial_id
        ]
        assert updates == [1500, 3000, 4500, 6000]
    if workers == 1:
        assert "it goes on" in output
    assert not (tmp_path / "runs" / "spot" / "running").exists()
