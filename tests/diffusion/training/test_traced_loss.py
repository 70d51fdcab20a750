import pytest
import torch
from torch import nn

from diffusion.registry import NETWORKS
from diffusion.training import train_step
from diffusion.training.distributed import DistributedContext
from diffusion.training.loop import Training
from diffusion.training.train_step import TrainStep

UPDATES = 100


def trained(config, dataset, *, traced, monkeypatch):
    """Weights, averaged weights and history after `UPDATES` updates, recorded or not."""
    monkeypatch.setattr(train_step, "_MIN_TRACED_UPDATES", 0 if traced else 10**9)
    training = Training(config, dataset, lambda result: None)
    training.run()
    assert (training.train_step._traced is not None) == traced
    return training.train_step.network.state_dict(), training.model.network.state_dict(), training.history


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"network.dropout": 0.2, "network.prediction_type": "v_prediction", "training.weighting": "min_snr"},
        {"training.timestep_sampling": "importance", "training.loss": "huber"},
    ],
)
def test_a_recorded_update_is_that_of_autograd_bit_for_bit(
    small_config, gaussian_dataset, settings, monkeypatch
):
    config = small_config(training={"num_updates": UPDATES, "num_evaluations": 1}).with_values(settings)
    dataset = gaussian_dataset(num_train=64, num_val=16)
    plain, fast = (
        trained(config, dataset, traced=traced, monkeypatch=monkeypatch) for traced in (False, True)
    )
    for one, other in zip(plain[:2], fast[:2], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert plain[2][0]["metrics"]["train/mse"] == fast[2][0]["metrics"]["train/mse"]


class Doubles(nn.Module):
    """A network of which Python decides what it computes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, t):
        return self.layer(x) * (2.0 if float(x.sum()) > 0.0 else 1.0)


def test_a_network_that_does_not_say_that_its_operations_are_the_same_is_not_recorded(
    small_config, monkeypatch
):
    monkeypatch.setitem(NETWORKS._loaded, "mlp", lambda config, shape, num_classes: Doubles())
    monkeypatch.setattr(train_step, "_MIN_TRACED_UPDATES", 0)
    config = small_config(training={"batch_size": 16, "num_updates": 10})
    step = TrainStep(config, (2,), DistributedContext(0, 1, torch.device("cpu")))
    x_0, noise = torch.randn(2, 16, 2)
    mse = step.run(0, x_0, torch.zeros(16, dtype=torch.int64), noise)
    assert step._traced is None
    assert mse > 0.0
