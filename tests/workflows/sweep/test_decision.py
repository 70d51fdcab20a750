"""The rule for the champion, on differences that are made up."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.evaluation.distances import Estimate
from workflows.sweep.decision import (
    Comparison,
    Finalist,
    choose_finalists,
    compare_finalists,
    decide,
    settle,
    with_training_seed,
)


def finalist(name, objective=1.0, *, distance=0.1, auc=0.6, copies=False, cost=1.0):
    distances = {"distance": Estimate(distance, 0.01), "auc": Estimate(auc, 0.01)}
    return Finalist(name=name, objective=objective, distances=distances, copies=copies, cost=cost)


class Measured:
    """Differences as if measured: true values with errors that halve whenever the samples are doubled twice.

    Args:
        finalists: the finalists, whose values are the true ones.
        objective_error: standard error of a difference of objectives.
        distance_error: standard error of a difference of distances in round 0.
    """

    def __init__(self, *finalists, objective_error=0.01, distance_error=0.01):
        self.by_name = {each.name: each for each in finalists}
        self.errors = objective_error, distance_error
        self.calls = []

    def __call__(self, first, second, round):
        self.calls.append((first, second, round))
        a, b = self.by_name[first], self.by_name[second]
        objective_error, distance_error = self.errors
        error = distance_error / math.sqrt(2**round)
        return Comparison(
            Estimate(a.objective - b.objective, objective_error),
            {
                name: Estimate(a.distances[name].value - b.distances[name].value, error)
                for name in ("distance", "auc")
            },
            1000 * 2**round,
        )


def decided(*finalists, **errors):
    return decide(finalists, Measured(*finalists, **errors))


def test_samples_closer_by_both_distances_win_over_the_objective():
    decision = decided(finalist("a", 1.0, distance=0.5, auc=0.9), finalist("b", 1.02, distance=0.1, auc=0.6))
    assert decision.ranking == ("b", "a")
    (sentence,) = decision.sentences()
    assert sentence.startswith("chosen over trial a, whose objective is better by 2.0 standard errors, since")
    assert "sample/auc (30.0 standard errors) and sample/distance (40.0 standard errors)" in sentence


@pytest.mark.parametrize(
    ("distance", "auc"), [(0.5, 0.6), (0.1, 0.9), (0.5, 0.3)], ids=["one", "the other", "they disagree"]
)
def test_one_distance_alone_does_not_overrule_the_objective(distance, auc):
    decision = decided(finalist("a", 1.0, distance=distance, auc=auc), finalist("b", 1.2))
    assert decision.ranking == ("a", "b")
    assert "its objective is better by 20.0 standard errors" in decision.sentences()[0]


@pytest.mark.parametrize("name", ["distance", "auc"])
def test_one_distance_decides_where_nothing_else_does(name):
    """The objectives are equal, "b" is half as expensive, and "a" is closer by 3.1 standard errors of one."""
    a, b = finalist("a"), finalist("b", cost=0.5, **{name: {"distance": 0.1, "auc": 0.6}[name] + 0.031})
    measured = Measured(a, b)
    decision = decide([a, b], measured)
    assert decision.ranking == ("a", "b") and decision.outcomes[0].grounds == "one distance"
    assert {call[2] for call in measured.calls} == {0}, "no more samples are needed"
    (sentence,) = decision.sentences()
    assert sentence.endswith(f"closer to the data by sample/{name} (3.1 standard errors)")


@pytest.mark.parametrize(
    ("distance", "auc", "winner"), [(0.029, 0.0, None), (0.05, -0.021, None), (0.05, -0.019, "a")]
)
def test_one_distance_needs_three_standard_errors_and_no_contradiction(distance, auc, winner):
    differences = {"distance": Estimate(-distance, 0.01), "auc": Estimate(-auc, 0.01)}
    comparison = Comparison(Estimate(0.0, 0.01), differences, 512)
    outcome = compare_finalists(finalist("a"), finalist("b"), comparison)
    assert (outcome and outcome.winner) == winner
    mirrored = compare_finalists(finalist("b"), finalist("a"), comparison.reversed())
    assert (mirrored and mirrored.winner) == winner


def test_two_percent_of_the_cost_do_not_count():
    """Embeddings of other sizes make models of one network differ by that much."""
    a, b = finalist("a", 1.0, cost=1.0), finalist("b", 1.001, cost=0.98)
    assert decided(a, b).ranking == ("a", "b")
    assert decided(a, finalist("b", 1.001, cost=0.94)).ranking == ("b", "a")


def test_of_two_with_the_same_objective_the_cheaper_comes_first_however_little_it_saves():
    assert decided(finalist("a", cost=1.0), finalist("b", cost=0.99)).champion == "b"


def test_the_training_seed_belongs_to_the_error_of_the_objective():
    difference = with_training_seed(Estimate(0.004, 0.001), 0.002)
    assert difference.standard_error == pytest.approx(math.sqrt(0.001**2 + 2 * 0.002**2))
    a, b = finalist("a"), finalist("b")
    equal = dict.fromkeys(("distance", "auc"), Estimate(0.0, 1.0))
    assert compare_finalists(a, b, Comparison(Estimate(0.004, 0.001), equal, 9)).winner == "b"
    assert compare_finalists(a, b, Comparison(difference, equal, 9)) is None


def test_more_samples_are_drawn_until_the_first_two_are_told_apart():
    """The differences are 1.5 standard errors in round 0, 2.1 in round 1."""
    finalists = [finalist("a", 1.0, distance=0.115, auc=0.615), finalist("b", 1.001)]
    measured = Measured(*finalists)
    decision = decide(finalists, measured)
    assert decision.champion == "b" and decision.outcomes[0].grounds == "samples"
    assert decision.outcomes[0].comparison.num_samples == 2000
    assert measured.calls == [("a", "b", 0), ("a", "b", 1)]


def test_two_that_no_round_tells_apart_are_equal_and_the_cheaper_one_wins():
    finalists = [finalist("a", 1.0, cost=200.0), finalist("b", 1.001, cost=100.0)]
    measured = Measured(*finalists)
    decision = decide(finalists, measured)
    assert [round for *_, round in measured.calls] == [0, 1, 2]
    assert decision.ranking == ("b", "a") and decision.outcomes[0].grounds == "cost"
    assert decision.sentences() == [
        "chosen over trial a, whose objective is better by 0.1 standard errors, since the two cannot be told "
        "apart with 4000 samples each, and it costs 0.5 times as much to run"
    ]
    same_cost = [finalist("a", 1.0), finalist("b", 1.001)]
    assert decide(same_cost, Measured(*same_cost)).champion == "a"


def test_no_more_samples_are_drawn_for_those_behind_the_first_two():
    finalists = [finalist("a", 1.0), finalist("b", 1.5), finalist("c", 1.501)]
    measured = Measured(*finalists)
    assert decide(finalists, measured).ranking == ("a", "b", "c")
    assert {round for *_, round in measured.calls} == {0}


def test_a_copier_wins_only_where_all_copy():
    copier = finalist("a", 0.5, distance=0.0, auc=0.5, copies=True)
    assert decided(copier, finalist("b")).ranking == ("b", "a")
    assert "the other copies training examples" in decided(copier, finalist("b")).sentences()[0]
    assert decided(copier, finalist("b", copies=True)).ranking == ("a", "b")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_loses(bad):
    good = finalist("z", 9.0, distance=9.0, auc=1.0)
    for broken in (finalist("a", bad), finalist("a", distance=bad), finalist("a", auc=bad)):
        assert decided(broken, good).ranking == ("z", "a")
        assert decided(broken, finalist("z", 9.0, copies=True)).champion == "z"
        json.dumps(decided(broken, good).to_dict(), allow_nan=False)


def test_in_a_circle_the_lowest_objective_wins():
    """By the samples a beats b, b beats c, and c beats a."""
    better = {("a", "b"), ("b", "c"), ("c", "a")}

    def compare(first, second, round):
        sign = -1.0 if (first, second) in better else 1.0
        return Comparison(Estimate(0.0, 1.0), dict.fromkeys(("distance", "auc"), Estimate(sign, 0.1)), 9)

    finalists = [finalist(name, objective) for name, objective in (("a", 3.0), ("b", 1.0), ("c", 2.0))]
    decision = decide(finalists, compare)
    assert decision.champion == "b"
    assert any("although trial a beats it" in sentence for sentence in decision.sentences())


def test_one_that_a_circle_beats_does_not_win_for_its_objective():
    """a beats x, which equals all others; a, b and c go in a circle, in which b has the lowest objective."""
    better = {("a", "b"), ("b", "c"), ("c", "a"), ("a", "x")}

    def compare(first, second, round):
        sign = ((second, first) in better) - ((first, second) in better)
        return Comparison(Estimate(0.0, 1.0), dict.fromkeys(("distance", "auc"), Estimate(sign, 0.1)), 9)

    objectives = {"x": 0.0, "a": 3.0, "b": 1.0, "c": 2.0}
    decision = decide([finalist(*each) for each in objectives.items()], compare)
    assert decision.ranking == ("b", "c", "a", "x")


def test_a_cheap_second_that_another_one_beats_does_not_replace_an_equal_first():
    """f equals all others, which go in a circle, where a is preferred for its objective; c beats a."""
    better = {("a", "b"), ("b", "c"), ("c", "a")}

    def compare(first, second, round):
        sign = 0.0 if "f" in (first, second) else -1.0 if (first, second) in better else 1.0
        return Comparison(Estimate(0.0, 1.0), dict.fromkeys(("distance", "auc"), Estimate(sign, 0.1)), 9)

    others = [finalist(name, 2.0 + rank, cost=0.5) for rank, name in enumerate("abc")]
    assert decide([finalist("f", 1.0), *others], compare).ranking[:2] == ("f", "a")
    assert decide([finalist("f", 1.0), others[0]], compare).champion == "a", "the cheaper of two equal ones"


def test_a_single_finalist_is_the_champion_without_any_comparison():
    decision = decide([finalist("a")], None)
    assert decision.ranking == ("a",) and decision.sentences() == ["the only trial with a usable model"]
    with pytest.raises(ValueError, match="no finalists"):
        decide([], None)


def test_settling_draws_more_samples_and_leaves_equal_ones_equal():
    a, b = finalist("a"), finalist("b", distance=0.1001)
    measured = Measured(a, b)
    assert settle(a, b, measured) is None and len(measured.calls) == 3
    assert settle(a, finalist("b", distance=0.2, auc=0.7), Measured(a, finalist("b", distance=0.2, auc=0.7)))


def differences(*values, error=0.01):
    return {f"t{index}": Estimate(value, error) for index, value in enumerate(values)}


def test_finalists_are_all_within_three_errors_of_the_best_from_four_to_six():
    assert choose_finalists(differences(0.5, 0.0, 0.9, 0.4, 0.8, 0.7)) == ["t1", "t3", "t0", "t5"]
    assert choose_finalists(differences(0.0, 0.01, 0.02, 0.03, 0.029, 0.031)) == [
        "t0",
        "t1",
        "t2",
        "t4",
        "t3",
    ]
    assert len(choose_finalists(differences(*[0.001 * index for index in range(9)]))) == 6
    assert choose_finalists(differences(0.0, 0.5)) == ["t0", "t1"]


values = st.sampled_from([0.0, 0.01, 0.02, 0.03, 0.05, 0.1, math.nan, math.inf])
many = st.lists(
    st.tuples(values, values, values, st.booleans(), st.sampled_from([1.0, 2.0])), min_size=1, max_size=5
)


@given(many, st.randoms(use_true_random=False))
def test_the_order_of_the_finalists_does_not_matter_and_no_one_beats_the_champion(rows, random):
    finalists = [
        finalist(f"t{index}", objective, distance=distance, auc=auc, copies=copies, cost=cost)
        for index, (objective, distance, auc, copies, cost) in enumerate(rows)
    ]
    shuffled = random.sample(finalists, len(finalists))
    decision, again = (decide(order, Measured(*finalists)) for order in (finalists, shuffled))
    assert decision.to_dict() == again.to_dict()
    assert sorted(decision.ranking) == sorted(each.name for each in finalists)
    champion = decision.finalists[decision.champion]
    if any(each.is_finite for each in finalists):
        assert champion.is_finite
        if any(each.is_finite and not each.copies for each in finalists):
            assert not champion.copies
    for outcome in decision.outcomes:
        assert outcome.winner == champion.name or "circle" in " ".join(decision.sentences())


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 1)), min_size=6, max_size=6),
    st.permutations("abcd"),
)
def test_outcomes_of_any_kind_end_with_the_same_champion_in_any_order(objectives_and_signs, order):
    """Signs of the six pairs of four finalists are drawn freely, so that circles occur."""
    pairs = [(first, second) for first in "abcd" for second in "abcd" if first < second]
    signs = dict(zip(pairs, (sign for _, sign in objectives_and_signs), strict=True))
    finalists = {
        name: finalist(name, float(objective))
        for name, (objective, _) in zip("abcd", objectives_and_signs, strict=False)
    }

    def compare(first, second, round):
        difference = Estimate(float(signs[first, second]), 0.1)
        return Comparison(Estimate(0.0, 1.0), {"distance": difference, "auc": difference}, 9)

    in_order = decide(finalists.values(), compare)
    assert decide([finalists[name] for name in order], compare).ranking == in_order.ranking
