"""Who is who in a finished sweep, and how each trial differs from the champion."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from safetensors import SafetensorError, safe_open

from diffusion.evaluation.distances import Estimate
from diffusion.metrics import SAMPLE_PREFIX, STANDARD_ERROR, VAL_ELBO_WINDOW
from workflows.sweep.champion import Champion
from workflows.sweep.decision import Comparison, Outcome
from workflows.sweep.trial_records import TrialRecord, TrialRecords

Role = Literal["champion", "mse", "runner-up"]
ROLE_NAMES: Mapping[Role, str] = {
    "champion": "champion",
    "mse": "MSE's pick",
    "runner-up": "runner-up",
}
UNITS: Mapping[str, str] = {VAL_ELBO_WINDOW: "nats/dim"}


@dataclass(frozen=True)
class Standings:
    """The trials of a sweep and the parts that they play.

    Attributes:
        records: records of the sweep's trials.
        champion: the champion.
    """

    records: TrialRecords
    champion: Champion

    @cached_property
    def objective_name(self) -> str:
        """Name of the metric that the trials are ranked by."""
        params = self.records[self.champion.trial_id].params
        return str(params.get("metrics.objective", VAL_ELBO_WINDOW))

    @property
    def unit(self) -> str:
        """Unit of the objective; empty if it has none."""
        return UNITS.get(self.objective_name, "")

    @cached_property
    def runner_up(self) -> str | None:
        """ID of the best finalist that is not the champion, or None if there is none."""
        others = [each for each in self.champion.decision.ranking if each != self.champion.trial_id]
        return others[0] if others else None

    @cached_property
    def picked_by_mse(self) -> str | None:
        """ID of the trial that the mean squared error would have picked; None if it was not measured."""
        return self.records.picked_by_mse() or None

    @cached_property
    def was_trained_longer(self) -> bool:
        """Whether the champion's model comes from the final training, not from its trial."""
        return self.champion.objective != self.records[self.champion.trial_id].objective

    def roles(self, trial_id: str) -> list[Role]:
        """The parts that a trial plays; none for most."""
        holders: dict[Role, str | None] = {
            "champion": self.champion.trial_id,
            "mse": self.picked_by_mse,
            "runner-up": self.runner_up,
        }
        return [role for role, holder in holders.items() if holder == trial_id]

    @cached_property
    def protagonists(self) -> list[TrialRecord]:
        """The champion, the choice of the mean squared error and the runner-up, each trial once."""
        holders = [self.champion.trial_id, self.picked_by_mse, self.runner_up]
        return [self.records[each] for each in dict.fromkeys(holders) if each is not None]

    @cached_property
    def ordered(self) -> list[TrialRecord]:
        """All trials: the finalists by rank, then those with a model by objective, then the others."""
        usable = [record.trial_id for record in self.records.ranked()]
        first = [self.champion.trial_id, *self.champion.decision.ranking]
        return [
            self.records[each]
            for each in dict.fromkeys([*first, *usable, *(r.trial_id for r in self.records)])
        ]

    def place_by_objective(self, trial_id: str) -> int | None:
        """Place of a trial among those with a usable model, from 1; None if it has none."""
        ranked = [record.trial_id for record in self.records.ranked()]
        return ranked.index(trial_id) + 1 if trial_id in ranked else None

    def outcome(self, trial_id: str) -> Outcome | None:
        """The outcome of the best finalist against another one; None for trials that were no finalists."""
        decision = self.champion.decision
        return next((each for each in decision.outcomes if trial_id in (each.winner, each.loser)), None)

    def compared_with_champion(self, trial_id: str) -> Comparison | None:
        """What was measured between another finalist and the champion: its values minus the champion's.

        None if the two were not compared, or if the champion's model was trained longer since.
        """
        outcome = self.outcome(trial_id)
        if outcome is None or self.was_trained_longer or trial_id == self.champion.trial_id:
            return None
        if self.champion.trial_id == outcome.loser:
            return outcome.comparison
        if self.champion.trial_id == outcome.winner:
            return outcome.comparison.reversed()
        return None

    def objective_from_champion(self, trial_id: str) -> Estimate:
        """Objective of a trial minus the champion's, on the same examples with the same noise.

        The error has the share of the training seed only if the two were compared as finalists. It is not
        known if the champion's model was trained longer since.
        """
        compared = self.compared_with_champion(trial_id)
        if compared is not None:
            return compared.objective
        if self.was_trained_longer:
            return Estimate(self.records[trial_id].objective - self.champion.objective, 0.0)
        ours, theirs = (self.records.measured_objective(each) for each in (self.champion.trial_id, trial_id))
        return theirs.minus(ours)

    def sample_metrics(self, trial_id: str) -> Mapping[str, float]:
        """Metrics of a trial's samples, `sample/...`: confirmed with fresh seeds, or else its own."""
        return self.champion.confirmations.get(trial_id) or {
            name: value
            for name, value in self.records[trial_id].metrics.items()
            if name.startswith(SAMPLE_PREFIX)
        }

    def is_confirmed(self, trial_id: str) -> bool:
        """Whether a trial's samples were measured with fresh seeds after the trials."""
        return trial_id in self.champion.confirmations

    def network_size(self, trial_id: str) -> int | None:
        """Number of parameters of a trial's network; None if its weights are missing or damaged."""
        path = self.records.folder(trial_id) / "model.safetensors"
        try:
            with safe_open(path, "numpy") as weights:
                return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
        except (OSError, SafetensorError):
            return None

    def objective(self, trial_id: str) -> Estimate:
        """Objective of a trial's model, of the exported one for the champion, and its own standard error.

        Differences are known much better, see `objective_from_champion`.
        """
        record = self.records[trial_id]
        is_champion = trial_id == self.champion.trial_id
        error = record.metrics.get(self.objective_name + STANDARD_ERROR, math.nan)
        return Estimate(self.champion.objective if is_champion else record.objective, error)


def estimate(metrics: Mapping[str, float], name: str) -> Estimate:
    """A metric and its standard error; not a number where they are not known."""
    return Estimate(metrics.get(name, math.nan), metrics.get(name + STANDARD_ERROR, math.nan))
