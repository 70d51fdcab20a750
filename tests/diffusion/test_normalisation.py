"""Moments are exact however they are chunked; smallest steps between values."""

from fractions import Fraction

import numpy as np
import pytest

from diffusion.normalisation import pixel_moments, pixel_sums, rounding, smallest_step, value_moments


@pytest.fixture(name="images")
def _images():
    return np.random.default_rng(0).integers(0, 256, (37, 3, 5, 6), dtype=np.uint8)


def test_moments_of_pixels_are_the_mean_and_the_standard_deviation(images):
    mean, std = pixel_moments(pixel_sums(images), 30)
    np.testing.assert_allclose(mean.ravel(), images.mean(axis=(0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(std.ravel(), images.std(axis=(0, 2, 3)), rtol=1e-14)
    assert mean.shape == std.shape == (3, 1, 1)


def test_moments_of_pixels_are_the_nearest_floats_to_the_exact_ones(images):
    mean, std = pixel_moments(pixel_sums(images), 30)
    for channel in range(3):
        pixels = [int(value) for value in images[:, channel].ravel()]
        exact = Fraction(sum(pixels), len(pixels))
        variance = Fraction(sum(value**2 for value in pixels), len(pixels)) - exact**2
        assert mean.ravel()[channel] == float(exact)
        assert std.ravel()[channel] == float(variance) ** 0.5


def test_moments_of_pixels_do_not_depend_on_order_or_chunks(images):
    whole = pixel_sums(images)
    np.testing.assert_array_equal(
        np.concatenate([pixel_sums(chunk) for chunk in images.reshape(37, 1, 3, 5, 6)]), whole
    )
    np.testing.assert_array_equal(pixel_sums(images, max_chunk_values=200), whole)
    for one, other in zip(pixel_moments(whole[::-1], 30), pixel_moments(whole, 30), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_tiny_standard_deviation_far_from_zero_is_not_lost():
    images = np.full((1, 1, 1000, 1000), 255, dtype=np.uint8)
    images[0, 0, 0, 0] = 254
    _, std = pixel_moments(pixel_sums(images), 10**6)
    assert std.item() == pytest.approx((1e-6 * (1 - 1e-6)) ** 0.5, rel=1e-12)
    _, std = pixel_moments(pixel_sums(np.full((2, 1, 8, 8), 255, dtype=np.uint8)), 64)
    assert std.item() == 0.0


def test_moments_of_values_are_per_column_or_per_channel():
    points = np.random.default_rng(0).normal(size=(50, 4)) * [1, 10, 100, 1000]
    for actual, expected in zip(
        value_moments(points), (points.mean(axis=0), points.std(axis=0)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
    images = points.reshape(25, 2, 2, 2)
    mean, std = value_moments(images)
    assert mean.shape == std.shape == (2, 1, 1)
    np.testing.assert_allclose(std.ravel(), images.std(axis=(0, 2, 3)), rtol=1e-12)


def test_the_smallest_step_is_one_grey_level_and_no_larger_than_any_gap():
    images = np.random.default_rng(0).integers(0, 17, (50, 1, 8, 8)).astype(np.uint8)
    assert smallest_step(images, np.array([4.0])) == pytest.approx(0.25)
    points = np.random.default_rng(1).normal(size=(100, 2))
    gaps = [np.diff(np.sort(column)).min() for column in points.T]
    assert smallest_step(points, np.ones(2)) == pytest.approx(min(gap for gap in gaps if gap > 1e-7))


def test_a_constant_column_is_ignored_by_the_smallest_step():
    """The first examples of a column that is almost always zero look like this."""
    points = np.stack([np.zeros(20), np.arange(20) / 2.0], axis=1)
    assert smallest_step(points, np.ones(2)) == pytest.approx(0.5)
    assert 0.0 < smallest_step(points[:, :1], np.ones(1)) < 1e-6


@pytest.mark.parametrize(
    ("values", "constant"),
    [
        ([0.1 + 0.2, 0.3] * 20, True),
        ([1e9 + 0.1, np.nextafter(1e9 + 0.1, 2e9)] * 20, True),
        ([np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1.0))] * 20, True),
        (1.7e9 + np.arange(40.0), False),  # seconds since 1970
        (1e6 + 0.25 * np.arange(40.0), False),
        ([1e15, 1e15 + 1.0] * 20, False),  # whole numbers are exact
        (1e-12 * np.arange(40.0), False),
    ],
)  # fmt: skip
def test_a_constant_is_recognised_through_its_rounding(values, constant):
    column = np.asarray(values, dtype=np.float64)[:, None]
    _, std = value_moments(column)
    assert (std <= rounding(column)).item() == constant
