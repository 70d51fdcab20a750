"""PyTorch's counterpart of the exported sampler, against what training and sweeps sample with."""

import numpy as np
import pytest
import torch

from diffusion.process.generate import cycling_condition, sample_states
from export.noise import normal_noise
from export.torch_sampler import TorchSampler

COUNT = 5


def assert_states_are_those_of_production(model, scale):
    """Every state is, to the last bit, that of `diffusion.process.generate` from the noise of seed 0."""

    def noise(row):
        return torch.from_numpy(normal_noise(0, np.arange(COUNT), row + 1, model.data.shape))

    condition = cycling_condition(COUNT, model.data.num_classes, scale)
    states = sample_states(model.network, model.table, noise(-1), noise, condition)
    expected = [noise(-1), *(x for x, _ in states)]
    actual = list(TorchSampler.of(model).states(COUNT, guidance_scale=scale))
    assert len(actual) == len(expected) == model.table.num_rows + 1
    for own, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(own, theirs.numpy())


@pytest.mark.parametrize("kind", ["image", "points"])
def test_the_states_are_those_of_production(image_model, point_model, kind):
    assert_states_are_those_of_production(image_model if kind == "image" else point_model, 1.0)


def test_large_batches_are_split(image_model, monkeypatch):
    """The network sees at most two samples at a time, and the outputs are the same."""
    whole = list(TorchSampler.of(image_model).states(COUNT))
    monkeypatch.setattr("export.torch_sampler.MAX_VALUES_PER_CPU_BATCH", 2 * 64)
    sizes = []
    handle = image_model.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        split = list(TorchSampler.of(image_model).states(COUNT))
    finally:
        handle.remove()
    assert set(sizes) == {1, 2}
    np.testing.assert_allclose(split[-1], whole[-1], rtol=0, atol=1e-4)
