"""Measures a sweep's finalists anew, with samples from noise that no trial has seen.

`decision` asks for the differences between two finalists; `Confirmation` draws the samples that it takes.
Only the training and the validation split are used: the test split is for the champion alone.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.evaluation.copying import copying_verdict
from diffusion.evaluation.distances import Estimate
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.measured_objective import MeasuredObjective
from diffusion.evaluation.sample_metrics import SampleMetrics
from diffusion.metrics import AUC, DISTANCE, NETWORK_EVALUATIONS, SAMPLE_PREFIX, STANDARD_ERROR
from diffusion.seeding import seed_of
from diffusion.training.checkpoints import TrainedModel
from workflows.data.load import LoadedData
from workflows.sweep.decision import Comparison, Finalist, with_training_seed

_CONFIRMATION = 17  # stream of seeds; trials use the seed of the metrics itself


def confirmation_seed(metrics_seed: int, round: int) -> int:
    """Seed of the samples that a round adds: the same for all finalists, and that of no trial."""
    return seed_of(metrics_seed, _CONFIRMATION, round)


class Confirmation:
    """Draws samples of finalists and compares them with the training and validation examples.

    Sample i of each finalist comes from the same noise, so that differences are more exact than values.
    Round 0 draws twice as many samples as a trial does, and each further round as many again as there are.

    Args:
        data: the data, on the device to measure on; the test split is not used.
        seed_error: standard deviation of an objective over training seeds.
        notify: receives progress messages of one line.

    Attributes:
        metrics: `sample/...` metrics of each finalist in round 0, by name.
    """

    def __init__(self, data: LoadedData, seed_error: float, notify: Callable[[str], None]) -> None:
        self._data, self._seed_error, self._notify = data, seed_error, notify
        self._measure = SampleMetrics(data.dataset, data.dataset.val[:], data.features)
        self._models: dict[str, TrainedModel] = {}
        self._objectives: dict[str, MeasuredObjective] = {}
        self._samples: dict[tuple[str, int], Tensor] = {}  # by name and round
        self.metrics: dict[str, dict[str, float]] = {}

    def add(self, name: str, model: TrainedModel, objective: MeasuredObjective) -> Finalist:
        """Draw the first samples of a finalist and measure them."""
        self._notify(f"confirming {name} with fresh seeds")
        self._models[name] = model.to(self._data.dataset.train.device)
        self._objectives[name] = objective
        found = self._measure.compute(self._samples_of(name, 0))
        num_evaluations = len(model.table.timesteps)
        metrics = {SAMPLE_PREFIX + key: float(value) for key, value in found.items()}
        self.metrics[name] = metrics | {SAMPLE_PREFIX + NETWORK_EVALUATIONS: float(num_evaluations)}
        return Finalist(
            name=name,
            objective=objective.value,
            distances={
                key: Estimate(found[key], found.get(key + STANDARD_ERROR, math.nan))
                for key in (DISTANCE, AUC)
            },
            copies=copying_verdict(metrics) == "copies",
            cost=num_evaluations * sum(weight.numel() for weight in model.network.parameters()),
        )

    def compare(self, first: str, second: str, round: int) -> Comparison:
        """Differences between two finalists that were added, see `decision.Compare`."""
        self._notify(
            f"drawing more samples to tell {first} and {second} apart (round {round})"
            if round
            else f"comparing {first} and {second}"
        )
        both = [self._samples_of(name, round) for name in (first, second)]
        objective = self._objectives[first].minus(self._objectives[second])
        if all(samples.isfinite().all() for samples in both):
            distances = self._measure.difference(*both)
        else:
            distances = dict.fromkeys((DISTANCE, AUC), Estimate(math.nan, math.nan))
        return Comparison(with_training_seed(objective, self._seed_error), distances, len(both[0]))

    def _samples_of(self, name: str, round: int) -> Tensor:
        """All samples of a finalist up to a round: normalised, [num_samples * 2^round, *shape]."""
        if (name, round) not in self._samples:
            model = self._models[name]
            evaluator = Evaluator(model.config, self._data.dataset, self._data.features)
            count = 2 * model.config.metrics.num_samples * 2 ** max(0, round - 1)
            seed = confirmation_seed(model.config.metrics.seed, round)
            drawn = evaluator.samples(model.network, num_samples=count, seed=seed)
            self._samples[name, round] = (
                torch.cat([self._samples_of(name, round - 1), drawn]) if round else drawn
            )
        return self._samples[name, round]
