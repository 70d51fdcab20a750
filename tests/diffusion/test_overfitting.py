"""Each network learns data whose exact denoiser is known, down to the error that this one has."""

import dataclasses

import pytest
import torch

from diffusion.data import Dataset, Examples
from diffusion.evaluation import Evaluator
from diffusion.training import Training
from tests.diffusion.conftest import GaussianDenoiser, MixtureDenoiser, make_gaussian_dataset

UNET = {"kind": "unet", "base_channels": 8, "channel_multipliers": (1, 2), "time_embedding_size": 16}
MLP = {"hidden_size": 64, "num_blocks": 2, "time_embedding_size": 16, "data_embedding_scale": 1.0}
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def dataset_of(train, val):
    spec = make_gaussian_dataset(dim=train.shape[1]).spec
    if train.ndim == 4:
        spec = dataclasses.replace(
            spec,
            kind="image",
            shape=tuple(train.shape[1:]),
            mean=[[[0.0]]],
            std=[[[1.0]]],
            range=(-6.0, 6.0),
        )
    return Dataset(spec, *map(Examples, (train, val, val)))


def errors(config, dataset, exact):
    """val/mse of the exact denoiser and of one trained by `config`, on the same noise."""
    evaluator, reports = Evaluator(config, dataset), []
    floor, _ = evaluator.held_out_losses(exact(evaluator.schedule))
    Training(config, dataset, reports.append).run()
    return floor["val/mse"], reports[-1].metrics["val/mse"]


def points(*rows):
    """The exact denoiser of so many points, equally likely."""
    flat = torch.stack([row.flatten() for row in rows]).double()
    weights, size = torch.full((len(rows),), 1.0 / len(rows)), flat.shape[1]
    return lambda schedule: MixtureDenoiser(schedule, weights, flat, torch.zeros(size, size))


@pytest.mark.parametrize(
    ("network", "training", "x_0", "tolerance"),
    [
        (MLP, {"num_updates": 800, "batch_size": 128}, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), 0.005),
        (MLP, {"num_updates": 800, "batch_size": 128}, torch.tensor([[0.7, -1.2]]), 0.001),
        (UNET, {"num_updates": 200, "batch_size": 32, "learning_rate": 1e-2}, IMAGES, 0.04),
    ],
    ids=["mlp, two points", "mlp, one point", "unet, two images"],
)
def test_one_or_two_examples_are_learned_by_heart(small_config, network, training, x_0, tolerance):
    """One leaves no doubt about its noise: the floor is 0. Two do where the noise is as large as what they
    differ by. A network that predicts nothing is 1 off."""
    config = small_config(
        network=network,
        training={"learning_rate": 5e-3, "num_evaluations": 1} | training,
        metrics={"num_examples": 128, "num_samples": 16},
    )
    many = x_0.repeat(64, *[1] * (x_0.ndim - 1))
    floor, found = errors(config, dataset_of(many, many), points(*x_0))
    assert floor < (1e-6 if len(x_0) == 1 else 0.2)
    assert floor - 1e-3 < found < floor + tolerance


def test_a_unet_learns_gaussian_images(small_config):
    """Its floor is mean(abar_t) = 0.468; it learns sqrt(1 - abar_t) x_t, pixel by pixel."""
    x_0 = torch.randn(2560, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    config = small_config(
        network=UNET,
        training={"num_updates": 300, "batch_size": 32, "learning_rate": 1e-2, "num_evaluations": 1},
        metrics={"num_examples": 512, "num_samples": 16},
    )
    floor, found = errors(config, dataset_of(x_0[:2048], x_0[2048:]), GaussianDenoiser)
    assert floor == pytest.approx(float(config.schedule.build().alphas_cumprod.mean()), rel=0.02)
    assert found == pytest.approx(floor, rel=0.04)
