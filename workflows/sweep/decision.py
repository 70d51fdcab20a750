"""Decides which finalist of a sweep becomes its champion, and says why in words.

Nothing is measured here: `workflows.sweep.confirmation` draws the samples and measures them. The rule:

1. Finalists (`choose_finalists`) are all trials whose objective is within three standard errors of the best,
   at least 4 and at most 6. How a trial ended does not matter: one that the time budget cut or that was
   stopped early competes with the weights that it has.
2. Of two finalists (`compare_finalists`), one whose samples or objective are not finite loses; then one that
   was judged to copy training examples loses to one that was not.
3. Otherwise the samples decide, if both distances to the data (`sample/distance` and `sample/auc`, which see
   different things) prefer the same model, each by more than two standard errors of the difference. Chance
   alone prefers either by that much in 5% of the pairs, and both in the same direction less often.
4. Otherwise the objective decides, if its difference exceeds two standard errors. They include the share of
   the training seed: another seed moves the objective of the same config.
5. Otherwise one distance alone decides, if it prefers a model by more than three standard errors and the
   other distance does not prefer the other model by more than two.
6. Otherwise the two are not told apart. For the first two of the ranking, more samples are drawn then, in
   rounds that double their number; if the last round does not tell them apart either, they are declared
   equal, and the one that is cheaper to run by 5% or more comes first; of equally cheap ones that with the
   lower objective.

The champion is the finalist that no other one beats. Outcomes can go in a circle, where A beats B, B beats C
and C beats A: then the lowest objective in the circle decides. The second is the champion of the others, and
so on. The order in which finalists are given does not matter.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from diffusion.evaluation.distances import Estimate
from diffusion.metrics import OBJECTIVE, SAMPLE_PREFIX

MIN_FINALISTS, MAX_FINALISTS = 4, 6
_FINALISTS_WITHIN = 3.0  # standard errors of the best objective
_TOLD_APART = 2.0  # standard errors
_TOLD_APART_ALONE = 3.0  # standard errors of one distance
_CHEAPER = 0.95  # costs closer than this are equal
MAX_ROUNDS = 2  # of further samples for the first two: twice and four times as many
# Standard deviation of val/elbo_window over training seeds by kind of data, in nats per dimension: 0.0065 on
# the heart and on rings (benchmarks/results/judgement.md), whose windows end at a log-SNR of 9, and 0.0005 to
# 0.0014 on digits.
TRAINING_SEED_ERRORS: Mapping[str, float] = {"points": 0.007, "image": 0.001}

Grounds = Literal[
    "finite", "copying", "samples", "objective", "one distance", "cost", "objective within its error"
]


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """What is known of one finalist.

    Attributes:
        name: ID of its trial.
        objective: its objective; lower is better.
        distances: distances of its samples to the data by name, such as {"distance": ..., "auc": ...}.
        copies: whether it was judged to copy training examples.
        cost: cost of one sample: calls of the network times number of parameters.
    """

    name: str
    objective: float
    distances: Mapping[str, Estimate]
    copies: bool
    cost: float

    @property
    def is_finite(self) -> bool:
        """Whether its objective and all of its distances are finite numbers."""
        values = [self.objective, *(each.value for each in self.distances.values())]
        return all(math.isfinite(value) for value in values)


@dataclass(frozen=True)
class Comparison:
    """Measured differences between two finalists, first minus second; all are better if lower.

    Attributes:
        objective: difference of their objectives, its error with the share of the training seed.
        distances: differences of their samples' distances by name.
        num_samples: number of samples of each.
    """

    objective: Estimate
    distances: Mapping[str, Estimate]
    num_samples: int

    def reversed(self) -> "Comparison":
        """The same differences as second minus first."""
        negated = {name: _negated(each) for name, each in self.distances.items()}
        return Comparison(_negated(self.objective), negated, self.num_samples)


@dataclass(frozen=True)
class Outcome:
    """The outcome for two finalists.

    Attributes:
        winner: name of the better one.
        loser: name of the other one.
        grounds: what decided.
        comparison: the differences, winner minus loser.
        reason: why, as the end of a sentence that starts with the winner.
    """

    winner: str
    loser: str
    grounds: Grounds
    comparison: Comparison
    reason: str

    def sentence(self) -> str:
        """The outcome as a sentence about the winner."""
        return (
            f"chosen over trial {self.loser}, whose objective is {_relation(self.comparison.objective)}, "
            f"since {self.reason}"
        )


@dataclass(frozen=True)
class Decision:
    """The outcome of a sweep's confirmation.

    Attributes:
        ranking: names of all finalists, the champion first.
        finalists: the finalists by name.
        outcomes: of the champion against each other finalist, in the order of the ranking.
    """

    ranking: tuple[str, ...]
    finalists: Mapping[str, Finalist]
    outcomes: tuple[Outcome, ...]

    @property
    def champion(self) -> str:
        """Name of the champion."""
        return self.ranking[0]

    def sentences(self) -> list[str]:
        """Why the champion was chosen: one sentence for each other finalist."""
        if not self.outcomes:
            return ["the only trial with a usable model"]
        return [
            outcome.sentence()
            if outcome.winner == self.champion
            else f"chosen although trial {outcome.winner} beats it, since outcomes go in a circle, in which "
            "its objective is the lowest"
            for outcome in self.outcomes
        ]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; numbers that are not finite become None."""
        return {
            "champion": self.champion,
            "ranking": list(self.ranking),
            "reasons": self.sentences(),
            "finalists": {
                name: {
                    OBJECTIVE: _number(each.objective),
                    "distances": _plain(each.distances),
                    "copies": each.copies,
                    "cost": each.cost,
                }
                for name, each in self.finalists.items()
            },
            "comparisons": [
                {
                    "winner": each.winner,
                    "loser": each.loser,
                    "decided_by": each.grounds,
                    "num_samples": each.comparison.num_samples,
                    "winner_minus_loser": _plain(
                        {OBJECTIVE: each.comparison.objective, **each.comparison.distances}
                    ),
                }
                for each in self.outcomes
            ],
        }


Compare = Callable[[str, str, int], Comparison]
"""Function (first, second, round) that measures the differences between two finalists.

Round 0 has the number of samples that all finalists get; each further round has twice as many as before.
"""


def with_training_seed(difference: Estimate, seed_error: float) -> Estimate:
    """A difference of two objectives, its error with the share of the two trainings' seeds.

    Args:
        difference: the difference on the same examples and noise.
        seed_error: standard deviation of an objective over training seeds.
    """
    return Estimate(difference.value, math.hypot(difference.standard_error, math.sqrt(2.0) * seed_error))


def choose_finalists(differences: Mapping[str, Estimate]) -> list[str]:
    """Names of the finalists, the lowest objective first.

    The trial with truly the best objective has a measured one within three standard errors of the lowest in
    all but 0.3% of the sweeps. Four, a third of a default sweep, are taken in any case, since the objective
    does not see all that samples show; six, half of it, at most, since each one costs samples and up to six
    cost 15 comparisons.

    Args:
        differences: objective of each trial minus that of the trial with the lowest, by name; the errors
            with the share of the training seed.
    """
    ordered = sorted(differences, key=lambda name: (differences[name].value, name))
    close = sum(each.value <= _FINALISTS_WITHIN * each.standard_error for each in differences.values())
    return ordered[: min(max(close, MIN_FINALISTS), MAX_FINALISTS)]


def decide(finalists: Iterable[Finalist], compare: Compare, max_rounds: int = MAX_ROUNDS) -> Decision:
    """Rank the finalists by the rule in this module's docstring.

    Args:
        finalists: the finalists, at least one, with names of their own.
        compare: measures the differences between two of them; each pair is measured at most once a round,
            and only if it is needed.
        max_rounds: number of times that the samples of the first two are doubled to tell them apart.

    Raises:
        ValueError: there are no finalists.
    """
    ordered = sorted(finalists, key=_by_objective)
    if not ordered:
        raise ValueError("there are no finalists")
    table = _Table(compare)
    ranking = _rank(ordered, table)
    while len(ranking) > 1 and table.outcome(ranking[0], ranking[1]) is None:
        first, second, *others = ranking
        if not table.draw_more(first, second, max_rounds):  # they are equal
            unbeaten = not any(table.beats(each, second) for each in others)  # false in a circle only
            if unbeaten and _is_cheaper(second, first):
                ranking = [second, first, *others]
            break
        ranking = _rank(ordered, table)
    champion, *others = ranking
    return Decision(
        tuple(each.name for each in ranking),
        {each.name: each for each in ranking},
        tuple(table.outcome(champion, each) or table.tie(champion, each) for each in others),
    )


def settle(
    first: Finalist, second: Finalist, compare: Compare, max_rounds: int = MAX_ROUNDS
) -> Outcome | None:
    """The outcome for two models, with more samples if they are needed; None if the two are equal."""
    table = _Table(compare)
    while (outcome := table.outcome(first, second)) is None:
        if not table.draw_more(first, second, max_rounds):
            break
    return outcome


def compare_finalists(first: Finalist, second: Finalist, comparison: Comparison) -> Outcome | None:
    """The outcome for two finalists given their differences (first minus second); None if not told apart."""
    signs: dict[Grounds, int] = {  # in this order; negative if the first is the better one
        "finite": second.is_finite - first.is_finite,
        "copying": first.copies - second.copies,
        "samples": _agreement(comparison.distances.values()),
        OBJECTIVE: comparison.objective.sign(_TOLD_APART),
        "one distance": _uncontradicted(comparison.distances.values()),
    }
    for grounds, sign in signs.items():
        if sign:
            winner, loser = (first, second) if sign < 0 else (second, first)
            differences = comparison if sign < 0 else comparison.reversed()
            return Outcome(winner.name, loser.name, grounds, differences, _reason(grounds, differences))
    return None


class _Table:
    """Outcomes of pairs of finalists, measured when they are needed."""

    def __init__(self, compare: Compare) -> None:
        self._compare = compare
        self._comparisons: dict[tuple[str, str], Comparison] = {}
        self._rounds: dict[tuple[str, str], int] = {}

    def comparison(self, first: Finalist, second: Finalist) -> Comparison:
        """Differences of the latest round, first minus second."""
        key = (min(first.name, second.name), max(first.name, second.name))
        if key not in self._comparisons:
            self._comparisons[key] = self._compare(*key, self._rounds.get(key, 0))
        found = self._comparisons[key]
        return found if key[0] == first.name else found.reversed()

    def draw_more(self, first: Finalist, second: Finalist, max_rounds: int) -> bool:
        """Go on to the next round for a pair; False if there is none."""
        key = (min(first.name, second.name), max(first.name, second.name))
        if self._rounds.get(key, 0) >= max_rounds:
            return False
        self._rounds[key] = self._rounds.get(key, 0) + 1
        self._comparisons.pop(key, None)
        return True

    def outcome(self, first: Finalist, second: Finalist) -> Outcome | None:
        """The outcome for a pair, None if they are not told apart."""
        return compare_finalists(first, second, self.comparison(first, second))

    def beats(self, first: Finalist, second: Finalist) -> bool:
        """Whether the first finalist is the better one."""
        outcome = self.outcome(first, second)
        return outcome is not None and outcome.winner == first.name

    def tie(self, first: Finalist, second: Finalist) -> Outcome:
        """The outcome for two finalists that are not told apart, of which the first is preferred."""
        comparison = self.comparison(first, second)
        is_cheaper = _is_cheaper(first, second)
        grounds: Grounds = "cost" if is_cheaper else "objective within its error"
        equal = f"the two cannot be told apart with {comparison.num_samples} samples each"
        reason = f"{equal}, and its objective is the lower one"
        if is_cheaper:
            reason = f"{equal}, and it costs {first.cost / second.cost:.2g} times as much to run"
        elif _by_objective(first) > _by_objective(second):
            reason = f"{equal}, and a third one beats the other"
        return Outcome(first.name, second.name, grounds, comparison, reason)


def _rank(ordered: Sequence[Finalist], table: _Table) -> list[Finalist]:
    """All finalists, best first: the one that no other beats, then that of the others, and so on."""
    remaining, ranking = list(ordered), []
    while remaining:
        ranking.append(_unbeaten(remaining, table))
        remaining.remove(ranking[-1])
    return ranking


def _unbeaten(ordered: Sequence[Finalist], table: _Table) -> Finalist:
    """The finalist that no other one beats, preferably one with a low objective.

    Args:
        ordered: the finalists, the lowest objective first.
        table: outcomes of pairs.
    """
    leader, leaders = ordered[0], list[Finalist]()
    while leader not in leaders:
        leaders.append(leader)
        better = [each for each in ordered if each is not leader and table.beats(each, leader)]
        if not better:
            return leader
        leader = better[0]
    return min(leaders[leaders.index(leader) :], key=_by_objective)


def _by_objective(finalist: Finalist) -> tuple[float, float, str]:
    """Key that sorts by objective; of equal ones the cheaper comes first."""
    objective = math.inf if math.isnan(finalist.objective) else finalist.objective
    return objective, finalist.cost, finalist.name


def _is_cheaper(first: Finalist, second: Finalist) -> bool:
    return first.cost <= _CHEAPER * second.cost


def _agreement(differences: Iterable[Estimate]) -> int:
    """The common sign of all differences, 0 if there is none."""
    signs = {each.sign(_TOLD_APART) for each in differences}
    return signs.pop() if len(signs) == 1 else 0


def _uncontradicted(differences: Collection[Estimate]) -> int:
    """The sign of differences that are large enough to decide alone, 0 if another one contradicts."""
    large = {each.sign(_TOLD_APART_ALONE) for each in differences} - {0}
    others = {each.sign(_TOLD_APART) for each in differences} - {0}
    return large.pop() if len(large) == len(others) == 1 else 0


def _reason(grounds: Grounds, comparison: Comparison) -> str:
    """Why the first of two finalists is better, given first minus second."""
    if grounds == "finite":
        return "the objective or the samples of the other are not finite"
    if grounds == "copying":
        return "the other copies training examples"
    if grounds in ("samples", "one distance"):
        by = " and ".join(
            f"{SAMPLE_PREFIX}{name} ({_in_errors(each)})"
            for name, each in sorted(comparison.distances.items())
            if grounds == "samples" or each.sign(_TOLD_APART_ALONE)
        )
        return f"its {comparison.num_samples} samples are closer to the data by {by}"
    return (
        f"its objective is better by {_in_errors(comparison.objective)}, and the distances of "
        f"{comparison.num_samples} samples do not agree beyond their errors"
    )


def _relation(difference: Estimate) -> str:
    """How the objective of the second is related to that of the first, given first minus second."""
    if difference.value == 0.0:
        return "the same"
    if math.isnan(difference.value):
        return "unknown"
    return f"{'better' if difference.value > 0.0 else 'worse'} by {_in_errors(difference)}"


def _in_errors(difference: Estimate) -> str:
    """Size of a difference in units of its standard error, in words."""
    if not (math.isfinite(difference.value) and difference.standard_error > 0.0):
        return f"{abs(difference.value):.3g}"
    return f"{abs(difference.value) / difference.standard_error:.1f} standard errors"


def _negated(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, estimate.standard_error)


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {
        name: {"value": _number(each.value), "standard_error": _number(each.standard_error)}
        for name, each in estimates.items()
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
