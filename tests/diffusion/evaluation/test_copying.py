"""The verdict on copies of training examples: planted ones are found, chance and the data are not blamed."""

import itertools
import math

import pytest
import torch
from scipy.stats import fisher_exact

from diffusion.config import DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.evaluation.copying import copying_metrics, copying_verdict


def normal(count, dims=3, seed=0):
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))


def with_copies(samples, train, fraction, noise=0.0, seed=9):
    """The samples, the first ones replaced by random training examples with noise."""
    generator = torch.Generator().manual_seed(seed)
    count = round(fraction * len(samples))
    chosen = train[torch.randint(len(train), (count,), generator=generator)]
    return torch.cat([chosen + noise * torch.randn(chosen.shape, generator=generator), samples[count:]])


def verdict(samples, train, held_out):
    return copying_verdict(copying_metrics(samples, train, held_out), prefix="")


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def heart():
    return load_dataset(DataConfig(name="heart"))


def test_training_examples_are_copies_and_held_out_ones_are_not(digits):
    train, held_out = digits.train[:], digits.val[:]
    metrics = copying_metrics(train[:200], train, held_out)
    assert metrics["copied"] == 1.0 and metrics["copied_p"] < 1e-6
    assert metrics["nn_train"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["nn_heldout"] > 5.0 * metrics["nn_se"]
    assert verdict(train[:200], train, held_out) == "copies"
    assert verdict(digits.test[:], train, held_out) == "no sign"


@pytest.mark.parametrize("noise", [0.0, 1.0 / 30.0])
def test_four_percent_of_copies_are_found_among_images(digits, noise):
    """The noise is a thirtieth of a pixel's deviation; the other samples are the test split, twice."""
    others = torch.cat([digits.test[:], digits.test[:].flip(0)])
    samples = with_copies(others, digits.train[:], 0.04, noise)
    metrics = copying_metrics(samples, digits.train[:], digits.val[:])
    assert copying_verdict(metrics, prefix="") == "copies"
    assert metrics["copied"] == pytest.approx(0.04, abs=0.01)


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_four_percent_of_copies_are_found_in_a_table(noise):
    train, held_out = normal(3000), normal(700, seed=1)
    samples = with_copies(normal(2000, seed=2), train, 0.04, noise)
    assert verdict(samples, train, held_out) == "copies"
    assert verdict(normal(2000, seed=2), train, held_out) == "no sign"


def test_exact_copies_are_found_on_a_curve_where_a_fifth_of_new_examples_look_like_copies(heart):
    train, held_out = heart.train[:], heart.val[:]
    others = heart.test[:]
    samples = others[torch.arange(4000) % len(others)]
    metrics = copying_metrics(samples, train, held_out)
    assert metrics["copied_floor"] > 0.15
    assert copying_verdict(metrics, prefix="") != "copies"
    assert verdict(with_copies(samples, train, 0.04), train, held_out) == "copies"


def test_half_of_the_samples_are_found_to_be_copies_of_98_rows_with_21_held_out():
    train, held_out, others = normal(98), normal(21, seed=1), normal(1000, seed=2)
    assert verdict(with_copies(others, train, 0.52, 0.002), train, held_out) == "copies"
    metrics = copying_metrics(with_copies(others, train, 0.1, 0.002), train, held_out)
    assert copying_verdict(metrics, prefix="") == "too little data"
    assert 0.2 < metrics["copied_detectable"] < 0.9


def test_without_copies_p_values_are_as_large_as_they_claim():
    """Both kinds of examples are new to the model; Bonferroni's and exact tests err on the large side."""
    p_values = []
    for seed in range(150):
        train, held_out, samples = (normal(count, 2, 3 * seed + i) for i, count in enumerate((150, 80, 120)))
        p_values.append(copying_metrics(samples, train, held_out)["copied_p"])
    for level in (0.02, 0.1, 0.3):
        expected = level * len(p_values)
        assert sum(p <= level for p in p_values) <= expected + 3.0 * math.sqrt(expected)
    assert min(p_values) > 0.001


@pytest.mark.parametrize(("num_train", "num_held_out", "n"), [(400, 100, 400), (100, 400, 200)])
def test_what_the_test_says_it_detects_is_found_four_times_of_five(num_train, num_held_out, n):
    """Copies are barely closer than a third, where only the first of the four ratios counts them."""
    found: dict[float, list[bool]] = {0.5: [], 1.0: [], 1.6: []}
    for seed in range(40):
        train, held_out, samples = (
            normal(count, 2, 3 * seed + i) for i, count in enumerate((num_train, num_held_out, n))
        )
        detectable = copying_metrics(samples, train, held_out)["copied_detectable"]
        for share in found:
            copied = with_copies(samples, train, 0.0)
            count = round(min(1.0, share * detectable) * n)
            to_second, second = torch.cdist(train, train).fill_diagonal_(math.inf).min(dim=1)
            chosen = torch.arange(count) % num_train
            # 0.24 of the way to the nearest other example: 0.32 times as far from one as from the other.
            copied[:count] = train[chosen] + 0.24 * (train[second] - train)[chosen]
            found[share].append(verdict(copied, train, held_out) == "copies")
    rates = [sum(each) / len(each) for each in found.values()]
    assert rates[0] < 0.5 < 0.6 < rates[1] < 1.0 and rates[2] > 0.9, rates


def test_near_duplicates_in_the_data_are_not_blamed_on_the_model():
    """Examples come in clusters far smaller than the distances between them, as frames of one scene do."""
    centres = normal(100, 8, seed=1)

    def draw(count, seed):
        generator = torch.Generator().manual_seed(seed)
        chosen = centres[torch.randint(len(centres), (count,), generator=generator)]
        return chosen + 1e-3 * torch.randn(chosen.shape, generator=generator)

    train, held_out = draw(600, 2), draw(200, 3)
    assert verdict(draw(1000, 4), train, held_out) == "no sign"
    assert verdict(with_copies(draw(1000, 4), train, 0.2), train, held_out) == "copies"


def test_samples_at_repeated_training_rows_are_no_copies():
    """A model has to draw a row that makes up a tenth of the data, on whichever side of a split it stands."""
    train = torch.cat([normal(500), torch.zeros(50, 3)])
    samples = torch.cat([normal(500, seed=1), torch.zeros(50, 3)])
    assert verdict(samples, train, normal(700, seed=2)) == "no sign"


def test_the_p_value_is_that_of_fishers_exact_test_with_four_ratios():
    """In one dimension, with the training examples at 0 and 1, ratios can be planted."""
    train = torch.tensor([[0.0], [1.0]])
    at = {"far": 0.4, "third": 0.2, "tenth": 0.05}
    samples = torch.tensor([[at["far"]]] * 10 + [[at["third"]]] * 6 + [[at["tenth"]]] * 4)
    held_out = torch.tensor([[at["far"]]] * 15 + [[at["third"]]] * 5)
    metrics = copying_metrics(samples, train, held_out)
    assert (metrics["copied"], metrics["copied_floor"]) == (0.5, 0.25)
    expected = [
        fisher_exact([[10, 10], [5, 15]], alternative="greater").pvalue,
        fisher_exact([[4, 16], [0, 20]], alternative="greater").pvalue,
    ]
    assert metrics["copied_p"] == pytest.approx(4.0 * min(expected))


@pytest.mark.parametrize(
    ("copied", "floor", "p_value", "detectable", "expected"),
    [
        (0.5, 0.1, 1e-4, 0.02, "copies"),
        (0.5, 0.1, 1e-4, 1.0, "copies"),
        (0.5, 0.1, 0.002, 0.02, "no sign"),
        (0.5, 0.1, 0.002, 0.11, "too little data"),
        (0.105, 0.1, 1e-9, 0.02, "no sign"),
        (0.0, 0.1, 1.0, 0.1, "no sign"),
    ],
)
def test_the_verdict_needs_a_small_p_value_and_an_excess(copied, floor, p_value, detectable, expected):
    metrics = {"copied": copied, "copied_floor": floor, "copied_p": p_value, "copied_detectable": detectable}
    for prefix in ("sample/", "test/sample_"):
        assert copying_verdict({prefix + key: metrics[key] for key in metrics}, prefix) == expected


def test_metrics_of_earlier_versions_say_nothing():
    assert copying_verdict({"sample/copied": 0.9, "sample/copied_floor": 0.0}) == "too little data"
    assert copying_verdict({}) == "too little data"


def test_fresh_samples_are_as_close_to_training_as_to_held_out_data():
    """If the sets outnumber the samples, the differences in ten draws are as large as `nn_se` predicts."""
    z_scores = []
    for seed in range(10):
        train, held_out, samples = (
            normal(count, 2, 3 * seed + i) for i, count in enumerate((1500, 1000, 100))
        )
        metrics = copying_metrics(samples, train, held_out)
        z_scores.append((metrics["nn_train"] - metrics["nn_heldout"]) / metrics["nn_se"])
    # Chi-squared with ten degrees of freedom: 1% lies below 2.6, and 1% above 23.
    assert 2.6 < sum(z**2 for z in z_scores) < 23.0


def test_distances_to_the_nearest_are_root_mean_squares_over_dimensions(digits):
    """One pixel of 64 is off by 0.4, so the root mean square is 0.4 / 8."""
    samples = digits.train[:50].clone()
    samples[:, 0, 3, 4] += 0.4
    metrics = copying_metrics(samples, digits.train[:], digits.val[:])
    assert metrics["nn_train"] == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize(("num_train", "num_held_out"), itertools.product((1, 5), (1, 5)))
def test_the_next_nearest_example_needs_a_second_one(num_train, num_held_out):
    metrics = copying_metrics(normal(6), normal(num_train, seed=1), normal(num_held_out, seed=2))
    assert bool(metrics) == (num_train > 1 and num_held_out > 1)
