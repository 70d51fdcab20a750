import time

import pytest

from benchmarks.budget import train_for, updates_for
from diffusion.data.dataset import load_dataset
from diffusion.presets import preset
from diffusion.training.train_step import TrainStep


@pytest.fixture
def heart():
    config = preset("heart").with_values({"schedule.num_train_timesteps": 20, "sampler.num_steps": 2})
    return config, load_dataset(config.data)


def test_a_budget_pays_for_as_many_updates_as_fit_into_it(heart, monkeypatch):
    """Each takes 10 ms of a clock that only they move."""
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    monkeypatch.setattr(TrainStep, "run", lambda *arguments: clock.__setitem__(0, clock[0] + 0.01))
    assert updates_for(*heart, seconds=3.0) == 300


def test_the_time_of_a_training_is_that_of_its_updates(heart):
    started = time.process_time()
    model, seconds = train_for(*heart, seconds=0.2)
    assert 0.0 < seconds < time.process_time() - started
    assert model.config.training.num_updates > 1 and model.sample(3).shape == (3, 2)
