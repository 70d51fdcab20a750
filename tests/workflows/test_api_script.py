"""The API in a fresh process, as a program uses it: no main guard, its own Ray, Ctrl-C during a sweep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.workflows.conftest import user_environment

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
# Ray is imported first, as a program may. The data set's class exists in this script only.
SCRIPT = """
import json, os, signal, threading, time
from pathlib import Path
import ray
import numpy as np
import torch
from workflows import run_sweep

class Ring(torch.utils.data.Dataset):
    def __len__(self):
        return 300

    def __getitem__(self, index):
        angle = 0.1 * index
        return torch.tensor([np.cos(angle), np.sin(angle)])

def interrupt():
    while len(list(Path("runs/ring").glob("trials/*/samples.png"))) < 2:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
handler = signal.getsignal(signal.SIGINT)
result = run_sweep(
    Ring(), name="ring", num_trials=50,
    training={"num_updates": 20000, "num_evaluations": 1000, "batch_size": 16},
    network={"hidden_size": 16, "num_blocks": 1}, sampler={"num_steps": 5},
    metrics={"num_samples": 40, "num_examples": 40},
)
print(json.dumps({
    "interrupted": result.interrupted, "trials": len(result.trials), "drawn": result.sampler.sample(7).shape,
    "ray": ray.is_initialized(), "handler": signal.getsignal(signal.SIGINT) is handler,
    "champion": result.champion.trial_id in set(result.trials["trial_id"]),
}))
"""


def test_ctrl_c_ends_a_sweep_with_its_best_model_and_leaves_nothing_behind(tmp_path):
    environment = user_environment()
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, output + errors
    assert "Traceback" not in errors and "Interrupted after" in output and "\x1b" not in output
    facts = json.loads(output.splitlines()[-1])
    assert facts.pop("trials") < 50
    assert facts == {"interrupted": True, "drawn": [7, 2], "ray": False, "handler": True, "champion": True}
    left = [each for each in psutil.process_iter() if _session_of(each) == process.pid]
    _, alive = psutil.wait_procs(left, timeout=120)
    assert not alive, "Ray's processes"


def _session_of(process):
    try:
        return os.getsid(process.pid)
    except OSError:
        return None
