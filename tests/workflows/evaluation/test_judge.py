"""Judging of candidates: planted faults are found, and the best is named."""

import dataclasses

import numpy as np
import pytest

from diffusion.evaluation.distances import Estimate
from tests.diffusion.conftest import make_gaussian_dataset
from workflows.evaluation.candidates import Candidate
from workflows.evaluation.judge import Judged, judge, normalised


def make_dataset(num_train, num_val):
    """Normal points, stored with another mean and scale."""
    plain = make_gaussian_dataset(num_train=num_train, num_val=num_val)
    spec = dataclasses.replace(plain.spec, mean=[5.0, -3.0], std=[2.0, 0.1])
    return dataclasses.replace(plain, spec=spec)


@pytest.fixture(scope="module")
def dataset():
    return make_dataset(750, 250)


@pytest.fixture(scope="module")
def large():
    """Enough examples to say something about copies."""
    return make_dataset(1500, 500)


def candidate(name, dataset, scale=1.0, count=400, seed=3, trained_on=None):
    points = scale * np.random.default_rng(seed).normal(size=(count, 2))
    return Candidate(name, points * dataset.spec.std + np.array(dataset.spec.mean), trained_on)


def test_samples_are_normalised_as_the_data_are(dataset):
    raw = dataset.raw(dataset.val[:])
    np.testing.assert_allclose(normalised(raw, dataset), dataset.val[:], atol=1e-5)


@pytest.mark.parametrize("add_training", [True, False])
def test_the_best_is_first_and_the_others_are_compared_with_it(dataset, add_training):
    given = [candidate("wide", dataset, 2.0), candidate("good", dataset), candidate("wider", dataset, 3.0)]
    judged = judge(given, dataset, None, add_training=add_training)
    assert [each.candidate.name for each in judged] == ["good", "wide", "wider"]
    assert [each.outcome for each in judged] == [
        "the best",
        "worse by distance and auc",
        "worse by distance and auc",
    ]
    assert judged[0].from_best == {} and judged[0].metrics["num_reference"] == (1100 if add_training else 500)
    for each in judged[1:]:
        for name, difference in each.from_best.items():
            expected = each.metrics[name] - judged[0].metrics[name]
            assert difference.value == pytest.approx(expected, abs=1e-6) and difference.standard_error > 0.0


def test_equally_good_candidates_are_not_told_apart(dataset):
    judged = judge([candidate("a", dataset), candidate("b", dataset, seed=4)], dataset, None)
    assert judged[1].outcome == "not told apart from the best"


def test_one_that_copies_comes_last_however_close_it_is(large):
    copies = Candidate("copies", large.raw(large.train[:800]))
    judged = judge([copies, candidate("wide", large, 1.5, count=800)], large, None, add_training=True)
    assert [each.candidate.name for each in judged] == ["wide", "copies"]
    assert [each.verdict for each in judged] == ["no sign", "copies"]
    assert judged[1].outcome == "better by distance and auc"


def test_nothing_is_said_about_copies_of_a_model_of_other_data(large):
    own, other = large.spec.fingerprint, "f" * 64
    given = [
        candidate("own", large, count=800, trained_on=own),
        candidate("other", large, count=800, trained_on=other, seed=9),
    ]
    verdicts = {each.candidate.name: each.verdict for each in judge(given, large, None)}
    assert verdicts == {"own": "no sign", "other": None}


def test_all_are_judged_by_equally_many_samples(dataset):
    given = [candidate("few", dataset, count=200), candidate("many", dataset, count=500)]
    judged = judge(given, dataset, None)
    assert {each.metrics["num_samples"] for each in judged} == {200}


def test_samples_that_are_not_finite_are_the_worst(dataset):
    broken = candidate("broken", dataset)
    broken.samples[4, 1] = np.nan
    judged = judge([broken, candidate("wide", dataset, 4.0)], dataset, None)
    assert [each.candidate.name for each in judged] == ["wide", "broken"]
    assert judged[1].metrics["distance"] == np.inf and np.isnan(judged[1].from_best["distance"].value)


@pytest.mark.parametrize(
    ("distance", "auc", "outcome"),
    [
        (2.1, 1.9, "worse by distance"),
        (2.1, 2.1, "worse by distance and auc"),
        (-2.1, 2.1, "worse by auc, better by distance"),
        (-1.9, -2.1, "better by auc"),
        (1.9, -1.9, "not told apart from the best"),
        (np.nan, np.nan, "not told apart from the best"),
    ],
)
def test_outcomes_are_differences_beyond_two_standard_errors(dataset, distance, auc, outcome):
    differences = {"distance": Estimate(distance, 1.0), "auc": Estimate(auc, 1.0)}
    assert Judged(candidate("a", dataset), {}, None, differences).outcome == outcome
