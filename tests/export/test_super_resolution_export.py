"""The second model of a cascade through its ONNX file."""

import numpy as np
import pytest
import torch

from diffusion.config import DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.data.sources import open_source
from diffusion.errors import InputError
from diffusion.networks.build import build_network
from diffusion.presets import source_preset
from diffusion.training.checkpoints import TrainedModel
from export.conditions import LOW_RESOLUTION, LOW_RESOLUTION_NOISE
from export.sampler import Sampler
from export.to_onnx import export_onnx
from export.torch_sampler import TorchSampler

VALUES = {
    "network.base_channels": 8, "network.channel_multipliers": (1,), "sampler.num_steps": 4,
    "schedule.num_train_timesteps": 12, "schedule.beta_end": 0.4, "sampler.low_resolution_noise": 0.2,
    "training.augment": 0.1,
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.long)],
    ids=["unconditional", "conditional"],
)
def second(request):
    """A model from 4 to 8 pixels with no weights that are zero, its data and its file."""
    data = DataConfig(name="digits", super_resolution="4:8", conditional=request.param)
    config = source_preset(open_source(data)).with_values(VALUES)
    dataset = load_dataset(config.data)
    torch.manual_seed(0)
    network = build_network(config, dataset.spec.shape, dataset.spec.num_classes).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.add_(0.1 * torch.randn(weight.shape))
    model = TrainedModel(config, dataset.spec, network)
    return model, dataset, export_onnx(model)


def test_whole_trajectories_agree_with_pytorch(second):
    _, _, (_, cases) = second
    assert any("deployed sampler" in case.name for case in cases) and all(case.passed for case in cases)


def test_the_file_takes_the_low_resolution_image_itself(second):
    model, _, (content, _) = second
    spec = Sampler(content, provider="cpu").spec
    assert spec.format_version == "2"
    image, noise = spec.conditions
    assert (image.name, image.shape, image.mean) == (LOW_RESOLUTION, (1, 4, 4), model.data.mean)
    assert (noise.name, noise.shape, noise.mean, noise.std) == (LOW_RESOLUTION_NOISE, (), 0.0, 1.0)
    assert spec.sampler[LOW_RESOLUTION_NOISE] == 0.2


def test_pytorch_and_onnx_runtime_draw_the_same_for_images_of_the_data(second):
    model, dataset, (content, _) = second
    reference, sampler = TorchSampler.of(model, dataset), Sampler(content, provider="cpu")
    conditions = reference.conditions(5)
    assert conditions[LOW_RESOLUTION].shape == (5, 1, 4, 4)
    drawn = sampler.sample(5, conditions=conditions)
    expected = model.data.denormalise(reference.draw(5).samples)
    np.testing.assert_allclose(drawn, expected, atol=1e-4 * np.abs(expected).max())
    fewer = {name: values[:2] for name, values in conditions.items()}
    assert all(np.array_equal(reference.conditions(2)[name], values) for name, values in fewer.items())


def test_a_missing_image_is_explained(second):
    sampler = Sampler(second[2][0], provider="cpu")
    with pytest.raises(InputError, match="this model needs 'low_resolution' .* --then SECOND.onnx"):
        sampler.sample(2)
