"""Samplers driven by exact denoisers give back the data that the denoisers are exact for."""

import math

import numpy as np
import pytest
import torch

from diffusion.likelihood import elbo_window
from diffusion.sampling import ErrorCurve, last_sample, sampler_table, trajectory
from diffusion.schedules import NoiseSchedule, linear_betas

TOTAL, COUNT = 1000, 4000
SCHEDULE = NoiseSchedule(linear_betas(TOTAL, 1e-4, 0.02))
GAUSSIAN = {"weights": [1.0], "means": [[0.5, -0.3]], "covariance": [[1.5, 0.6], [0.6, 0.4]]}
MIXTURE = {
    "weights": [0.5, 0.3, 0.2],
    "means": [[1.2, 0.0], [-1.0, 0.8], [-0.6, -1.4]],
    "covariance": [[0.05, 0.02], [0.02, 0.03]],
}
SAMPLERS = {
    "ddpm, beta-tilde": {"sampler": "ddpm"},
    "ddpm, beta": {"sampler": "ddpm", "variance": "beta"},
    "ddpm, optimal": {"sampler": "ddpm", "variance": "optimal"},
    "ddim": {"sampler": "ddim"},
    "ddim, eta 0.5": {"sampler": "ddim", "eta": 0.5},
    "ddim, eta 1": {"sampler": "ddim", "eta": 1.0, "use_clipped_model_output": False},
    "2m": {"sampler": "dpmpp_2m"},
    "2m, 50 steps": {"sampler": "dpmpp_2m", "num_inference_steps": 50, "spacing": "logsnr"},
}


def draw(denoiser, options, error_curve):
    """COUNT samples, float64."""
    if options.get("variance") == "optimal":
        options = {**options, "error_curve": error_curve}
    table = sampler_table(SCHEDULE, **{"num_inference_steps": TOTAL, **options})
    generator = torch.Generator().manual_seed(1)

    def noise(_row):
        return torch.randn(COUNT, 2, generator=generator, dtype=torch.float64)

    def denoise(x, timestep):
        return denoiser(x, torch.full((COUNT,), timestep))

    return last_sample(trajectory(denoise, noise(-1), table, noise))


def measured_curve(denoiser, x_0):
    found = elbo_window(denoiser, SCHEDULE, x_0, (-9.0, 9.0))
    return ErrorCurve(found.log_snr, found.errors)


def assert_moments(samples, mean, covariance, fourth):
    """Both within 4.5 standard errors; that of the covariance is `fourth` over the root of their number."""
    root = math.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - mean) < 4.5 * np.sqrt(np.diag(covariance)) / root).all()
    assert (np.abs(np.cov(samples.T) - covariance) < 4.5 * fourth / root).all()


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_recovers_the_mean_and_covariance_of_gaussian_data(mixture, options):
    denoiser, x_0 = mixture(SCHEDULE, **GAUSSIAN, count=2000)
    samples = draw(denoiser, options, measured_curve(denoiser, x_0)).numpy()
    covariance = np.array(GAUSSIAN["covariance"])
    # Var(x_i x_j) = C_ii C_jj + C_ij^2 for Gaussian x.
    fourth = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2)
    assert_moments(samples, GAUSSIAN["means"][0], covariance, fourth)


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_recovers_the_weights_centres_and_covariance_of_a_mixture(mixture, options):
    denoiser, x_0 = mixture(SCHEDULE, **MIXTURE, count=2000)
    samples = draw(denoiser, options, measured_curve(denoiser, x_0)).numpy()
    weights, means, covariance = (np.array(MIXTURE[name]) for name in ("weights", "means", "covariance"))
    # The components are 5 deviations and more apart: the nearest centre tells whose a sample is.
    nearest = np.square(samples[:, None] - means).sum(-1).argmin(1)
    shares = np.bincount(nearest, minlength=3) / COUNT
    assert (np.abs(shares - weights) < 4.5 * np.sqrt(weights * (1.0 - weights) / COUNT)).all()
    fourth = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2)
    for component in range(3):
        assert_moments(samples[nearest == component], means[component], covariance, fourth)
