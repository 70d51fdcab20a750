"""Trainings of equal processor time: how many updates a budget pays for."""

import time
from dataclasses import replace

import torch

from diffusion.config import Config
from diffusion.data.dataset import Dataset
from diffusion.evaluation.evaluator import Evaluator
from diffusion.training.checkpoints import TrainedModel
from diffusion.training.distributed import DistributedContext
from diffusion.training.loop import Request, Training
from diffusion.training.train_step import TrainStep

_WARM_UP, _MEASURED = 3, 20


def updates_for(config: Config, dataset: Dataset, seconds: float) -> int:
    """Number of updates that take as many seconds of one core, from a few of them."""
    spec = dataset.spec
    step = TrainStep(config, spec.shape, DistributedContext(0, 1, torch.device("cpu")), spec.num_classes)
    x_0 = dataset.train[: config.training.batch_size]
    inputs = Evaluator(config, dataset).low_resolution(len(x_0))
    timesteps, noise = torch.zeros(len(x_0), dtype=torch.int64), torch.randn_like(x_0)
    for update in range(_WARM_UP + _MEASURED):
        if update == _WARM_UP:
            started = time.process_time()
        step.run(update, x_0, timesteps, noise, inputs)
    return max(1, round(seconds * _MEASURED / (time.process_time() - started)))


def train_for(config: Config, dataset: Dataset, seconds: float) -> tuple[TrainedModel, float]:
    """Train as long as a budget of one core lasts.

    Returns:
        The trained model, and the seconds that its updates took.
    """
    updates = updates_for(config, dataset, seconds)
    values = {"training.num_updates": updates, "training.num_evaluations": 1}
    # The evaluation is not part of the time, and as small as it can be.
    metrics = replace(config.metrics, num_samples=2, num_examples=2, features="random", choose_sampler=False)
    ended: list[float] = []

    def request() -> Request:
        if training.updates == updates:
            ended.append(time.process_time())
        return Request.CONTINUE

    training = Training(
        replace(config.with_values(values), metrics=metrics), dataset, lambda result: None, request=request
    )
    started = time.process_time()
    training.run()
    return training.model.with_weights(training.model.network.state_dict()), ended[0] - started
