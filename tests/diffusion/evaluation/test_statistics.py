"""Marginals, correlations, spectra and colours: closed forms, errors, and what each sees."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from diffusion.evaluation.statistics import (
    colour_spread_ratio,
    column_ks,
    correlation_difference,
    log_spectra,
    spectrum_distance,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator)


def error_over_spread(estimate, count=200):
    generator = torch.Generator().manual_seed(0)
    estimates = [estimate(generator) for _ in range(count)]
    errors, values = ([getattr(each, name) for each in estimates] for name in ("standard_error", "value"))
    return np.sqrt(np.mean(np.square(errors))) / np.std(values)


def test_column_statistics_are_scipys_and_name_the_worst_column(generator):
    x, y = normals(300, 3, generator=generator), normals(200, 3, generator=generator)
    x[:, 1] += 0.5
    expected = [ks_2samp(x[:, column], y[:, column]).statistic for column in range(3)]
    largest, mean, worst = column_ks(x, y)
    assert largest.value == pytest.approx(max(expected), abs=1e-6)
    assert mean.value == pytest.approx(np.mean(expected), abs=1e-6)
    assert worst == 1


def test_the_largest_difference_of_correlations_is_numpys(generator):
    x, y = normals(400, 3, generator=generator), normals(300, 3, generator=generator)
    x[:, 2] += x[:, 0]
    expected = np.abs(np.corrcoef(x.numpy().T) - np.corrcoef(y.numpy().T)).max()
    assert correlation_difference(x, y).value == pytest.approx(expected, abs=1e-6)
    assert correlation_difference(x[:, :1], y[:, :1]).value == 0.0


def test_errors_match_the_spread_where_the_laws_differ():
    def pair(generator):
        x, y = normals(200, 2, generator=generator), normals(150, 2, generator=generator)
        x[:, 1] += 0.7 + x[:, 0]
        return x, y

    assert error_over_spread(lambda each: correlation_difference(*pair(each))) == pytest.approx(1.0, abs=0.2)
    assert error_over_spread(lambda each: column_ks(*pair(each))[0]) == pytest.approx(1.0, abs=0.25)


def noise_images(count, generator, scale=40.0):
    return 128.0 + scale * normals(count, 3, 12, 12, generator=generator)


def test_the_spectrum_of_scaled_images_differs_by_the_log_of_their_power(generator):
    """Twice the contrast is 2 ln 2 more log power at every radius."""
    x = noise_images(50, generator)
    assert spectrum_distance(128.0 + 2.0 * (x - 128.0), x).value == pytest.approx(2.0 * np.log(2.0), abs=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (14, 14)])
def test_a_wave_has_power_at_its_own_radius_only(size):
    """A plane wave of 2 cycles over the width adds power to one ring, whatever its direction and phase."""
    height, width = size
    column = torch.arange(width) / width
    wave = torch.cos(2.0 * torch.pi * 2.0 * column).expand(1, 1, height, width)
    spectrum = log_spectra((100.0 * wave).double())[0]
    ring = round(2.0 / width * 2.0 * (min(size) // 2))
    assert spectrum.argmax() == ring - 1
    assert spectrum.topk(2).values[1] < spectrum.max() - 5.0


def test_errors_of_image_statistics_match_their_spread():
    def blurred(generator):
        images = noise_images(60, generator)
        return 0.8 * images + 0.2 * images.roll(1, 3)

    def wide(generator):
        tint = 20.0 * normals(60, 3, 1, 1, generator=generator)
        return noise_images(60, generator) + tint * torch.tensor([1.0, 2.0, 1.0])[:, None, None]

    def narrow(generator):
        return noise_images(80, generator) + 20.0 * normals(80, 3, 1, 1, generator=generator)

    def spectrum(generator):
        return spectrum_distance(blurred(generator), noise_images(80, generator))

    assert error_over_spread(spectrum) == pytest.approx(1.0, abs=0.25)
    ratio = error_over_spread(lambda each: colour_spread_ratio(wide(each), narrow(each)))
    assert ratio == pytest.approx(1.0, abs=0.25)


def test_the_ratio_of_colour_spreads_is_that_of_the_worst_channel(generator):
    x = noise_images(200, generator) + 30.0 * normals(200, 3, 1, 1, generator=generator)
    y = x.clone()
    y[:, 2] = 128.0 + 3.0 * (x[:, 2] - 128.0)
    assert colour_spread_ratio(y, x).value == pytest.approx(np.log(3.0), abs=1e-4)
    assert colour_spread_ratio(x, y).value == pytest.approx(np.log(3.0), abs=1e-4)
    assert colour_spread_ratio(x, x).value == 0.0
