import math

import numpy as np
import pytest

from export import noise
from export.noise import normal_noise, threefry

ONES = 0xFFFFFFFF


def integer_threefry(key, counter):
    """Threefry 2x32-20 with Python integers, round by round as in Salmon et al."""
    schedule = [*key, 0x1BD11BDA ^ key[0] ^ key[1]]
    x, y = ((word + extra) & ONES for word, extra in zip(counter, key, strict=True))
    for round_number in range(20):
        rotation = (13, 15, 26, 6, 17, 29, 16, 24)[round_number % 8]
        x = (x + y) & ONES
        y = ((y << rotation) & ONES | y >> (32 - rotation)) ^ x
        if round_number % 4 == 3:
            injection = round_number // 4 + 1
            x = (x + schedule[injection % 3]) & ONES
            y = (y + schedule[(injection + 1) % 3] + injection) & ONES
    return x, y


def integer_noise(seed, index, k, size):
    """Noise of one sample, element by element."""
    values = []
    for pair in range((size + 1) // 2):
        w0, w1 = integer_threefry((seed & ONES, index), (k, pair))
        radius = math.sqrt(-2.0 * math.log((w0 + 0.5) / 2**32))
        theta = 2.0 * math.pi * (w1 + 0.5) / 2**32
        values += [radius * math.cos(theta), radius * math.sin(theta)]
    return values[:size]


# Random123-1.14.0, tests/kat_vectors: threefry2x32 20.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(counter, key, words):
    assert integer_threefry(key, counter) == words
    actual = threefry(key, counter)
    assert (int(actual[0]), int(actual[1])) == words
    assert {word.dtype for word in actual} == {np.dtype(np.uint32)}


def test_threefry_broadcasts_its_four_words():
    draw = np.random.default_rng(0)
    key0, key1 = draw.integers(2**32, size=(3, 1)), draw.integers(2**32, size=(1, 4))
    x0, x1 = np.uint32(7), draw.integers(2**32, size=(2, 1, 1))
    actual = threefry((key0, key1), (x0, x1))
    assert actual[0].shape == actual[1].shape == (2, 3, 4)
    for i, j, k in np.ndindex(2, 3, 4):
        expected = integer_threefry((int(key0[j, 0]), int(key1[0, k])), (7, int(x1[i, 0, 0])))
        assert (int(actual[0][i, j, k]), int(actual[1][i, j, k])) == expected


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (5,), (1, 8, 8), (3, 3, 3)])
@pytest.mark.parametrize(("seed", "k"), [(0, 0), (1, 1), (2**32 - 1, 1000), (12345, 2**31 + 3)])
def test_noise_is_box_muller_on_threefry_with_elements_in_c_order(shape, seed, k):
    """Elements 2p and 2p + 1 come from pair p; an odd last element uses the cosine alone."""
    indices = [0, 1, 2**32 - 1]
    actual = normal_noise(seed, indices, k, shape)
    assert actual.shape == (3, *shape)
    assert actual.dtype == np.float64
    for sample, index in zip(actual, indices, strict=True):
        expected = integer_noise(seed, index, k, math.prod(shape))
        np.testing.assert_allclose(sample.ravel(), expected, rtol=1e-12, atol=1e-12)


def test_noise_of_a_sample_does_not_depend_on_which_others_are_drawn():
    every = normal_noise(3, np.arange(1000), 2, (1, 3, 3))
    for indices in ([0], [999], [5, 4, 3], [7, 7], np.arange(100, 200)):
        np.testing.assert_array_equal(normal_noise(3, indices, 2, (1, 3, 3)), every[indices])


def test_noise_of_an_element_depends_only_on_its_index():
    """Shorter and longer samples start with the same numbers, and the shape only arranges them."""
    longest = normal_noise(3, [8], 2, (12,))
    np.testing.assert_array_equal(normal_noise(3, [8], 2, (7,))[0], longest[0, :7])
    np.testing.assert_array_equal(normal_noise(3, [8], 2, (3, 2, 2)).ravel(), longest[0])


@pytest.mark.parametrize(("seed", "same"), [(2**32, 0), (2**40 + 5, 5), (-1, 2**32 - 1), (np.int64(7), 7)])
def test_only_the_seed_modulo_two_to_the_32_is_used(seed, same):
    actual, expected = (normal_noise(value, [0, 1], 0, (4,)) for value in (seed, same))
    np.testing.assert_array_equal(actual, expected)


def test_seed_sample_and_row_each_change_the_noise():
    """Swapping them (seed 1, sample 2 and seed 2, sample 1) changes the noise, too."""
    draws = {(s, i, k): normal_noise(s, [i], k, (2,)).tobytes() for s, i, k in np.ndindex(4, 4, 4)}
    assert len(set(draws.values())) == len(draws)


def test_noise_is_standard_normal():
    """Moments, and the fraction within 1, 2 and 3 standard deviations, to 4.5 standard errors."""
    values = normal_noise(0, np.arange(4000), 0, (5, 5)).ravel()
    count = values.size
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((values**power).mean() - moment) < 4.5 * math.sqrt(variance / count)
    for limit in (1.0, 2.0, 3.0):
        fraction = math.erf(limit / math.sqrt(2.0))
        error = math.sqrt(fraction * (1.0 - fraction) / count)
        assert abs((np.abs(values) < limit).mean() - fraction) < 4.5 * error


def test_noise_of_neighbours_is_uncorrelated():
    """Between rows, samples, seeds and elements, for values and for their squares."""
    num_samples, size = 4000, 6
    base = normal_noise(0, np.arange(num_samples), 0, (size,))
    neighbours = {
        "next row": (base, normal_noise(0, np.arange(num_samples), 1, (size,))),
        "next seed": (base, normal_noise(1, np.arange(num_samples), 0, (size,))),
        "next sample": (base[:-1], base[1:]),
        "the pair's other element": (base[:, 0::2], base[:, 1::2]),
        "next pair": (base[:, :-2], base[:, 2:]),
    }
    for name, (one, other) in neighbours.items():
        limit = 4.5 / math.sqrt(one.size)
        assert abs((one * other).mean()) < limit, name
        assert abs(((one**2 - 1.0) * (other**2 - 1.0)).mean() / 2.0) < limit, name


@pytest.mark.parametrize("word", [0, ONES])
def test_the_most_extreme_words_give_finite_noise(monkeypatch, word):
    words = np.full((1, 1), word, dtype=np.uint32)
    monkeypatch.setattr(noise, "threefry", lambda key, counter: (words, words))
    values = normal_noise(0, [0], 0, (2,))
    assert np.isfinite(values).all()
    assert np.abs(values).max() < 7.0
