"""Each network learns data with a known exact denoiser, down to almost the error of that denoiser."""

import dataclasses

import pytest
import torch

from diffusion.data.dataset import Dataset, Split
from diffusion.evaluation.evaluator import Evaluator
from diffusion.training.loop import Training
from tests.diffusion.conftest import GaussianDenoiser, MixtureDenoiser, make_gaussian_dataset

UNET = {
    "kind": "unet",
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "attention_resolutions": (4,),
    "time_embedding_size": 16,
}
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
    return Dataset(spec, *map(Split, (train, val, val)))


def errors(config, dataset, exact):
    """val/mse of the exact denoiser and of a network trained with `config`, on the same noise."""
    evaluator, reports = Evaluator(config, dataset), []
    floor, _ = evaluator.held_out_losses(exact(evaluator.schedule))
    Training(config, dataset, reports.append).run()
    return floor["val/mse"], reports[-1].metrics["val/mse"]


def points(*rows):
    """The exact denoiser of equally likely points, as a function of the schedule."""
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
def test_one_or_two_examples_are_memorised(small_config, network, training, x_0, tolerance):
    """With one example the noise is certain and the floor is 0. With two it is uncertain if it is as large
    as their difference. The error of predicting 0 is 1."""
    config = small_config(
        network=network,
        training={"learning_rate": 5e-3, "num_evaluations": 1} | training,
        metrics={"num_examples": 128, "num_samples": 16, "features": "random"},
    )
    repeated = x_0.repeat(64, *[1] * (x_0.ndim - 1))
    floor, trained = errors(config, dataset_of(repeated, repeated), points(*x_0))
    assert floor < (1e-6 if len(x_0) == 1 else 0.2)
    assert floor - 1e-3 < trained < floor + tolerance


def test_a_unet_learns_gaussian_images(small_config):
    """The floor is mean(abar_t) = 0.468; the exact denoiser is sqrt(1 - abar_t) x_t for each pixel."""
    x_0 = torch.randn(2304, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    config = small_config(
        network=UNET,
        training={"num_updates": 200, "batch_size": 32, "learning_rate": 1e-2, "num_evaluations": 1},
        metrics={"num_examples": 256, "num_samples": 16, "features": "random"},
    )
    floor, trained = errors(config, dataset_of(x_0[:2048], x_0[2048:]), GaussianDenoiser)
    assert floor == pytest.approx(float(config.schedule.build().alphas_cumprod.mean()), rel=0.02)
    assert trained == pytest.approx(floor, rel=0.04)
