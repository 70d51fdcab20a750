import torch

from diffusion.process import generate
from diffusion.process.generate import apply_in_batches


class RecordingNetwork(torch.nn.Module):
    """x + t; it records the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x, t):
        self.sizes.append(len(x))
        return x + t.reshape(-1, 1, 1, 1)


def test_outputs_of_the_batches_are_concatenated_in_order(monkeypatch):
    monkeypatch.setattr(generate, "MAX_VALUES_PER_CPU_BATCH", 4 * 64)
    network, x, t = RecordingNetwork(), torch.randn(11, 1, 8, 8), torch.arange(11)
    assert torch.equal(apply_in_batches(network, x, t), x + t.reshape(-1, 1, 1, 1))
    assert network.sizes == [4, 4, 3]


def test_examples_larger_than_the_limit_are_computed_one_at_a_time(monkeypatch):
    monkeypatch.setattr(generate, "MAX_VALUES_PER_CPU_BATCH", 10)
    network, x = RecordingNetwork(), torch.randn(3, 1, 8, 8)
    apply_in_batches(network, x, torch.zeros(3, dtype=torch.int64))
    assert network.sizes == [1, 1, 1]


def test_a_small_batch_is_one_call():
    network, x = RecordingNetwork(), torch.randn(100, 1, 28, 28)
    apply_in_batches(network, x, torch.zeros(100, dtype=torch.int64))
    assert network.sizes == [100]
