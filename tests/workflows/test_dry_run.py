"""A dry run: the chart shows the schedule, and the time is that of the steps that were measured."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.config import ScheduleConfig
from diffusion.data import load_dataset
from diffusion.networks import build_network
from diffusion.presets import preset
from workflows import dry_run
from workflows.dry_run import describe_sweep, describe_training, schedule_chart
from workflows.group import Layout
from workflows.tune_options import UNLIMITED

ALONE = Layout(1, 1, uses_gpus=False)
SCHEDULES = [
    ScheduleConfig(kind=kind, num_train_timesteps=steps)
    for kind in ("linear", "scaled_linear", "cosine", "sigmoid", "constant")
    for steps in (1, 2, 7, 60, 1000)
]


def heights(lines):
    """What the columns of a chart show, read off as a person would: eighths of a row, from the bottom."""
    rows = [line.split("|", 1)[1] for line in lines if "|" in line]
    columns = zip(*rows, strict=True)
    return np.array([sum(" ▁▂▃▄▅▆▇█".index(block) for block in column) for column in columns]) / (
        8 * len(rows)
    )


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda each: f"{each.kind}-{each.num_train_timesteps}")
def test_the_chart_shows_alphas_cumprod_from_the_first_step_to_the_last(config):
    schedule, steps = config.build(), config.num_train_timesteps
    lines = schedule_chart(schedule)
    shown = heights(lines)
    at = np.linspace(0, steps - 1, len(shown)).round().astype(int)
    assert len(shown) == min(60, steps) and (at[0], at[-1]) == (0, steps - 1)
    np.testing.assert_allclose(shown, schedule.alphas_cumprod[at], atol=0.5 / 64 + 1e-12)
    assert (np.diff(shown) <= 0.0).all(), "noise only grows"
    assert all(len(line) <= 110 for line in lines)
    assert "t = 0" in lines[-2] and f"t = {steps - 1}" in lines[-2]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda each: f"{each.kind}-{each.num_train_timesteps}")
def test_the_log_snr_is_given_from_the_first_step_to_the_last(config):
    schedule = config.build()
    pairs = re.findall(r"(-?[\d.]+|-?inf|nan) at (\d+)", schedule_chart(schedule)[-1])
    steps = [int(step) for _, step in pairs]
    assert steps[0] == 0 and steps[-1] == config.num_train_timesteps - 1 and steps == sorted(set(steps))
    for value, step in pairs:
        assert float(value) == pytest.approx(schedule.log_snr[int(step)], abs=0.0051)


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(preset("heart").data)


@pytest.fixture
def config():
    values = {"metrics.num_samples": 20, "metrics.num_examples": 8, "sampler.num_steps": 2}
    return preset("heart").with_values(values | {"training.num_evaluations": 1})


@pytest.fixture
def steps(monkeypatch):
    """Steps of 20 ms; the sizes of their batches."""
    sizes = []

    def step(self, update, x_0, timesteps, noise, labels=None):
        time.sleep(0.02)
        sizes.append(len(x_0))
        assert len(timesteps) == len(noise) == len(x_0)
        return torch.zeros(())

    monkeypatch.setattr(dry_run, "_SECONDS_OF_STEPS", 0.3)
    monkeypatch.setattr(dry_run.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(dry_run.Learner, "step", step)
    return sizes


def test_the_time_is_the_updates_times_that_of_a_measured_step(config, dataset, steps, capsys):
    """20 ms a step, however many are to come; beside them one evaluation, the samples and the start."""
    seconds = []
    for updates in (10, 3000):
        describe_training(config.with_values({"training.num_updates": updates}), dataset, ALONE)
        seconds.append(float(re.search(r"time +about (\d+) s", capsys.readouterr().out)[1]))
    assert seconds[1] - seconds[0] == pytest.approx(2990 * 0.02, rel=0.3)
    assert 0.0 < seconds[0] < 30.0
    assert 6 <= len(steps) <= 100, "a few"


@pytest.mark.parametrize(("workers", "share"), [(1, 256), (2, 128), (3, 86)])
def test_the_steps_are_those_of_one_workers_share(config, dataset, steps, workers, share, capsys):
    describe_training(config, dataset, replace(ALONE, num_workers=workers))
    assert set(steps) == {share}
    assert ("traffic between the workers" in capsys.readouterr().out) == (workers > 1)


def test_what_would_run_is_said(config, dataset, steps, capsys):
    count = sum(weight.numel() for weight in build_network(config, (2,)).parameters())
    describe_training(config, dataset, Layout(2, 3, uses_gpus=False))
    output = capsys.readouterr().out
    for words in (
        "5600 examples of shape [2] for training, 1200 for validation, 1200 for the test",
        f"mlp, {count:,} parameters",
        "10000 updates of 256 examples (457 epochs), fp32, 1 evaluations",
        "2, each on 3 threads",
        "linear, 1000 steps",
        "Nothing was run or written",
    ):
        assert words in output


def test_a_sweep_is_said_to_take_its_trials_in_turns(config, dataset, steps, capsys):
    config = config.with_values({"training.num_updates": 300})
    searched = {"training.learning_rate": (1e-4, 1e-2), "schedule.num_train_timesteps": (50, 100)}
    describe_sweep(config, dataset, ALONE, searched, num_trials=5, at_once=2)
    output = capsys.readouterr().out
    assert "5 trials, 2 at a time" in output
    assert "training.learning_rate: 0.0001 0.01" in output and "num_train_timesteps: 50 100" in output
    longest, one = map(int, re.search(r"at most about (\d+) s.* takes about (\d+) s", output).groups())
    assert one >= 6 and longest == pytest.approx(3 * one, abs=2)


def test_a_sweep_of_a_time_is_said_to_take_that_and_words_are_searched_as_numbers_are(
    config, dataset, steps, capsys
):
    config = config.with_values({"training.num_updates": 300})
    searched = {"schedule.kind": ("linear", "cosine")}
    describe_sweep(config, dataset, ALONE, searched, num_trials=UNLIMITED, at_once=2, seconds=25.0)
    output = capsys.readouterr().out
    assert "as many trials as the time allows" in output and "at most about 25 s" in output
    assert "schedule.kind: linear cosine" in output
