import torch

from diffusion import portions
from diffusion.portions import in_portions


class Counting(torch.nn.Module):
    """x + t, and the sizes of the batches it saw."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x, t):
        self.sizes.append(len(x))
        return x + t.reshape(-1, 1, 1, 1)


def test_portions_are_put_together_as_they_were(monkeypatch):
    monkeypatch.setattr(portions, "_VALUES_AT_ONCE", 4 * 64)
    network, x, t = Counting(), torch.randn(11, 1, 8, 8), torch.arange(11)
    assert torch.equal(in_portions(network, x, t), x + t.reshape(-1, 1, 1, 1))
    assert network.sizes == [4, 4, 3]


def test_what_is_larger_than_a_portion_goes_alone(monkeypatch):
    monkeypatch.setattr(portions, "_VALUES_AT_ONCE", 10)
    network, x = Counting(), torch.randn(3, 1, 8, 8)
    in_portions(network, x, torch.zeros(3, dtype=torch.int64))
    assert network.sizes == [1, 1, 1]


def test_a_small_batch_is_one_call():
    network, x = Counting(), torch.randn(100, 1, 28, 28)
    in_portions(network, x, torch.zeros(100, dtype=torch.int64))
    assert network.sizes == [100]
