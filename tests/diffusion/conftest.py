"""Gaussian data and mixtures with their exact denoisers, for which every quantity has a closed form."""

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
from diffusion.data.dataset import Dataset, DataSpec, Split

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
        variance_t = a * self.variance + 1.0 - a
        epsilon = (1.0 - a).sqrt() / variance_t * y
        x_0 = self.mean + a.sqrt() * self.variance / variance_t * y
        v = a.sqrt() * epsilon - (1.0 - a).sqrt() * x_0
        return {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[self.prediction_type].to(x.dtype)


@pytest.fixture
def gaussian_denoiser():
    return GaussianDenoiser


class MixtureDenoiser(nn.Module):
    """E[epsilon | x_t] for x_0 ~ sum_k weights_k N(means_k, covariance); data are flattened.

    With one component the data are a correlated Gaussian; with a covariance of 0 they are single points.
    """

    def __init__(self, schedule, weights, means, covariance):
        super().__init__()
        self.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
        self.log_weights = torch.as_tensor(weights, dtype=torch.float64).log()
        eigenvalues, self.axes = torch.linalg.eigh(torch.as_tensor(covariance, dtype=torch.float64))
        self.eigenvalues = eigenvalues.clamp(min=0.0)
        self.means = torch.as_tensor(means, dtype=torch.float64) @ self.axes

    def forward(self, x, t):
        a = self.alphas_cumprod[t].unsqueeze(-1)
        y = x.double().flatten(1) @ self.axes
        variance_t = a * self.eigenvalues + 1.0 - a
        offset = y.unsqueeze(1) - a.sqrt().unsqueeze(-1) * self.means
        posterior = (self.log_weights - 0.5 * (offset.square() / variance_t.unsqueeze(1)).sum(-1)).softmax(-1)
        # For component k, epsilon is sqrt(1 - a) / (a C + 1 - a) times the offset of x_t from its centre.
        epsilon = (1.0 - a).sqrt() / variance_t * (posterior.unsqueeze(-1) * offset).sum(1)
        return (epsilon @ self.axes.T).reshape(x.shape).to(x.dtype)


def make_mixture(schedule, weights, means, covariance, count, seed=0):
    """The exact denoiser of a mixture, and `count` examples, float64 [count, d]."""
    generator = torch.Generator().manual_seed(seed)
    weights, means = (torch.tensor(values, dtype=torch.float64) for values in (weights, means))
    covariance = torch.tensor(covariance, dtype=torch.float64)
    eigenvalues, axes = torch.linalg.eigh(covariance)
    noise = torch.randn(count, means.shape[1], generator=generator, dtype=torch.float64)
    component = torch.multinomial(weights, count, replacement=True, generator=generator)
    x_0 = means[component] + noise * eigenvalues.clamp(min=0.0).sqrt() @ axes.T
    return MixtureDenoiser(schedule, weights, means, covariance), x_0


@pytest.fixture
def mixture():
    return make_mixture


def make_gaussian_dataset(dim=2, num_train=4096, num_val=1024, seed=0):
    """Standard normal points, which need no normalisation."""
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
    return Dataset(spec, *map(Split, x.split([num_train, num_val, num_val])))


@pytest.fixture
def gaussian_dataset():
    return make_gaussian_dataset


def make_small_config(*, seed=0, schedule=None, network=None, training=None, sampler=None, metrics=None):
    """A config that trains in a few seconds; each argument replaces fields of its section."""
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
