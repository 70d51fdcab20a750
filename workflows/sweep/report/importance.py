"""How much each searched parameter matters to the order of the trials."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import create_trial

from diffusion.evaluation.distances import Estimate
from workflows.cli.search_space import is_range
from workflows.sweep.trial_records import TrialRecord

MIN_TRIALS = 10  # with fewer the forest fits chance
_MAX_TRIALS = 80  # of a resample, to bound the time
_NUM_RESAMPLES = 10
_NUM_TREES, _MAX_DEPTH = 16, 16


def importances(
    records: Sequence[TrialRecord], space: Mapping[str, tuple[Any, ...]]
) -> dict[str, Estimate] | None:
    """Share of the variance of the trials' places that each parameter explains alone, with its error.

    By Optuna's fANOVA: a random forest predicts the place from the parameters, and the variance of its
    prediction is divided among them. Places in place of objectives, since a few bad trials would otherwise
    make up all the variance. The standard error is by the bootstrap over trials.

    Args:
        records: the trials with a usable model.
        space: the searched parameters, choices or ends of a range by dotted name.

    Returns:
        The parameters, the most important first; None with fewer than `MIN_TRIALS` trials, or if all of them
        have the same objective, or with fewer than two parameters that differ among the trials.

    Source: Hutter, Hoos and Leyton-Brown, 2014.
    """
    differing = {
        name: values for name, values in space.items() if len({record.params[name] for record in records}) > 1
    }
    objectives = np.array([record.objective for record in records])
    if len(records) < MIN_TRIALS or len(differing) < 2 or len(np.unique(objectives)) < 2:
        return None
    places = np.argsort(np.argsort(objectives)).astype(float)
    points = [{name: _coordinate(name, record.params[name]) for name in differing} for record in records]
    distributions = {name: _distribution(name, [point[name] for point in points]) for name in differing}
    generator = np.random.default_rng(0)
    shares: dict[str, list[float]] = {name: [] for name in differing}
    for _ in range(_NUM_RESAMPLES):
        drawn = generator.integers(len(records), size=min(len(records), _MAX_TRIALS))
        sample = [(points[index], places[index]) for index in drawn]
        for name, share in _shares(sample, distributions).items():
            shares[name].append(share)
    # A resample that is smaller than the sweep varies more than one of its size would.
    scale = math.sqrt(min(1.0, _MAX_TRIALS / len(records)))
    found = {
        name: Estimate(float(np.mean(each)), scale * float(np.std(each, ddof=1)))
        for name, each in shares.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def _coordinate(name: str, value: Any) -> Any:
    """Where a value lies in the space that the search samples uniformly: ranges are searched by logarithm."""
    return math.log(value) if is_range(name) and value > 0.0 else value


def _distribution(name: str, values: Sequence[Any]) -> BaseDistribution:
    if is_range(name):
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(tuple(dict.fromkeys(values)))


def _shares(
    sample: Sequence[tuple[Mapping[str, Any], float]], distributions: Mapping[str, BaseDistribution]
) -> dict[str, float]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it says that a study was created
    try:
        study = optuna.create_study()
        for point, place in sample:
            trial = create_trial(params=dict(point), distributions=dict(distributions), value=place)
            study.add_trial(trial)
        evaluator = FanovaImportanceEvaluator(n_trees=_NUM_TREES, max_depth=_MAX_DEPTH, seed=0)
        found = evaluator.evaluate(study)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {name: 0.0 if math.isnan(share) else float(share) for name, share in found.items()}
