"""The search of a sweep: which parameters the next trial tries."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray.tune.search.optuna import OptunaSearch

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.metrics import OBJECTIVE
from diffusion.process.schedule_checks import wasted_fraction
from workflows.cli.search_space import is_range
from workflows.cli.tune_options import EarlyStopping
from workflows.sweep.trial_records import TrialRecord, TrialRecords

_MAX_WASTED_FRACTION = 0.5
_MAX_DRAWS = 30  # for a trial: in a space in which all schedules waste timesteps, the last draw is taken


@dataclass(frozen=True)
class Search:
    """A search: its space, algorithm and budget.

    Attributes:
        space: searched parameters by dotted name, each with its choices or the two ends of its range.
        algorithm: "tpe" or "random".
        seed: seed of the search.
        num_trials: number of trials of the whole sweep, pruned ones included.
        time_budget: seconds after which running trials are stopped, or None.
        initial_points: points to try first.
        early_stopping: "proven", "eager" or "off", see `asha.make_scheduler`.
    """

    space: Mapping[str, tuple[Any, ...]]
    algorithm: str
    seed: int
    num_trials: int
    time_budget: float | None = None
    initial_points: Sequence[Mapping[str, Any]] = ()
    early_stopping: EarlyStopping = "proven"


def build_searcher(search: Search, records: TrialRecords, config: Config) -> "ThriftySearch":
    """Optuna's search, with the results of the completed trials.

    It suggests the unfinished trials' parameters first, then the initial points that no trial has tried. What
    it draws after that depends on the search's seed, the number of trials before and their results, and not
    on how often the sweep was resumed.

    Args:
        search: the search.
        records: records of the sweep's trials so far.
        config: config into which each trial puts the suggested values.
    """
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(*values, log=True) if is_range(name) else CategoricalDistribution(values)
        for name, values in search.space.items()
    }

    def point(record: TrialRecord) -> dict[str, Any]:
        return {name: record.params[name] for name in search.space}

    unfinished = [point(record) for record in records if record.unfinished]
    given = unfinished + [dict(values) for values in search.initial_points[len(records) :]]
    searcher = ThriftySearch(
        config,
        search,
        len(given),
        max(len(records), len(search.initial_points)),
        space,
        metric=OBJECTIVE,
        mode="min",
        points_to_evaluate=given,
    )
    for record in completed_trials(records):
        usable = math.isfinite(record.objective) and record.status in ("finished", "stopped")
        searcher.add_evaluated_point(point(record), record.objective, error=not usable)
    return searcher


def _sampler(search: Search, number: int) -> BaseSampler:
    """Optuna's sampler for the trial of this number, with random numbers of the trial's own."""
    seed = int(np.random.SeedSequence([search.seed, number]).generate_state(1)[0])
    if search.algorithm == "random":
        return RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its multivariate option experimental
        return TPESampler(seed=seed, multivariate=True)


class ThriftySearch(OptunaSearch):
    """Optuna's search without schedules of which most timesteps are wasted.

    A schedule is drawn again if more than half of its timesteps are nearly pure noise (see
    `diffusion.process.schedule_checks.wasted_fraction`), which can be known without training. The discarded
    draws are failed trials of Optuna's study and no trials of the sweep.

    Args:
        config: config into which each trial puts the suggested values.
        search: algorithm and seed.
        num_given: number of points that are suggested first and never discarded.
        first_draw: number of the first trial, from 0, that is not given but drawn.
        *args: further arguments of OptunaSearch.
        **kwargs: further arguments of OptunaSearch.
    """

    def __init__(
        self, config: Config, search: Search, num_given: int, first_draw: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, sampler=_sampler(search, first_draw), **kwargs)
        self._config, self._search = config, search
        self._num_given, self._next_draw = num_given, first_draw

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Values of the next trial by dotted name."""
        if trial_id in self._ot_trials or self._num_given > 0:
            self._num_given -= trial_id not in self._ot_trials
            return super().suggest(trial_id)
        self._ot_study.sampler = _sampler(self._search, self._next_draw)
        self._next_draw += 1
        for attempt in range(_MAX_DRAWS):
            draw = f"{trial_id}-draw-{attempt}"
            values = super().suggest(draw)
            if not self._wastes_timesteps(values) or attempt == _MAX_DRAWS - 1:
                break
            self.on_trial_complete(draw, error=True)
        self._ot_trials[trial_id] = self._ot_trials.pop(draw)
        return values

    def _wastes_timesteps(self, values: Mapping[str, Any]) -> bool:
        try:
            schedule = self._config.with_values(dict(values)).schedule.build()
        except InputError:
            return False  # the trial itself says what is wrong
        return wasted_fraction(schedule) > _MAX_WASTED_FRACTION


def completed_trials(records: TrialRecords) -> list[TrialRecord]:
    return [record for record in records if not record.unfinished]
