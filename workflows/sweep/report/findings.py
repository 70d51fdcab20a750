"""What a sweep found, in words: why the champion won, what MSE would have picked, and what to do next."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusion.evaluation.copying import copying_verdict
from diffusion.evaluation.distances import Estimate
from diffusion.metrics import (
    AUC,
    DISTANCE,
    FLOOR,
    NUM_SAMPLES,
    OBJECTIVE,
    SAMPLE_AUC,
    SAMPLE_DISTANCE,
    TEST_SAMPLE_PREFIX,
    VAL_MSE,
)
from workflows.cli.search_space import is_range
from workflows.publishing.formatting import with_error
from workflows.publishing.model_card import copying_summary
from workflows.sweep.decision import Comparison
from workflows.sweep.report.standings import Standings, estimate

_EQUAL_WITHIN = 2.0  # standard errors, as in `decision`
_CLEAR_DIFFERENCE = 0.1  # of distance and AUC from their floors: shapes and colours are visibly wrong
_STILL_FALLING = 0.01  # of the whole fall of an objective, in the last interval between evaluations
_NEAR_THE_END = 0.05  # of a searched range, on its logarithmic scale
_METRIC_NAMES: Mapping[str, str] = {DISTANCE: "sample distance", AUC: "AUC"}


@dataclass(frozen=True)
class Verdict:
    """A verdict on the champion.

    Attributes:
        kind: whether it is good or bad news, or not known.
        headline: the verdict in a few words.
        detail: the measured values that it rests on, in whole sentences.
    """

    kind: Literal["good", "bad", "unknown"]
    headline: str
    detail: str


def why_it_won(standings: Standings) -> str:
    """One sentence on why the champion won, and by how much."""
    champion, decision = standings.champion.trial_id, standings.champion.decision
    if champion != decision.champion:
        return (
            f"Trial {champion} won because trial {decision.champion}, which is better, cannot be exported: "
            "its ONNX file does not compute what PyTorch does."
        )
    rival = standings.runner_up
    outcome = standings.outcome(rival) if rival else None
    if outcome is None:
        return f"Trial {champion} won because no other trial has a usable model."
    if outcome.winner != champion:
        return (
            f"Trial {champion} won although trial {outcome.winner} beats it: the finalists beat each other "
            "in a circle, in which its objective is the lowest."
        )
    difference = outcome.comparison  # of the champion from its rival
    samples = f"{difference.num_samples:,} samples of each"
    begin = f"Trial {champion} won because"
    objective = (
        f"its objective is lower than that of the runner-up, trial {rival}, by "
        f"{_amount(difference.objective, standings.unit)}"
    )
    match outcome.grounds:
        case "finite":
            return f"{begin} the objective or the samples of the runner-up, trial {rival}, are not finite."
        case "copying":
            return f"{begin} the runner-up, trial {rival}, copies training examples and it does not."
        case "samples" | "one distance":
            both = outcome.grounds == "samples"
            deciding = _METRIC_NAMES if both else _better_by(difference)
            amounts = " and ".join(
                f"{_METRIC_NAMES.get(name, name)} lower by {_amount(difference.distances[name])}"
                for name in deciding
                if name in difference.distances
            )
            by = "by both measures" if both else "by the measure that tells them apart"
            return (
                f"{begin} its samples are closer to the data than those of the runner-up, trial {rival}, "
                f"{by}: {amounts}, with {samples}."
            )
        case "objective":
            amounts = " and ".join(
                f"{_METRIC_NAMES.get(name, name)} by {_signed(each)}"
                for name, each in sorted(difference.distances.items(), reverse=True)
            )
            return (
                f"{begin} {objective}; the samples did not decide, since with {samples} they differ in "
                f"{amounts}, not both beyond chance in the same direction."
            )
        case "cost":
            return (
                f"{begin} it is as good as the runner-up, trial {rival}, and costs {_cost(standings)} times "
                f"as much per sample: {samples} do not tell the two apart, nor does the objective "
                f"(difference {_signed(difference.objective, standings.unit)})."
            )
        case "objective within its error":
            margin = _margin(difference.objective, standings.unit)
            return (
                f"{begin} {margin}; the runner-up, trial {rival}, is as good within the errors, also with "
                f"{samples}."
            )


def what_mse_would_pick(standings: Standings) -> str:
    """What the mean squared error would have picked instead, and how much worse it is."""
    picked, champion = standings.picked_by_mse, standings.champion
    if picked is None:
        return f"{VAL_MSE} was not measured, so what it would have picked is not known."
    if picked == champion.trial_id:
        return f"{VAL_MSE} would have picked the same trial, {picked}."
    ours, theirs = (standings.sample_metrics(each) for each in (champion.trial_id, picked))
    parts = [f"its objective is {_relation(standings.objective_from_champion(picked), standings.unit)}"]
    for name, metric in ((SAMPLE_DISTANCE, DISTANCE), (SAMPLE_AUC, AUC)):
        if name in theirs and name in ours:
            parts.append(
                f"its {_METRIC_NAMES[metric]} {_value(estimate(theirs, name))} against "
                f"{_value(estimate(ours, name))}"
            )
    place, ranked = standings.place_by_objective(picked), len(standings.records.ranked())
    return (
        f"{VAL_MSE} would have picked trial {picked}, number {place} of {ranked} by the objective: "
        f"{', '.join(parts)}."
    )


def as_good_as_real(metrics: Mapping[str, float]) -> Verdict:
    """Whether samples are as good as real data: as close to the test split as training examples are.

    They are by a measure if it exceeds its floor by two standard errors at most. If these are so large that
    clear differences would not be seen, nothing is said.

    Args:
        metrics: metrics of the champion, `test/sample_...` with their floors.
    """
    good: list[str] = []
    worse: list[str] = []
    unclear: list[str] = []
    values: list[str] = []
    for name, words in _METRIC_NAMES.items():
        samples = estimate(metrics, TEST_SAMPLE_PREFIX + name)
        real = estimate(metrics, TEST_SAMPLE_PREFIX + name + FLOOR)
        difference = samples.value - real.value
        if not math.isfinite(difference):
            continue
        values.append(f"{words} {_value(samples)}, of real data {_value(real)}")
        margin = _EQUAL_WITHIN * math.hypot(samples.standard_error, real.standard_error)
        if difference > margin > 0.0:
            worse.append(words)
        elif 0.0 < margin <= _CLEAR_DIFFERENCE:
            good.append(words)
        else:
            unclear.append(words)
    if not values:
        return Verdict("unknown", "Not compared with real data", "Its samples were not measured.")
    count = metrics.get(TEST_SAMPLE_PREFIX + NUM_SAMPLES, math.nan)
    number = f"{count:,.0f} samples" if math.isfinite(count) else "samples"
    detail = f"{'; '.join(values)} ({number} against the test split; real data are training examples)."
    detail = detail[0].upper() + detail[1:]
    if len(worse) == len(_METRIC_NAMES):
        return Verdict("bad", f"Not as good as real data, neither by {_and(worse, 'nor by')}", detail)
    if worse:
        begin = f"As good as real data by {_and(good)}, but not" if good else "Not as good as real data"
        return Verdict("bad", f"{begin} by {_and(worse)}", detail)
    if unclear:
        return Verdict("unknown", "Too few samples to say whether it is as good as real data", detail)
    return Verdict("good", f"As good as real data by {_and(good)}", detail)


def does_it_copy(metrics: Mapping[str, float]) -> Verdict:
    """Whether the champion copies its training examples."""
    summary = copying_summary(metrics)
    detail = summary.partition(": ")[2] or summary
    match copying_verdict(metrics, TEST_SAMPLE_PREFIX):
        case "copies":
            return Verdict("bad", "Copies training examples", detail)
        case "no sign":
            return Verdict("good", "Does not copy training examples", detail)
        case _:
            return Verdict("unknown", "Too little data to say whether it copies", detail)


def advice(standings: Standings, space: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """What the measurements suggest to do next, in sentences; empty if they suggest nothing."""
    champion = standings.champion
    record = standings.records[champion.trial_id]
    lines = []
    if copying_verdict(champion.metrics, TEST_SAMPLE_PREFIX) == "copies":
        lines.append(
            "It copies training examples: train on more data, with fewer updates, or with a smaller network."
        )
    updates = sorted(record.evaluations)
    if not standings.was_trained_longer and record.status == "finished" and len(updates) > 1:
        first, *_, before, last = (
            record.evaluations[each].get(OBJECTIVE, math.nan) for each in (updates[0], *updates)
        )
        if record.best_update == updates[-1] and before - last > _STILL_FALLING * (first - last) > 0.0:
            lines.append(
                f"Its objective still fell by {before - last:.3g}{_spaced(standings.unit)} between its last "
                f"two evaluations: a training longer than {updates[-1]:,} updates may be better."
            )
    for name, values in space.items():
        end = _end_of_range(name, values, record.params.get(name))
        if end:
            lines.append(
                f"Its {name}, {record.params[name]:.3g}, is at the {end} end of the searched range "
                f"({values[0]:g} to {values[-1]:g}): widen the range."
            )
    return lines


def _end_of_range(name: str, values: tuple[Any, ...], value: Any) -> str:
    """ "lower" or "upper" if a value lies near that end of a searched range, else nothing."""
    if not is_range(name) or not isinstance(value, int | float) or not 0.0 < values[0] < values[-1]:
        return ""
    place = math.log(value / values[0]) / math.log(values[-1] / values[0])
    return "lower" if place < _NEAR_THE_END else "upper" if place > 1.0 - _NEAR_THE_END else ""


def _better_by(difference: Comparison) -> list[str]:
    """Names of the distances by which the first of two finalists is clearly better."""
    found = [name for name, each in difference.distances.items() if each.sign(_EQUAL_WITHIN) < 0]
    return found or list(difference.distances)


def _amount(difference: Estimate, unit: str = "") -> str:
    """Size of a difference with its error, in units and in standard errors."""
    value = Estimate(abs(difference.value), difference.standard_error)
    if not (math.isfinite(value.value) and value.standard_error > 0.0):
        return f"{_value(value)}{_spaced(unit)}"
    errors = value.value / value.standard_error
    return f"{_value(value)}{_spaced(unit)} ({errors:.1f} standard errors)"


def _margin(difference: Estimate, unit: str) -> str:
    """How the objectives of two equal finalists are related, given first minus second."""
    if difference.value > 0.0:
        amount = _amount(difference, unit)
        return f"a third finalist beats the other, although its own objective is higher by {amount}"
    return f"its objective is the lower one, by {_amount(difference, unit)}"


def _cost(standings: Standings) -> str:
    """Cost of a sample of the champion by that of the runner-up."""
    finalists, rival = standings.champion.decision.finalists, standings.runner_up
    assert rival is not None, "it was compared"
    return f"{finalists[standings.champion.trial_id].cost / finalists[rival].cost:.2g}"


def _relation(difference: Estimate, unit: str) -> str:
    """How much higher or lower an objective is, given its difference from the champion's."""
    if not math.isfinite(difference.value):
        return "not finite"
    direction = "higher" if difference.value > 0.0 else "lower"
    return "the same" if difference.value == 0.0 else f"{direction} by {_amount(difference, unit)}"


def _signed(difference: Estimate, unit: str = "") -> str:
    sign = "+" if difference.value > 0.0 else ""
    return f"{sign}{_value(difference)}{_spaced(unit)}"


def _value(value: Estimate) -> str:
    return with_error(value.value, value.standard_error)


def _spaced(unit: str) -> str:
    return f" {unit}" if unit else ""


def _and(names: list[str], word: str = "and") -> str:
    return f" {word} ".join(names)
