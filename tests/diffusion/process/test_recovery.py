"""With the exact denoiser of a data distribution, every sampler reproduces that distribution."""

import math

import numpy as np
import pytest
import torch

from diffusion.process.samplers import last_sample, sampler_table, trajectory
from diffusion.process.schedules import NoiseSchedule, linear_betas

NUM_TRAIN_TIMESTEPS, COUNT = 400, 4000
SCHEDULE = NoiseSchedule(linear_betas(NUM_TRAIN_TIMESTEPS, 2.5e-4, 0.05))
GAUSSIAN = {"weights": [1.0], "means": [[0.5, -0.3]], "covariance": [[1.5, 0.6], [0.6, 0.4]]}
MIXTURE = {
    "weights": [0.5, 0.3, 0.2],
    "means": [[1.2, 0.0], [-1.0, 0.8], [-0.6, -1.4]],
    "covariance": [[0.05, 0.02], [0.02, 0.03]],
}
SAMPLERS = {
    "ddpm, beta-tilde": {"sampler": "ddpm"},
    "ddpm, beta": {"sampler": "ddpm", "variance": "beta"},
    "ddim": {"sampler": "ddim"},
    "ddim, eta 0.5": {"sampler": "ddim", "eta": 0.5},
    "ddim, eta 1": {"sampler": "ddim", "eta": 1.0, "use_clipped_model_output": False},
    "2m": {"sampler": "dpmpp_2m"},
    "2m, 50 steps": {"sampler": "dpmpp_2m", "num_inference_steps": 50, "spacing": "logsnr"},
}


def draw(denoiser, options):
    """COUNT samples, float64."""
    table = sampler_table(SCHEDULE, **{"num_inference_steps": NUM_TRAIN_TIMESTEPS, **options})
    generator = torch.Generator().manual_seed(1)

    def noise(_row):
        return torch.randn(COUNT, 2, generator=generator, dtype=torch.float64)

    def denoise(x, timestep):
        return denoiser(x, torch.full((COUNT,), timestep))

    return last_sample(trajectory(denoise, noise(-1), table, noise))


def assert_gaussian_moments(samples, mean, covariance):
    """Mean and covariance are within 4.5 standard errors of those of a Gaussian."""
    root = math.sqrt(len(samples))
    # Var(x_i x_j) = C_ii C_jj + C_ij^2 for Gaussian x.
    product_std = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2)
    assert (np.abs(samples.mean(0) - mean) < 4.5 * np.sqrt(np.diag(covariance)) / root).all()
    assert (np.abs(np.cov(samples.T) - covariance) < 4.5 * product_std / root).all()


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_recovers_the_mean_and_covariance_of_gaussian_data(mixture, options):
    denoiser, _ = mixture(SCHEDULE, **GAUSSIAN, count=2000)
    samples = draw(denoiser, options).numpy()
    assert_gaussian_moments(samples, GAUSSIAN["means"][0], np.array(GAUSSIAN["covariance"]))


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_recovers_the_weights_centres_and_covariance_of_a_mixture(mixture, options):
    denoiser, _ = mixture(SCHEDULE, **MIXTURE, count=2000)
    samples = draw(denoiser, options).numpy()
    weights, means, covariance = (np.array(MIXTURE[name]) for name in ("weights", "means", "covariance"))
    # The components are at least 5 standard deviations apart, so a sample belongs to the nearest centre.
    nearest = np.square(samples[:, None] - means).sum(-1).argmin(1)
    fractions = np.bincount(nearest, minlength=3) / COUNT
    assert (np.abs(fractions - weights) < 4.5 * np.sqrt(weights * (1.0 - weights) / COUNT)).all()
    for component in range(3):
        assert_gaussian_moments(samples[nearest == component], means[component], covariance)
