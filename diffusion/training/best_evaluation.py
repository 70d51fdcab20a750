"""The best evaluation of a training: its weights are the trained model, rather than the last ones."""

from dataclasses import dataclass

from torch import Tensor, nn

from diffusion.evaluation.measured_objective import MeasuredObjective

_MIN_STANDARD_ERRORS = 1.0


@dataclass(frozen=True, eq=False)
class BestEvaluation:
    """The best evaluation so far, with its averaged weights.

    Attributes:
        update: number of updates at the evaluation.
        objective: objective at the evaluation.
        weights: averaged weights at the evaluation, by name.
        lowest: the lowest objective so far, which may be that of an earlier evaluation.
    """

    update: int
    objective: float
    weights: dict[str, Tensor]
    lowest: MeasuredObjective


def best_evaluation(
    best: BestEvaluation | None, update: int, objective: MeasuredObjective, network: nn.Module
) -> BestEvaluation:
    """The best evaluation after a further one: the latest whose objective equals the lowest within its error.

    The later weights are preferred, since the learning rate decays and the average covers more updates; an
    earlier evaluation stays the best only if its objective is lower by more than one standard error of the
    difference. Each evaluation is compared with the lowest objective so far, so that a slow rise, no step of
    which exceeds its error, does not go on unnoticed.

    Args:
        best: the best evaluation so far, None before the first.
        update: number of updates at the further evaluation.
        objective: its objective, on the same examples and noise as the earlier ones.
        network: the network with averaged weights, which are copied.

    Source: the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984,
    Section 3.4.3.
    """
    lowest = objective if best is None or objective.value < best.lowest.value else best.lowest
    difference = objective.minus(lowest)
    if best is None or difference.value <= _MIN_STANDARD_ERRORS * difference.standard_error:
        weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
        return BestEvaluation(update, objective.value, weights, lowest)
    return best
