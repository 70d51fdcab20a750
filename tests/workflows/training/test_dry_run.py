"""--dry-run: the chart shows the schedule, and the estimated time follows from the measured steps."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.config import ScheduleConfig
from diffusion.data.dataset import load_dataset
from diffusion.networks.build import build_network
from diffusion.presets import preset
from workflows.cli.tune_options import UNLIMITED
from workflows.data.load import LoadedData
from workflows.training import dry_run
from workflows.training.dry_run import describe_sweep, describe_training, schedule_chart
from workflows.training.worker_group import WorkerResources

pytestmark = pytest.mark.usefixtures("small_reference")

ONE_WORKER = WorkerResources(1, 1, uses_gpus=False)
SCHEDULES = [
    ScheduleConfig(kind=kind, num_train_timesteps=num_train_timesteps)
    for kind in ("linear", "scaled_linear", "cosine", "sigmoid", "constant")
    for num_train_timesteps in (1, 2, 7, 60, 1000)
]


def heights(lines):
    """Heights of a chart's columns from 0 to 1, each made of blocks of up to eight eighths of a row."""
    rows = [line.split("|", 1)[1] for line in lines if "|" in line]
    columns = zip(*rows, strict=True)
    return np.array([sum(" ▁▂▃▄▅▆▇█".index(block) for block in column) for column in columns]) / (
        8 * len(rows)
    )


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda each: f"{each.kind}-{each.num_train_timesteps}")
def test_the_chart_shows_alphas_cumprod_from_the_first_timestep_to_the_last(config):
    schedule, num_train_timesteps = config.build(), config.num_train_timesteps
    lines = schedule_chart(schedule)
    shown = heights(lines)
    timesteps = np.linspace(0, num_train_timesteps - 1, len(shown)).round().astype(int)
    assert len(shown) == min(60, num_train_timesteps)
    assert (timesteps[0], timesteps[-1]) == (0, num_train_timesteps - 1)
    np.testing.assert_allclose(shown, schedule.alphas_cumprod[timesteps], atol=0.5 / 64 + 1e-12)
    assert (np.diff(shown) <= 0.0).all(), "noise only grows"
    assert all(len(line) <= 110 for line in lines)
    assert "t = 0" in lines[-2] and f"t = {num_train_timesteps - 1}" in lines[-2]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda each: f"{each.kind}-{each.num_train_timesteps}")
def test_the_log_snr_is_listed_from_the_first_timestep_to_the_last(config):
    schedule = config.build()
    pairs = re.findall(r"(-?[\d.]+|-?inf|nan) at (\d+)", schedule_chart(schedule)[-1])
    timesteps = [int(t) for _, t in pairs]
    assert timesteps[0] == 0 and timesteps[-1] == config.num_train_timesteps - 1
    assert timesteps == sorted(set(timesteps))
    for value, t in pairs:
        assert float(value) == pytest.approx(schedule.log_snr[int(t)], abs=0.0051)


@pytest.fixture(scope="module")
def data():
    return LoadedData(load_dataset(preset("heart").data))


@pytest.fixture
def config():
    values = {"metrics.num_samples": 20, "metrics.num_examples": 8, "sampler.num_steps": 2}
    return preset("heart").with_values(values | {"training.num_evaluations": 1})


@pytest.fixture
def batch_sizes(monkeypatch):
    """Make a training step take 20 ms, and list the batch size of each."""
    sizes = []

    def run(self, update, x_0, timesteps, noise, inputs):
        time.sleep(0.02)
        sizes.append(len(x_0))
        assert len(timesteps) == len(noise) == len(x_0)
        return torch.zeros(())

    monkeypatch.setattr(dry_run, "SECONDS_OF_STEPS", 0.3)
    monkeypatch.setattr(dry_run.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(dry_run.TrainStep, "run", run)
    return sizes


def test_the_time_grows_by_a_measured_step_per_update(config, data, batch_sizes, capsys):
    """20 ms per update, plus a constant for one evaluation, the samples and the start of the workers."""
    seconds = []
    for updates in (10, 3000):
        describe_training(config.with_values({"training.num_updates": updates}), data, ONE_WORKER)
        seconds.append(float(re.search(r"time +about (\d+) s", capsys.readouterr().out)[1]))
    assert seconds[1] - seconds[0] == pytest.approx(2990 * 0.02, rel=0.3)
    assert 0.0 < seconds[0] < 30.0
    assert 6 <= len(batch_sizes) <= 100, "only a few steps were measured"


@pytest.mark.parametrize(("num_workers", "batch_size"), [(1, 256), (2, 128), (3, 86)])
def test_the_steps_use_one_workers_part_of_the_batch(
    config, data, batch_sizes, num_workers, batch_size, capsys
):
    describe_training(config, data, replace(ONE_WORKER, num_workers=num_workers))
    assert set(batch_sizes) == {batch_size}
    assert ("communication between workers" in capsys.readouterr().out) == (num_workers > 1)


def test_the_output_describes_what_would_run(config, data, batch_sizes, capsys):
    num_parameters = sum(weight.numel() for weight in build_network(config, (2,)).parameters())
    describe_training(config, data, WorkerResources(2, 3, uses_gpus=False))
    output = capsys.readouterr().out
    for words in (
        "5600 examples of shape [2] for training, 1200 for validation, 1200 for testing",
        f"mlp, {num_parameters:,} parameters",
        "10000 updates of 256 examples (457 epochs), fp32, 1 evaluations",
        "2, each with 3 CPU threads",
        "linear, 1000 timesteps",
        "Nothing was run or written",
    ):
        assert words in output


def test_a_sweep_takes_as_long_as_its_rounds_of_concurrent_trials(config, data, batch_sizes, capsys):
    config = config.with_values({"training.num_updates": 300})
    searched = {"training.learning_rate": (1e-4, 1e-2), "schedule.num_train_timesteps": (50, 100)}
    describe_sweep(config, data, ONE_WORKER, searched, num_trials=5, max_concurrent=2)
    output = capsys.readouterr().out
    assert "5 trials, 2 at a time" in output
    assert "training.learning_rate: 0.0001 0.01" in output and "num_train_timesteps: 50 100" in output
    total, trial = map(int, re.search(r"at most about (\d+) s.* takes about (\d+) s", output).groups())
    assert trial >= 6 and total == pytest.approx(3 * trial, abs=2)


def test_a_sweep_with_a_time_budget_takes_at_most_that_time(config, data, batch_sizes, capsys):
    config = config.with_values({"training.num_updates": 300})
    searched = {"schedule.kind": ("linear", "cosine")}
    describe_sweep(config, data, ONE_WORKER, searched, num_trials=UNLIMITED, max_concurrent=2, seconds=25.0)
    output = capsys.readouterr().out
    assert "as many trials as the time allows" in output and "at most about 25 s" in output
    assert "schedule.kind: linear cosine" in output
