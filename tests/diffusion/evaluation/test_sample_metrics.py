"""Metrics of samples and their floors."""

import math
import pickle
from dataclasses import replace

import pytest
import torch

from diffusion.config import DataConfig
from diffusion.data.dataset import Split, load_dataset
from diffusion.evaluation import sample_metrics
from diffusion.evaluation.distances import frechet_distance, kernel_distance, kernel_inception_distance
from diffusion.evaluation.features import fit_features
from diffusion.evaluation.neighbours import precision_and_recall
from diffusion.evaluation.sample_metrics import SampleMetrics, nearest_training_examples
from diffusion.evaluation.two_sample_auc import classifier_auc, pixel_auc
from tests.diffusion.conftest import make_gaussian_dataset

pytestmark = pytest.mark.usefixtures("few_trees")

NEIGHBOUR_METRICS = {
    "nn_train",
    "nn_heldout",
    "nn_se",
    "copied",
    "copied_floor",
    "copied_p",
    "copied_detectable",
    "num_samples",
    "num_reference",
    "num_heldout",
}
# Names with a standard error.
OF_POINTS = {
    *("distance", "kernel", "auc", "energy", "neighbour_kl", "precision", "recall"),
    *("column_ks", "column_ks_mean", "correlation"),
}
OF_IMAGES = {
    *("distance", "kernel", "auc", "frechet", "kid", "feature_auc", "pixel_auc", "spectrum", "colour_spread"),
}


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def points():
    return make_gaussian_dataset(num_train=1000, num_val=300)


@pytest.fixture(params=["digits", "points"])
def dataset(request):
    """A data set of images, then one of points."""
    return request.getfixturevalue(request.param)


def metrics_of(samples, dataset):
    return SampleMetrics(dataset, dataset.val[:]).compute(samples)


def fresh(count, seed=1):
    """New samples from the distribution of the points."""
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def with_floors(names, without_error=frozenset()):
    return {f"{name}{floor}" for name in {*names, *without_error} for floor in ("", "_floor")} | {
        f"{name}{floor}_se" for name in names for floor in ("", "_floor")
    }


def test_points_have_all_metrics_and_floors(points):
    """The reference is 300 validation and 800 training examples; the floor is of the other 200."""
    samples = 1.2 * fresh(150)
    metrics = metrics_of(samples, points)
    expected = with_floors(OF_POINTS, {"sliced_wasserstein", "worst_column"})
    assert metrics.keys() == expected | NEIGHBOUR_METRICS
    reference = torch.cat([points.val[:], points.train[:800]])
    for examples, suffix in ((samples, ""), (points.train[800:950], "_floor")):
        for name, distance in (("distance", kernel_distance), ("auc", classifier_auc)):
            estimate = distance(examples, reference)
            assert metrics[f"{name}{suffix}"] == pytest.approx(estimate.value, abs=1e-9)
            assert metrics[f"{name}{suffix}_se"] == pytest.approx(estimate.standard_error, abs=1e-9)
        precision, recall = precision_and_recall(examples, reference)
        assert metrics[f"precision{suffix}"] == precision.value
        assert metrics[f"recall{suffix}"] == recall.value
    counts = [metrics[f"num_{name}"] for name in ("samples", "reference", "heldout")]
    assert counts == [150, 1100, 300]


def test_images_have_all_metrics_and_floors(digits):
    samples = digits.test[:100] + 0.3
    metrics = metrics_of(samples, digits)
    assert metrics.keys() == with_floors(OF_IMAGES) | NEIGHBOUR_METRICS
    features_of = fit_features(digits, "random")
    added = 4 * len(digits.train) // 5
    raw = [
        torch.from_numpy(digits.raw(each))
        for each in (
            torch.cat([digits.val[:], digits.train[:added]]),
            samples,
            digits.train[added : added + 100],
        )
    ]
    held_out, *both = (features_of(each) for each in raw)
    for features, suffix in zip(both, ("", "_floor"), strict=True):
        for name, distance in (
            ("distance", kernel_distance),
            ("kid", kernel_inception_distance),
            ("frechet", frechet_distance),
        ):
            expected = distance(features, held_out)
            assert metrics[f"{name}{suffix}"] == pytest.approx(expected.value, rel=1e-6)
            assert metrics[f"{name}{suffix}_se"] == pytest.approx(expected.standard_error, rel=1e-6)
    pixels = [(each / 16.0 * 255.0).round() for each in raw]
    assert metrics["auc"] == metrics["pixel_auc"] == pixel_auc(pixels[1], pixels[0]).value
    assert metrics["distance"] > metrics["distance_floor"] + 3.0 * metrics["distance_floor_se"]
    alone = SampleMetrics(digits, digits.val[:]).distance(samples)
    assert (metrics["distance"], metrics["distance_se"]) == (alone.value, alone.standard_error)


@pytest.mark.parametrize("add_training", [True, False])
def test_the_reference_is_filled_with_training_examples_unless_told_not_to(points, monkeypatch, add_training):
    """Up to a limit, the validation split first; the floor's rows are others."""
    monkeypatch.setattr(sample_metrics, "MAX_REFERENCE", 500)
    metrics = SampleMetrics(points, points.val[:], None, add_training).compute(points.test[:50])
    added = 200 if add_training else 0
    assert metrics["num_reference"] == 300 + added and metrics["num_heldout"] == 300
    reference = torch.cat([points.val[:], points.train[:added]])
    floor = kernel_distance(points.train[added : added + 50], reference)
    assert metrics["distance_floor"] == pytest.approx(floor.value, abs=1e-9)


def test_a_difference_is_that_of_both_deciding_metrics_and_knows_pairs(dataset):
    measure = SampleMetrics(dataset, dataset.val[:])
    a, b = dataset.test[:60], dataset.test[:60] + 0.1
    difference = measure.difference(a, b)
    assert difference.keys() == {"distance", "auc"}
    of_a, of_b = measure.distance(a), measure.distance(b)
    assert difference["distance"].value == pytest.approx(of_a.value - of_b.value, abs=1e-6)
    unpaired = math.hypot(of_a.standard_error, of_b.standard_error)
    # Features of a random network change more from a to b than between examples.
    assert (
        0.0
        < difference["distance"].standard_error
        < (1.0 if dataset.spec.kind == "points" else 1.2) * unpaired
    )
    assert difference["auc"].standard_error > 0.0
    if dataset.spec.kind == "points":
        assert difference["auc"].value < 0.0
    same = measure.difference(a, a)
    assert all((each.value, each.standard_error) == (0.0, 0.0) for each in same.values())


def test_floors_are_the_metrics_of_an_equal_number_of_training_examples(points):
    apart = points.train[:][800:]
    metrics = metrics_of(apart[:80], points)
    floors = [name for name in metrics if "_floor" in name and name != "copied_floor"]
    assert len(floors) >= 5
    for name in floors:
        assert metrics[name] == metrics[name.replace("_floor", "")]
    more = metrics_of(torch.cat([apart, apart[:9]]), points)
    assert more["distance_floor"] == SampleMetrics(points, points.val[:]).distance(apart).value


@pytest.fixture(name="measured")
def _measured(monkeypatch):
    """How many sets of examples have been measured, in a process that knows no floor yet."""
    measured, compute = [], SampleMetrics._distances
    monkeypatch.setattr(sample_metrics, "_REFERENCES", {})
    monkeypatch.setattr(
        SampleMetrics, "_distances", lambda self, views: measured.append(1) or compute(self, views)
    )
    return measured


def test_floors_of_the_same_data_are_measured_once_in_a_process(dataset, measured):
    samples = dataset.train[:50]
    first = metrics_of(samples, dataset)
    copy = pickle.loads(pickle.dumps(dataset))  # as each trial has one
    assert metrics_of(samples, copy) == first
    assert len(measured) == 3, "the samples twice, and the floor"


def test_floors_of_other_data_or_of_another_number_of_samples_are_measured_again(points, measured):
    reference = SampleMetrics(points, points.val[:])
    floors = {
        "same": reference.compute(fresh(50)),
        "fewer": reference.compute(fresh(40)),
        "test split": SampleMetrics(points, points.test[:]).compute(fresh(50)),
        "alone": SampleMetrics(points, points.val[:], add_training=False).compute(fresh(50)),
    }
    assert len(measured) == 8
    assert len({each["kernel_floor"] for each in floors.values()}) == 4


def test_few_references_are_kept_and_large_ones_are_not(points, measured, monkeypatch):
    for count in (100, 150, 200):
        SampleMetrics(points, points.val[:count]).compute(fresh(50))
    assert len(sample_metrics._REFERENCES) == 2
    monkeypatch.setattr(sample_metrics, "_REFERENCES", {})
    monkeypatch.setattr(sample_metrics, "_MAX_REFERENCE_VALUES", 10)
    metrics_of(fresh(50), points)
    assert not sample_metrics._REFERENCES


def test_images_are_compared_by_random_features_by_default(digits):
    features = fit_features(digits, "random")
    expected = SampleMetrics(digits, digits.val[:], features).compute(digits.test[:50])
    assert metrics_of(digits.test[:50], digits) == expected


def test_worse_samples_have_larger_distances_and_lower_precision_or_recall(points):
    good, collapsed, blown_up = (metrics_of(scale * fresh(300), points) for scale in (1.0, 0.2, 3.0))
    assert abs(good["distance"]) < 4.0 * good["distance_se"]
    for bad in (collapsed, blown_up):
        assert bad["distance"] > bad["distance_floor"] + 10.0 * bad["distance_floor_se"]
        assert bad["auc"] > 0.5 + 5.0 * bad["auc_se"]
        assert bad["sliced_wasserstein"] > 3.0 * bad["sliced_wasserstein_floor"]
    assert collapsed["precision"] > 0.95 and collapsed["recall"] < 0.3
    assert blown_up["precision"] < 0.7 and blown_up["recall"] > 0.8


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_samples_that_are_not_finite_have_infinite_distance(points, bad):
    samples = points.test[:20].clone()
    samples[3].view(-1)[1] = bad
    metrics = metrics_of(samples, points)
    assert SampleMetrics(points, points.val[:]).distance(samples).value == math.inf
    assert metrics["distance"] == math.inf and metrics["auc"] == 1.0


def test_the_nearest_training_examples_are_the_nearest_of_all(dataset):
    indices = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    indices = torch.cat([indices, indices[:100]])  # more than one batch
    samples = dataset.train[indices]
    shifted = samples + 1e-5
    assert len(samples) > 1024
    assert torch.equal(nearest_training_examples(dataset, shifted), samples)
    held_out, train = dataset.test[:40].flatten(1), dataset.train[:].flatten(1)
    nearest = [(train - example).square().sum(dim=1).argmin() for example in held_out]
    assert torch.equal(
        nearest_training_examples(dataset, dataset.test[:40]), dataset.train[torch.stack(nearest)]
    )


def test_only_the_first_of_very_many_training_examples_are_used(points, monkeypatch):
    monkeypatch.setattr(sample_metrics, "MAX_TRAINING_EXAMPLES", 400)
    few = replace(points, train=Split(points.train[:400]))
    samples = points.train[350:450]
    assert torch.equal(nearest_training_examples(points, samples), nearest_training_examples(few, samples))
    metrics = metrics_of(samples, points)
    assert metrics["nn_train"] == pytest.approx(metrics_of(samples, few)["nn_train"], rel=1e-9)
    assert 0.5 <= metrics["copied"] < 0.7
