"""Early stopping of trials: successive halving that first checks whether early objectives predict final ones.

Tune asks the scheduler after each evaluation of a trial whether the trial continues; see `tuner`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from scipy.stats import rankdata

from diffusion.metrics import BEST_OBJECTIVE, OBJECTIVE
from workflows.cli.tune_options import EarlyStopping

# A rank correlation over fewer trials says next to nothing.
_MIN_FINISHED_TRIALS = 4
_MIN_RANK_CORRELATION = 0.7


def make_scheduler(early_stopping: EarlyStopping, points: Sequence[int]) -> "SuccessiveHalving":
    """Scheduler of a sweep.

    Args:
        early_stopping: "proven": rungs stop trials once they have been shown to predict the final order.
            "eager": also while fewer than 4 of their trials have finished. "off": never.
        points: see `SuccessiveHalving`.
    """
    if early_stopping == "off":
        return SuccessiveHalving(points[-1:])
    return SuccessiveHalving(points, eager=early_stopping == "eager")


class SuccessiveHalving(FIFOScheduler):
    """Asynchronous successive halving on `objective` (lower is better), with rungs in `updates`.

    Rungs double from the first evaluation point. A trial that reaches a rung continues if its objective is
    among the best 1 / `reduction_factor` of the trials that reached the rung before it.

    A rung stops no trial until it has been shown to predict the final order: while fewer than 4 of its trials
    have finished, or while its objectives rank the finished ones differently from their final objectives
    (Spearman's correlation below 0.7). Stopped trials have no final objective, so the correlation tends to be
    underestimated. benchmarks/results/early_stopping.md has what this costs and how often it loses the best.

    Args:
        points: numbers of updates at which trials are evaluated; the last is the end of training.
        reduction_factor: inverse of the fraction of trials that continue at a rung.
        eager: whether a rung of which fewer than 4 trials have finished stops trials, too.

    Source: ASHA, arXiv:1810.05934, Algorithm 2.
    """

    def __init__(self, points: Sequence[int], reduction_factor: int = 2, *, eager: bool = False) -> None:
        super().__init__()
        self._eager = eager
        self._reduction_factor, self._num_updates = reduction_factor, points[-1]
        rungs = [points[0] * reduction_factor**power for power in range(len(points))]
        self._rung_objectives: dict[int, dict[str, float]] = {
            rung: {} for rung in rungs if rung in points and rung < self._num_updates
        }
        self._final_objectives: dict[str, float] = {}

    def observe(self, trial_id: str, evaluations: Mapping[int, Mapping[str, float]]) -> None:
        """Add a trial of an earlier session.

        Args:
            trial_id: ID of the trial.
            evaluations: metrics of the trial's evaluations, by the number of updates.
        """
        for updates, metrics in evaluations.items():
            # Journals of earlier versions have no best objective: the last weights were the trial's model.
            self._add(trial_id, updates, metrics.get(BEST_OBJECTIVE, metrics[OBJECTIVE]))

    def rank_correlations(self) -> dict[int, float]:
        """Spearman's correlation of each rung's objectives with the final ones, if enough trials finished."""
        return {
            rung: correlation
            for rung in self._rung_objectives
            if math.isfinite(correlation := self._rank_correlation(rung))
        }

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Decide after an evaluation whether a trial continues: Tune's CONTINUE or STOP."""
        updates, objective = result["updates"], result[OBJECTIVE]
        earlier = [
            value
            for trial_id, value in self._rung_objectives.get(updates, {}).items()
            if trial_id != trial.trial_id
        ]
        self._add(trial.trial_id, updates, objective)
        if not earlier or result["status"] != "running":
            return TrialScheduler.CONTINUE
        correlation = self._rank_correlation(updates)
        is_proven = correlation >= _MIN_RANK_CORRELATION  # false for NaN
        if not (is_proven or (self._eager and math.isnan(correlation))):
            return TrialScheduler.CONTINUE
        is_good = objective <= np.nanpercentile(earlier, 100.0 / self._reduction_factor)
        return TrialScheduler.CONTINUE if is_good else TrialScheduler.STOP

    def _add(self, trial_id: str, updates: int, objective: float) -> None:
        if updates in self._rung_objectives:
            self._rung_objectives[updates][trial_id] = objective
        if updates == self._num_updates:
            self._final_objectives[trial_id] = objective

    def _rank_correlation(self, rung: int) -> float:
        """Spearman's correlation of a rung's objectives with the final ones; NaN with too few of them."""
        early = self._rung_objectives[rung]
        finished = [trial_id for trial_id in self._final_objectives if trial_id in early]
        if len(finished) < _MIN_FINISHED_TRIALS:
            return math.nan
        values = [
            [objectives[trial_id] for trial_id in finished] for objectives in (early, self._final_objectives)
        ]
        with np.errstate(invalid="ignore"):  # NaN if all are equal
            return float(np.corrcoef(rankdata(values, axis=1))[0, 1])
