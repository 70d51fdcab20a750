"""Samples against held-out data: every figure with its floor, and what gives copies away."""

import math
from dataclasses import replace

import pytest
import torch

from diffusion import sample_quality
from diffusion.config import DataConfig
from diffusion.data import Examples, load_dataset
from diffusion.feature_fitting import with_features
from diffusion.metrics import (
    energy_distance,
    frechet_distance,
    kernel_distance,
    precision_and_recall,
    sliced_wasserstein_distance,
)
from diffusion.sample_quality import SampleJudge, copies, nearest_training_examples
from tests.diffusion.conftest import make_gaussian_dataset

NEARNESS = {"nn_train", "nn_heldout", "nn_se", "copied", "copied_floor", "num_samples", "num_reference"}


@pytest.fixture(scope="module")
def digits():
    return with_features(load_dataset(DataConfig(name="digits")), "random")


@pytest.fixture(scope="module")
def points():
    return make_gaussian_dataset(num_train=1000, num_val=300)


@pytest.fixture(params=["digits", "points"])
def dataset(request):
    """Images, then points."""
    return request.getfixturevalue(request.param)


def figures_of(samples, dataset):
    return SampleJudge(dataset, dataset.val[:]).figures(samples)


def fresh(count, seed=1):
    """Of the points' own law."""
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def test_training_data_are_copies(dataset):
    figures = figures_of(dataset.train[:200], dataset)
    assert figures["copied"] == 1.0 and copies(figures, prefix="")
    assert figures["nn_train"] == pytest.approx(0.0, abs=1e-6)
    assert figures["nn_heldout"] > 5.0 * figures["nn_se"]


def test_training_data_with_a_little_noise_are_copies(digits):
    """A thirtieth of the deviation of a pixel."""
    noise = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 30.0
    figures = figures_of(digits.train[:200] + noise, digits)
    assert figures["copied"] == 1.0 and copies(figures, prefix="")
    assert figures["nn_train"] == pytest.approx(1.0 / 30.0, rel=0.05)


def test_held_out_data_are_no_copies(dataset):
    figures = figures_of(dataset.test[:], dataset)
    assert not copies(figures, prefix="")
    assert abs(figures["nn_train"] - figures["nn_heldout"]) < 4.0 * figures["nn_se"]
    assert figures["nn_train"] > 10.0 * figures["nn_se"]


def test_fresh_samples_are_as_near_to_training_as_to_held_out_data():
    """Over ten draws their differences are as large as `nn_se` says, where the sets outnumber the samples."""
    deviations = []
    for seed in range(10):
        dataset = make_gaussian_dataset(num_train=1500, num_val=1000, seed=seed)
        figures = figures_of(fresh(100, seed=100 + seed), dataset)
        deviations.append((figures["nn_train"] - figures["nn_heldout"]) / figures["nn_se"])
        assert not copies(figures, prefix="")
    # A chi-square of ten: 2.6 and 23 have odds of one in a hundred.
    assert 2.6 < sum(deviation**2 for deviation in deviations) < 23.0


def test_distances_to_the_nearest_are_root_mean_squares_over_dimensions(digits):
    """One pixel of 64 is off by 0.4: 0.4 / 8."""
    samples = digits.train[:50].clone()
    samples[:, 0, 3, 4] += 0.4
    assert figures_of(samples, digits)["nn_train"] == pytest.approx(0.05, rel=1e-4)


def test_copies_among_other_samples_are_counted(digits):
    samples = torch.cat([digits.train[:30], digits.test[:70]])
    figures = figures_of(samples, digits)
    assert figures["copied"] == pytest.approx(0.3, abs=0.02)
    assert figures["copied_floor"] <= 0.02
    assert copies(figures, prefix="")


@pytest.mark.parametrize(
    ("copied", "floor", "n", "m", "expected"),
    [
        (0.5, 0.1, 400, 1000, True),
        (0.5, 0.1, 4, 1000, False),
        (0.5, 0.1, 400, 4, False),
        (0.04, 0.0, 100_000, 100_000, False),
        (0.06, 0.0, 100_000, 100_000, True),
        (0.54, 0.5, 100_000, 100_000, False),
        (0.1, 0.5, 400, 400, False),
        (1.0, 0.0, 100, 99, False),
    ],
)
def test_copying_is_a_share_beyond_the_floor_that_chance_does_not_explain(copied, floor, n, m, expected):
    figures = {"copied": copied, "copied_floor": floor, "num_samples": n, "num_reference": m}
    assert copies({f"sample/{name}": value for name, value in figures.items()}) == expected
    assert (
        copies({f"test/sample_{name}": value for name, value in figures.items()}, "test/sample_") == expected
    )
    for name in figures:
        assert not copies({f"sample/{other}": figures[other] for other in figures if other != name})


def test_points_have_every_figure_with_its_floor(points):
    samples = 1.2 * fresh(150)
    figures = figures_of(samples, points)
    with_floor = {"distance", "sliced_wasserstein", "precision", "recall"}
    floors = {f"{name}_floor" for name in with_floor}
    assert figures.keys() == with_floor | floors | {"distance_se", "distance_floor_se"} | NEARNESS
    for examples, end in ((samples, ""), (points.train[:150], "_floor")):
        energy = energy_distance(examples, points.val[:])
        assert figures[f"distance{end}"] == energy.value
        assert figures[f"distance{end}_se"] == energy.standard_error
        assert figures[f"sliced_wasserstein{end}"] == sliced_wasserstein_distance(examples, points.val[:])
        precision, recall = precision_and_recall(examples, points.val[:])
        assert (figures[f"precision{end}"], figures[f"recall{end}"]) == (precision, recall)
    assert figures["num_samples"] == 150 and figures["num_reference"] == 300


@pytest.mark.parametrize(("fewest", "deciding"), [(101, "kid"), (100, "frechet")])
def test_images_have_every_figure_with_its_floor_and_enough_of_them_are_decided_by_frechet(
    digits, monkeypatch, fewest, deciding
):
    monkeypatch.setattr(sample_quality, "_FEWEST_FOR_FRECHET", fewest)
    samples = digits.test[:100] + 0.3
    figures = figures_of(samples, digits)
    names = {f"{name}{end}" for name in ("distance", "kid", "frechet") for end in ("", "_floor")}
    assert figures.keys() == names | {f"{name}_se" for name in names} | NEARNESS
    held_out = digits.features(torch.from_numpy(digits.raw(digits.val[:])))
    for examples, end in ((samples, ""), (digits.train[:100], "_floor")):
        features = digits.features(torch.from_numpy(digits.raw(examples)))
        for name, distance in (("kid", kernel_distance), ("frechet", frechet_distance)):
            expected = distance(features, held_out)
            assert figures[f"{name}{end}"] == pytest.approx(expected.value, rel=1e-9)
            assert figures[f"{name}{end}_se"] == pytest.approx(expected.standard_error, rel=1e-9)
        assert figures[f"distance{end}"] == figures[f"{deciding}{end}"]
        assert figures[f"distance{end}_se"] == figures[f"{deciding}{end}_se"]
    assert figures["distance"] > figures["distance_floor"] + 3.0 * figures["distance_floor_se"]


def test_frechet_decides_from_5000_samples_on():
    assert sample_quality._FEWEST_FOR_FRECHET == 5000


def test_floors_are_the_figures_of_as_many_training_examples(dataset):
    figures = figures_of(dataset.train[:80], dataset)
    floors = [name for name in figures if "_floor" in name and name != "copied_floor"]
    for name in floors:
        assert figures[name] == figures[name.replace("_floor", "")]
    more = torch.cat([dataset.train[:]] * 2)[: len(dataset.train) + 9]
    whole, beyond = (figures_of(samples, dataset) for samples in (dataset.train[:], more))
    assert len(floors) >= 5 and all(whole[name] == beyond[name] for name in floors)


def test_images_without_features_are_compared_by_random_ones(digits):
    assert figures_of(digits.test[:50], replace(digits, features=None)) == figures_of(
        digits.test[:50], digits
    )


def test_worse_samples_are_farther_and_tell_by_precision_and_recall_why(points):
    own, collapsed, blown_up = (figures_of(scale * fresh(300), points) for scale in (1.0, 0.2, 3.0))
    assert abs(own["distance"]) < 4.0 * own["distance_se"]
    for bad in (collapsed, blown_up):
        assert bad["distance"] > bad["distance_floor"] + 10.0 * bad["distance_floor_se"]
        assert bad["sliced_wasserstein"] > 3.0 * bad["sliced_wasserstein_floor"]
    assert collapsed["precision"] > 0.95 and collapsed["recall"] < 0.3
    assert blown_up["precision"] < 0.7 and blown_up["recall"] > 0.8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_infinitely_far(dataset, bad):
    samples = dataset.test[:20].clone()
    samples[3].view(-1)[1] = bad
    figures = figures_of(samples, dataset)
    assert figures["distance"] == math.inf
    assert not copies(figures, prefix="")


def test_too_few_held_out_examples_say_nothing_of_copies(digits):
    """A sample's next-nearest needs a second one."""
    judge = SampleJudge(replace(digits, train=Examples(digits.train[:1])), digits.val[:1])
    assert judge._nearness(digits.test[:5]) == {}


def test_the_nearest_training_examples_are_found_among_all(dataset):
    places = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    places = torch.cat([places, places[:100]])  # more than are looked up at once
    samples = dataset.train[places]
    shifted = samples + 1e-5
    assert len(samples) > 1024
    assert torch.equal(nearest_training_examples(dataset, shifted), samples)
    held_out, train = dataset.test[:40].flatten(1), dataset.train[:].flatten(1)
    nearest = [(train - example).square().sum(dim=1).argmin() for example in held_out]
    assert torch.equal(
        nearest_training_examples(dataset, dataset.test[:40]), dataset.train[torch.stack(nearest)]
    )


def test_only_the_first_training_examples_of_very_many_are_looked_at(points, monkeypatch):
    monkeypatch.setattr(sample_quality, "_MOST_EXAMPLES", 400)
    few = replace(points, train=Examples(points.train[:400]))
    samples = points.train[350:450]
    assert torch.equal(nearest_training_examples(points, samples), nearest_training_examples(few, samples))
    figures = figures_of(samples, points)
    assert figures["nn_train"] == pytest.approx(figures_of(samples, few)["nn_train"], rel=1e-9)
    assert 0.5 <= figures["copied"] < 0.7
