import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffusion.config import TrainingConfig
from diffusion.training.flat_parameters import FlatParameters
from diffusion.training.weight_averaging import WeightAverage, ema_decay


@pytest.mark.parametrize("num_updates", [1, 10, 30, 100, 2500, 20_000])
@pytest.mark.parametrize("decay", [0.9999, 0.99, 0.0])
def test_the_averaged_weights_forget_the_initial_ones(num_updates, decay):
    """A constant decay of 0.9999 would leave 78% of the initial weights after 2,500 updates."""
    training = TrainingConfig(num_updates=num_updates, ema_decay=decay, num_evaluations=1)
    decays = [ema_decay(training, done) for done in range(num_updates)]
    assert all(0.0 <= value <= decay for value in decays)
    assert decays == sorted(decays)
    initial_fraction = math.prod(decays)
    assert initial_fraction < (0.11 if num_updates == 1 else 1e-3)
    if num_updates == 2500:
        assert math.prod([0.9999] * 2500) == pytest.approx(0.78, abs=0.01)


@pytest.mark.parametrize("num_updates", [40, 1000, 20_000])
def test_the_final_average_reaches_back_over_a_small_part_of_the_training(num_updates):
    """The last quarter of the updates has 99% of the weight, however few updates there are."""
    training = TrainingConfig(num_updates=num_updates, ema_decay=0.9999)
    last_quarter = range(num_updates - num_updates // 4, num_updates)
    assert math.prod(ema_decay(training, done) for done in last_quarter) < 0.01


def test_the_first_averagings_follow_1_plus_n_over_10_plus_n():
    training = TrainingConfig(num_updates=100_000)
    assert [ema_decay(training, done) for done in range(4)] == pytest.approx([1 / 10, 2 / 11, 3 / 12, 4 / 13])


def test_the_average_is_that_of_pytorchs_averaged_model():
    training = TrainingConfig(num_updates=100)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, dtype=torch.float64))
    ours = WeightAverage(network, FlatParameters(network), training)

    def average(averaged, current, num_averaged):
        get_ema_multi_avg_fn(ema_decay(training, int(num_averaged)))(averaged, current, num_averaged)

    theirs = AveragedModel(network, multi_avg_fn=average)
    for _ in range(6):
        with torch.no_grad():
            for value in (*network.parameters(), *network.buffers()):
                value.copy_(torch.randn(value.shape) * 3)
        ours.update()
        theirs.update_parameters(network)
    expected = theirs.module.state_dict()
    assert ours.network.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.network.state_dict().items())
    assert ours.num_averaged == 6
    assert not any(weight.requires_grad for weight in ours.network.parameters())
