"""`--num-workers 1:2` on machines that come and go: the number of workers changes, the model does not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.data.dataset import load_dataset
from diffusion.training.loop import Training

ROOT = Path(__file__).parents[3]
PROGRAM = Path(__file__).with_name("elastic.py")


@pytest.fixture(scope="module", name="expected")
def _expected():
    """Final metrics of the same training with one worker, in this process."""
    spec = importlib.util.spec_from_file_location("elastic", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    config, results = program.small_config(), []
    Training(config, load_dataset(config.data), results.append).run()
    return results[-1].metrics


@pytest.mark.faults
@pytest.mark.parametrize(
    ("second_machine", "sizes"),
    [("stays", [1, 2]), ("leaves", [1, 2, 1])],
)
def test_an_elastic_group_uses_the_machines_there_are_and_trains_the_same_model(
    expected, tmp_path, second_machine, sizes
):
    """The batches, the order of the data and the learning rate do not depend on the number of workers."""
    finished = subprocess.run(
        [sys.executable, PROGRAM, tmp_path, second_machine],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    output = json.loads(finished.stdout.splitlines()[-1])
    assert output["sizes"] == sizes
    for name in ("val/elbo_window", "train/mse"):
        assert output["metrics"][name] == pytest.approx(expected[name], rel=1e-3)
