"""A cascade from the commands of its page: two trainings, one on two workers, and the chain of the files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion.training.checkpoints import TrainedModel
from export.cascade import Cascade
from export.sampler import Sampler
from tests.workflows.training.test_run_training import ROOT, train

pytestmark = pytest.mark.slow

SMALL = (
    "--data digits --schedule.num-train-timesteps 20 --schedule.beta-end 0.5 --training.num-updates 20 "
    "--training.num-evaluations 2 --training.batch-size 16 --metrics.num-samples 40 "
    "--metrics.num-examples 32 "
    "--metrics.features random --sampler.num-steps 5 --tracking-uri sqlite:///mlflow.db"
).split()
SECOND = (
    "--super-resolution 4:8 --training.augment 0.2 --network.base-channels 8 --network.channel-multipliers 1 "
    "--num-workers 2 --name second"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    for arguments in (["--image-size", "4", "--network.hidden-size", "16", "--name", "low"], SECOND):
        result, _ = train(folder, *SMALL, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "--then runs/second/model/sampler.onnx" in result.stdout
    return folder


def test_both_files_passed_parity_and_make_a_cascade(folder):
    files = [folder / "runs" / name / "model" / "sampler.onnx" for name in ("low", "second")]
    for file in files:
        assert json.loads((file.parent / "parity.json").read_text())["passed"]
    model = TrainedModel.load(files[1].parent)
    assert model.config.data.super_resolution == "4:8" and model.config.training.augment == 0.2
    samples = Cascade([Sampler(file, provider="cpu") for file in files]).sample(6, seed=1)
    assert samples.shape == (6, 1, 8, 8) and samples.min() >= 0.0 and samples.max() <= 16.0


def test_the_commands_of_the_page_work(folder):
    chain = ["export.sampler", "runs/low/model/sampler.onnx", "--then", "runs/second/model/sampler.onnx"]
    register = ["workflows.register", "runs/low", "runs/second", "--experiment", "digits-cascade"]
    for command in (
        [*chain, "--num-samples", "6", "--seed", "1", "--output", "grid.npy"],
        [*register, "--tracking-uri", "sqlite:///mlflow.db"],
    ):
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=folder, env={"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
    assert "models:/ray-ddpm-digits-cascade/1: 2 models" in result.stdout
    samplers = [Sampler(Path(folder, chain[index]), provider="cpu") for index in (1, 3)]
    np.testing.assert_allclose(
        np.load(folder / "grid.npy"), Cascade(samplers).sample(6, seed=1), rtol=0, atol=1e-3
    )


def test_a_finished_second_training_says_so_when_it_is_resumed(folder):
    result, _ = train(folder, *SMALL, *SECOND, "--resume")
    assert result.returncode == 0 and "is finished" in result.stdout, result.stdout + result.stderr
