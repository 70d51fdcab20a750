"""Planted differences of growing strength, which the yardsticks that decide must rank.

docs/judging.md has the table of what the others see.
"""

import math

import pytest
import torch

from diffusion.config import DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.evaluation.distances import energy_distance, kernel_distance
from diffusion.evaluation.features import fit_features
from diffusion.evaluation.sample_metrics import DECIDING
from diffusion.evaluation.statistics import colour_spread_ratio, spectrum_distance
from diffusion.evaluation.two_sample_auc import classifier_auc, pixel_auc

COUNT = 800


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normals(seed, scale=1.0):
    return scale * torch.randn(COUNT, 2, generator=generator(seed))


def blobs(seed, weights=(0.60, 0.38, 0.02)):
    """Three separate blobs; a fixed number of rows in each, so that only the weights differ."""
    counts = [round(COUNT * weight) for weight in weights]
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]).repeat_interleave(torch.tensor(counts), 0)
    rows = centres + 0.3 * torch.randn(len(centres), 2, generator=generator(seed))
    return rows[torch.randperm(len(rows), generator=generator(seed + 100))]


def ring(seed, thickness=0.02):
    random = generator(seed)
    angles = 2.0 * math.pi * torch.rand(COUNT, generator=random)
    radii = 1.0 + thickness * torch.randn(COUNT, generator=random)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], 1) / 0.7


def student(seed, degrees=math.inf):
    """Student's t; infinite degrees of freedom are the normal distribution."""
    rows = normals(seed)
    if math.isinf(degrees):
        return rows
    chi_squared = torch.distributions.Chi2(torch.tensor(float(degrees)))
    torch.manual_seed(seed)
    return rows / (chi_squared.sample((COUNT, 1)) / degrees).sqrt()


# The data, and samples with a defect of growing strength.
PLANTED = {
    "scale": (normals, [(1.15,), (1.3,), (1.6,)]),
    "weight": (blobs, [((0.60, 0.40, 0.0),), ((0.75, 0.25, 0.0),), ((1.0, 0.0, 0.0),)]),
    "detail": (ring, [(0.03,), (0.05,), (0.1,)]),
    "tails": (student, [(5.0,), (2.5,), (1.5,)]),
}


@pytest.fixture(autouse=True)
def same_random_state():
    with torch.random.fork_rng():
        yield


def values(yardstick, difference):
    """Values for the null and the three strengths, and the first one's error."""
    make, strengths = PLANTED[difference]
    data = make(1)
    found = [yardstick(make(2, *strength), data) for strength in [(), *strengths]]
    return [each.value for each in found], [each.standard_error for each in found]


def ranks(found):
    return all(one < other for one, other in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("difference", PLANTED)
@pytest.mark.parametrize(("yardstick", "null"), [(kernel_distance, 0.0), (classifier_auc, 0.5)])
def test_the_deciding_yardsticks_of_points_rank_all_differences(yardstick, null, difference):
    found, errors = values(yardstick, difference)
    assert ranks(found)
    assert abs(found[0] - null) < 3.0 * errors[0]
    assert found[-1] - null > 3.0 * errors[-1]


def test_what_decides_is_what_these_tests_hold_to_it():
    assert {*DECIDING["points"].values()} == {"kernel", "auc"}
    assert {*DECIDING["image"].values()} == {"kernel", "pixel_auc"}
    assert energy_distance(ring(2, 0.05), ring(1)).value < energy_distance(ring(2), ring(1)).standard_error


@pytest.fixture(scope="module")
def digits():
    """Two sets of images [n, 1, 8, 8], 0 to 16, and random features fitted to others."""
    dataset = load_dataset(DataConfig(name="digits"))
    images = torch.from_numpy(dataset.raw(dataset.train[:]))
    return images[:400], images[400:1200], fit_features(dataset, "random")


def blurred(images, strength):
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    return images + strength * (torch.nn.functional.avg_pool2d(padded, 3, stride=1) - images)


def grained(images, strength):
    noise = torch.randn(images.shape, generator=generator(3)).double()
    return (images + 8.0 * strength * noise).clamp(0.0, 16.0)


@pytest.mark.parametrize("defect", [blurred, grained])
def test_the_yardsticks_of_images_rank_blur_and_grain(digits, defect):
    images, reference, features = digits
    variants = [defect(images, strength) for strength in (0.0, 0.2, 0.4, 0.8)]
    pixels = 255.0 / 16.0
    for yardstick, null in (
        (lambda each: kernel_distance(features(each), features(reference)), 0.0),
        (lambda each: pixel_auc(each * pixels, reference * pixels), 0.5),
        (lambda each: spectrum_distance(each * pixels, reference * pixels), 0.0),
    ):
        found = [yardstick(each) for each in variants]
        assert ranks([each.value for each in found])
        assert found[0].value - null < 4.0 * found[0].standard_error
        assert found[-1].value - null > 6.0 * found[-1].standard_error


def test_the_spread_of_colours_ranks_grounds_that_are_too_colourful():
    def images(seed, spread):
        random = generator(seed)
        grounds = 128.0 + spread * torch.randn(400, 3, 1, 1, generator=random)
        return grounds + 20.0 * torch.randn(400, 3, 8, 8, generator=random)

    found = [colour_spread_ratio(images(1, spread), images(2, 24.0)) for spread in (24.0, 30.0, 45.0, 75.0)]
    assert ranks([each.value for each in found])
    assert found[0].value < 3.0 * found[0].standard_error
