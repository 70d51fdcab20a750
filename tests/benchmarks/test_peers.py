"""The peers have the settings that the comparisons claim."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.comparisons import heart, mnist_mlp, unet_training
from benchmarks.peers import diffusers_sampling, diffusers_training, tutorial
from benchmarks.training_data import COLOUR_32, GREY_28
from diffusion.config import Config, DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.networks.build import build_network


def num_parameters(network):
    return sum(weight.numel() for weight in network.parameters())


def test_the_tutorial_has_its_settings():
    settings = tutorial.HEART
    assert (settings.num_train_timesteps, settings.beta_start, settings.beta_end) == (200, 1e-4, 0.02)
    assert (settings.batch_size, settings.learning_rate, settings.max_gradient_norm) == (32, 1e-3, 1.0)
    assert (settings.embedding_size, settings.embedding_scale) == (32, 25.0)
    assert (settings.hidden_size, settings.num_blocks) == (32, 1)
    assert (tutorial.MNIST.hidden_size, tutorial.MNIST.num_blocks, tutorial.MNIST.batch_size) == (
        2048,
        5,
        128,
    )
    loop = tutorial.Loop(torch.zeros(64, 2), settings, 10, embedded=True, seed=0, as_its_script=True)
    names = [type(layer).__name__ for layer in loop.network.layers]
    assert names == ["Linear", "GELU", "Block", "LayerNorm", "Linear"]
    assert isinstance(loop.optimizer, torch.optim.AdamW) and not loop.optimizer.param_groups[0]["fused"]
    rates = []
    for _ in range(10):
        rates.append(loop.optimizer.param_groups[0]["lr"])
        loop.run(1)
    assert rates == pytest.approx(1e-3 * (1.0 - np.arange(10) / 10))
    assert loop.optimizer.param_groups[0]["lr"] == 0.0 and len(loop.losses) == 10


def test_the_tutorial_trains_on_our_points():
    dataset = load_dataset(DataConfig(name="heart"))
    ours = np.concatenate([dataset.raw(split[:]) for split in (dataset.train, dataset.val, dataset.test)])
    theirs = tutorial.heart_points()
    assert np.allclose(np.sort(ours, axis=0), np.sort(theirs, axis=0), atol=1e-5)


def test_both_loops_of_the_tutorial_do_the_same():
    """Whatever is logged: their losses fall alike on the same points."""
    x_0 = torch.from_numpy(tutorial.heart_points()).float()
    losses = []
    for as_its_script in (True, False):
        loop = tutorial.Loop(x_0, tutorial.HEART, 200, embedded=True, seed=0, as_its_script=as_its_script)
        loop.run(200)
        noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        timesteps = torch.arange(2000) % 200
        level = loop.alphas_cumprod[timesteps][:, None]
        x_t = level.sqrt() * x_0[:2000] + (1.0 - level).sqrt() * noise
        losses.append((loop.network(x_t, timesteps) - noise).square().mean().item())
    assert max(losses) < 0.9 and losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize(
    ("values", "shape", "settings"),
    [
        (heart.VALUES | {"network.raw_coordinates": False}, (2,), tutorial.HEART),
        (mnist_mlp.VALUES, (1, 28, 28), tutorial.MNIST),
    ],
)
def test_our_mlp_is_the_tutorials(values, shape, settings):
    with torch.device("meta"):
        ours = build_network(Config().with_values(values), shape)
        theirs = tutorial.TutorialMLP(int(np.prod(shape)), settings, embedded=len(shape) == 1)
    assert num_parameters(ours) == num_parameters(theirs)


@pytest.mark.parametrize(("data", "shape"), [(GREY_28, (1, 28, 28)), (COLOUR_32, (3, 32, 32))])
def test_both_unets_have_equal_parameters_and_flops_and_ours_has_not_fewer(data, shape):
    ours = build_network(Config().with_values(unet_training.values(data, "fp32")), shape)
    theirs = diffusers_training.unet(shape, unet_training.BASE_CHANNELS[data], unet_training.MULTIPLIERS)
    flops = []
    for network in (ours, theirs):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long))
        flops.append(counter.get_total_flops())
    assert 1.0 <= num_parameters(ours) / num_parameters(theirs) < 1.02
    assert 1.0 <= flops[0] / flops[1] < 1.021


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_diffusers_pipelines_draw_in_bf16_too(sampler):
    figures = diffusers_sampling.sample(sampler, num_steps=2, batch_size=2, bf16=True)()
    assert figures["samples/s"] > 0.0
