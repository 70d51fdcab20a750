"""`--num-workers 1:2` on machines that come and go: as many workers as have places, and the same model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.data import load_dataset
from diffusion.training import Training

PROGRAM = Path(__file__).with_name("elastic.py")


@pytest.fixture(scope="module", name="expected")
def _expected():
    """The figures of the same training in this process, by one worker."""
    spec = importlib.util.spec_from_file_location("elastic", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    config, reports = program.small_config(), []
    Training(config, load_dataset(config.data), reports.append).run()
    return reports[-1].metrics


@pytest.mark.parametrize(
    ("machine", "sizes"),
    [
        pytest.param("stays", [1, 2], marks=pytest.mark.slow),
        pytest.param("leaves", [1, 2, 1], marks=pytest.mark.faults),
    ],
)
def test_a_group_takes_the_places_there_are_and_trains_the_same_model(expected, tmp_path, machine, sizes):
    """The global batch, the order of the data and the learning rate are those of any number of workers."""
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path, machine],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sizes"] == sizes
    for name in ("val/elbo_window", "train/mse"):
        assert found["metrics"][name] == pytest.approx(expected[name], rel=1e-3)
