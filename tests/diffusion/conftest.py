"""Gaussian data and its exact denoiser: the case in which every quantity has a closed form."""

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.config import (
    Config,
    MetricsConfig,
    NetworkConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from diffusion.data import Dataset, DataSpec, Examples

torch.set_num_threads(1)


class GaussianDenoiser(nn.Module):
    """E[epsilon | x_t] (or x_0, or v) for independent columns x_0 ~ N(mean, variance)."""

    def __init__(self, schedule, variance=1.0, mean=0.0, prediction_type="epsilon"):
        super().__init__()
        self.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
        self.variance = torch.as_tensor(variance, dtype=torch.float64)
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.prediction_type = prediction_type

    def forward(self, x, t):
        shape = (-1,) + (1,) * (x.ndim - 1)
        a = self.alphas_cumprod[t].reshape(shape)
        y = x.double() - a.sqrt() * self.mean
        total = a * self.variance + 1.0 - a
        epsilon = (1.0 - a).sqrt() / total * y
        x_0 = self.mean + a.sqrt() * self.variance / total * y
        v = a.sqrt() * epsilon - (1.0 - a).sqrt() * x_0
        return {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[self.prediction_type].to(x.dtype)


@pytest.fixture
def gaussian_denoiser():
    return GaussianDenoiser


def make_gaussian_dataset(dim=2, num_train=4096, num_val=1024, seed=0):
    """Standard normal points, which are their own normalisation."""
    x = torch.randn(num_train + 2 * num_val, dim, generator=torch.Generator().manual_seed(seed))
    spec = DataSpec(
        name="gaussian",
        kind="points",
        shape=(dim,),
        mean=[0.0] * dim,
        std=[1.0] * dim,
        range=None,
        columns=tuple(f"x{index}" for index in range(dim)),
        clip=(-6.0, 6.0),
        log_snr_window=(-8.0, 5.0),
        fingerprint="0" * 64,
    )
    return Dataset(spec, *map(Examples, x.split([num_train, num_val, num_val])))


@pytest.fixture
def gaussian_dataset():
    return make_gaussian_dataset


def make_small_config(*, seed=0, schedule=None, network=None, training=None, sampler=None, metrics=None):
    """A config of a few seconds; each argument replaces fields of its section."""
    return Config(
        seed=seed,
        schedule=ScheduleConfig(
            **({"num_train_timesteps": 10, "beta_start": 0.02, "beta_end": 0.5} | (schedule or {}))
        ),
        network=NetworkConfig(
            **(
                {"hidden_size": 16, "num_blocks": 1, "time_embedding_size": 8, "data_embedding_size": 4}
                | (network or {})
            )
        ),
        training=TrainingConfig(
            **({"num_updates": 12, "batch_size": 16, "num_evaluations": 3} | (training or {}))
        ),
        sampler=SamplerConfig(**({"num_steps": 5} | (sampler or {}))),
        metrics=MetricsConfig(**({"num_samples": 64, "num_examples": 64} | (metrics or {}))),
    )


@pytest.fixture
def small_config():
    return make_small_config


@pytest.fixture
def rng():
    return np.random.default_rng(0)
