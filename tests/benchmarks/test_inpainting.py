"""Inpainting against the closed forms of Gaussian data: how wrong it is, and what resampling does to it."""

import numpy as np
import pytest

from benchmarks import inpainting
from benchmarks.inpainting import COSINE, Gaussian, deviations, draw, errors, law, pair
from diffusion.process.samplers import sampler_table
from diffusion.registry import SAMPLERS

# A Gaussian with nothing special about it, of 2 known and 2 unknown values.
ROOT = np.array([[1.0, 0.3, -0.5, 0.2], [0.0, 0.8, 0.4, -0.1], [0.3, 0.0, 0.6, 0.5], [0.2, -0.4, 0.0, 0.7]])
SOME = Gaussian(np.array([0.5, -1.0, 0.2, 0.0]), ROOT @ ROOT.T, np.array([True, False, False, True]))
VALUES = np.array([1.3, -0.6])
LARGEST = 4.5  # standard errors; one of 100 figures exceeds it once in 1,400 runs, and seeds are fixed


def test_conditionals_are_those_of_samples():
    """By regression on a million samples."""
    samples = np.random.default_rng(0).multivariate_normal(SOME.mean, SOME.covariance, 1_000_000)
    centred = samples - samples.mean(axis=0)
    fitted, *_ = np.linalg.lstsq(centred[:, SOME.known], centred[:, ~SOME.known], rcond=None)
    slope, covariance = SOME.conditional()
    np.testing.assert_allclose(fitted.T, slope, atol=5e-3)
    residuals = centred[:, ~SOME.known] - centred[:, SOME.known] @ fitted
    np.testing.assert_allclose(np.cov(residuals.T), covariance, atol=5e-3)


def test_the_denoiser_is_the_regression_of_the_data_on_noisy_data():
    rng = np.random.default_rng(0)
    x_0 = rng.multivariate_normal(SOME.mean, SOME.covariance, 1_000_000)
    timestep = 400
    a = COSINE.alphas_cumprod[timestep]
    noise = rng.standard_normal(x_0.shape)
    x_t = np.sqrt(a) * x_0 + np.sqrt(1.0 - a) * noise
    design = np.concatenate([x_t, np.ones((len(x_t), 1))], axis=1)
    fitted, *_ = np.linalg.lstsq(design, noise, rcond=None)
    np.testing.assert_allclose(SOME.denoiser(COSINE)(x_t[:5], timestep), design[:5] @ fitted, atol=0.02)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize(("resampling", "jump_length"), [(1, 1), (4, 1), (3, 5)])
def test_drawn_samples_follow_the_law(name, resampling, jump_length):
    """Means, variances and covariances of 20,000 samples, in standard errors, for every sampler."""
    table = sampler_table(COSINE, name, 12)
    offset, slope, covariance = law(SOME, table, resampling, jump_length)
    samples = draw(SOME, COSINE, table, VALUES, 20_000, resampling, jump_length)
    assert np.abs(deviations(samples, offset + slope @ VALUES, covariance)).max() < LARGEST


def test_the_law_tells_wrong_samples():
    """The check above can fail: without resampling the samples are far from the law with it."""
    table = sampler_table(COSINE, "ddpm", 12)
    offset, slope, covariance = law(SOME, table, 4)
    samples = draw(SOME, COSINE, table, VALUES, 20_000)
    assert np.abs(deviations(samples, offset + slope @ VALUES, covariance)).max() > 10.0


def test_what_does_not_depend_on_the_known_part_is_not_biased():
    """Then the conditional mean is that of the data, whatever is known, also without resampling."""
    free = Gaussian(np.array([0.5, -1.0]), np.diag([1.0, 0.7]), np.array([True, False]))
    offset, slope, covariance = law(free, sampler_table(COSINE, "ddpm", 1000))
    np.testing.assert_allclose(slope, 0.0, atol=1e-12)
    np.testing.assert_allclose(offset, -1.0, atol=1e-3)
    np.testing.assert_allclose(covariance, 0.7, atol=5e-3)  # of DDPM's variances


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("data", [pair(), SOME], ids=["pair", "some"])
def test_the_error_of_the_mean_falls_as_one_by_resampling(name, data):
    table = sampler_table(COSINE, name, 20)
    alone, ten, twenty, hundred = (errors(data, table, number)[0] for number in (1, 10, 20, 100))
    assert alone > 0.15
    assert ten < 0.4 * alone
    assert 1.7 < ten / twenty < 2.3
    assert 4.0 < twenty / hundred < 6.5
    assert hundred < 0.03


def test_with_enough_resampling_mean_and_covariance_are_right_within_the_error_of_the_samples():
    table = sampler_table(COSINE, "dpmpp_2m", 20)
    slope, covariance = SOME.conditional()
    mean = SOME.mean[~SOME.known] + slope @ (VALUES - SOME.mean[SOME.known])
    samples = draw(SOME, COSINE, table, VALUES, 1_000, 60, seed=1)
    assert np.abs(deviations(samples, mean, covariance)).max() < 3.5
    assert np.abs(deviations(draw(SOME, COSINE, table, VALUES, 1_000), mean, covariance)).max() > 10.0


def test_the_report_is_written_from_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(inpainting, "RESULTS", tmp_path / "inpainting.md")
    monkeypatch.setattr(inpainting, "SECTIONS", (("By correlation", "Text.", lambda: iter(["| a |"])),))
    inpainting.main()
    text = (tmp_path / "inpainting.md").read_text()
    assert text.startswith("# Inpainting against closed forms")
    assert text.endswith("## By correlation\n\nText.\n\n| a |\n")
