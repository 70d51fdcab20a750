"""Early stopping: successive halving at rungs that have shown that they foretell the end."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

# With fewer finished trials a rank correlation says next to nothing.
_FEWEST_FINISHED = 4
_FORETELLS = 0.7


class SuccessiveHalving(FIFOScheduler):
    """Asynchronous successive halving on `objective` (lower is better), with rungs in `updates`.

    A trial that comes to a rung goes on if its objective is among the best 1 / `reduction_factor` of those
    that were there before it. Rungs double from the first one. A rung stops nobody while the objectives
    there and those at the end rank the finished trials too differently (a rank correlation below 0.7 over
    4 trials or more): the grace period then lasts until the next rung. The trials that were stopped are
    missing at the end, which tends to make the correlation look lower than it is.

    Args:
        points: updates after which trials are evaluated; the last is the end.
        reduction_factor: see above.

    Source: ASHA, arXiv:1810.05934, Algorithm 2.
    """

    def __init__(self, points: Sequence[int], reduction_factor: int = 2) -> None:
        super().__init__()
        self._factor, self._end = reduction_factor, points[-1]
        wanted = [points[0] * reduction_factor**power for power in range(len(points))]
        self._objectives: dict[int, dict[str, float]] = {
            rung: {} for rung in wanted if rung in points and rung < self._end
        }
        self._final: dict[str, float] = {}

    def observe(self, trial_id: str, evaluations: Mapping[int, Mapping[str, float]]) -> None:
        """Take in a trial of an earlier session: its metrics by updates."""
        for updates, metrics in evaluations.items():
            self._note(trial_id, updates, metrics["objective"])

    def rank_correlations(self) -> dict[int, float]:
        """Spearman's correlation of each rung's objectives with the last ones, where they can be compared."""
        return {
            rung: correlation
            for rung in self._objectives
            if math.isfinite(correlation := self._rank_correlation(rung))
        }

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Tune's question after each evaluation: CONTINUE or STOP."""
        updates, objective = result["updates"], result["objective"]
        before = [
            value for name, value in self._objectives.get(updates, {}).items() if name != trial.trial_id
        ]
        self._note(trial.trial_id, updates, objective)
        if not before or result["status"] != "running":
            return TrialScheduler.CONTINUE
        correlation = self._rank_correlation(updates)
        if correlation < _FORETELLS:  # not so where it is not known
            return TrialScheduler.CONTINUE
        good = objective <= np.nanpercentile(before, 100.0 / self._factor)
        return TrialScheduler.CONTINUE if good else TrialScheduler.STOP

    def _note(self, trial_id: str, updates: int, objective: float) -> None:
        if updates in self._objectives:
            self._objectives[updates][trial_id] = objective
        if updates == self._end:
            self._final[trial_id] = objective

    def _rank_correlation(self, rung: int) -> float:
        both = pd.DataFrame({"early": self._objectives[rung], "late": self._final}).dropna().rank()
        return math.nan if len(both) < _FEWEST_FINISHED else float(both["early"].corr(both["late"]))
