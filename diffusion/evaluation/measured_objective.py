"""Objectives of evaluated models, and the standard error of the difference between two of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffusion.evaluation.distances import Estimate
from diffusion.metrics import OBJECTIVE, STANDARD_ERROR, VAL_ELBO_WINDOW, Objective
from diffusion.process.schedules import Float64Array


@dataclass(frozen=True, eq=False)
class MeasuredObjective:
    """The objective of one evaluated model; lower is better.

    Attributes:
        value: the objective; infinite if it could not be computed.
        standard_error: its standard error, 0 if unknown. Unused if `per_example` is known.
        per_example: float64 [examples], what the objective is the mean of; None if it is no such mean.
    """

    value: float
    standard_error: float = 0.0
    per_example: Float64Array | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            object.__setattr__(self, "value", math.inf)

    @classmethod
    def of(
        cls, objective: Objective, metrics: Mapping[str, float], elbo_per_example: Float64Array | None
    ) -> "MeasuredObjective":
        """The objective of an evaluation.

        Args:
            objective: the objective.
            metrics: metrics of the evaluation, the objective's value among them.
            elbo_per_example: float64 [examples], `val/elbo_window` of each example, if known.
        """
        per_example = elbo_per_example if objective.metric == VAL_ELBO_WINDOW else None
        error = metrics.get(objective.metric + STANDARD_ERROR, 0.0)
        return cls(metrics[OBJECTIVE], error, per_example)

    def minus(self, other: "MeasuredObjective") -> Estimate:
        """The difference of two objectives.

        Models are evaluated on the same examples with the same noise, so the difference is known much more
        precisely than either value, provided that both are known per example.
        """
        value = self.value - other.value
        ours, theirs = self.per_example, other.per_example
        if ours is None or theirs is None or ours.shape != theirs.shape or ours.size < 2:
            return Estimate(value, math.hypot(self.standard_error, other.standard_error))
        return Estimate(value, float((ours - theirs).std(ddof=1)) / math.sqrt(ours.size))
