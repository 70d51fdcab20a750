"""The training loop. It does not know who runs it: it hands its progress to a callable."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffusion.checkpoints import TrainedModel
from diffusion.config import Config, TrainingConfig
from diffusion.data import Dataset
from diffusion.evaluation import Evaluator, schedule_metrics
from diffusion.likelihood import ElboWindow
from diffusion.networks import build_network
from diffusion.process import epsilon_loss


class Diverged(RuntimeError):
    """Training left the finite numbers; the message says after how many updates."""


@dataclass(frozen=True)
class Progress:
    """What an evaluation hands on.

    Attributes:
        updates: optimizer steps so far.
        metrics: by metric name.
        elbo: the objective example by example, for comparing trials in pairs.
        model: the denoiser with its averaged weights; valid until training goes on.
    """

    updates: int
    metrics: dict[str, float]
    elbo: ElboWindow
    model: TrainedModel


def train(config: Config, dataset: Dataset, report: Callable[[Progress], None]) -> None:
    """Train a denoiser on the device that the data set is on.

    `report` is called after the updates that `evaluation_points` names; only the last time do its
    metrics hold `sample/distance`.

    Raises:
        Diverged: the loss or the validation error is not a finite number.
    """
    training = config.training
    device = dataset.train.device
    torch.manual_seed(config.seed)
    schedule = config.schedule.build()
    evaluator = Evaluator(config, dataset)
    network = build_network(config, dataset.spec.shape).to(device)
    averaged = AveragedModel(network, multi_avg_fn=_averaging(training), use_buffers=False)
    averaged.requires_grad_(False)
    model = TrainedModel(config, dataset.spec, averaged.module.eval())

    optimizer = torch.optim.AdamW(
        network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: learning_rate_factor(training, done)
    )
    generator = torch.Generator(device).manual_seed(config.seed)
    batches = shuffled_batches(len(dataset.train), training.batch_size, generator)

    evaluate_at = set(evaluation_points(training))
    loss_sum, losses = torch.zeros((), device=device), 0
    for update in range(1, training.num_updates + 1):
        x_0 = dataset.train[next(batches)]
        timesteps = torch.randint(
            schedule.num_train_timesteps, (len(x_0),), generator=generator, device=device
        )
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        loss = epsilon_loss(network, schedule, x_0, timesteps, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), training.max_gradient_norm)
        optimizer.step()
        scheduler.step()
        averaged.update_parameters(network)
        loss_sum += loss.detach()
        losses += 1
        if update not in evaluate_at:
            continue

        metrics, elbo = evaluator.held_out_losses(model.network)
        metrics["train/mse"] = float(loss_sum) / losses
        loss_sum.zero_()
        losses = 0
        if not (math.isfinite(metrics["train/mse"]) and math.isfinite(metrics["val/elbo_window"])):
            raise Diverged(f"the loss is no longer a finite number after {update} updates")
        metrics["training/learning_rate"] = training.learning_rate * learning_rate_factor(
            training, update - 1
        )
        metrics |= schedule_metrics(schedule, math.prod(dataset.spec.shape))
        if update == training.num_updates:
            metrics |= evaluator.sample_distance(
                model.network, dataset.val, num_samples=config.metrics.num_samples, seed=config.metrics.seed
            )
        report(Progress(update, metrics, elbo, model))


def evaluation_points(training: TrainingConfig) -> list[int]:
    """Numbers of updates after which a training is evaluated, evenly spread, the last at its end."""
    count = min(training.num_evaluations, training.num_updates)
    return [round(training.num_updates * (index + 1) / count) for index in range(count)]


def learning_rate_factor(training: TrainingConfig, done: int) -> float:
    """Share of the peak learning rate after `done` updates: linear warm-up, then a half cosine to 0."""
    warmup = min(training.warmup_updates, training.num_updates // 10)
    if done < warmup:
        return (done + 1) / (warmup + 1)
    share = (done - warmup) / max(1, training.num_updates - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def ema_decay(training: TrainingConfig, done: int) -> float:
    """Decay of the averaged weights after `done` averagings.

    A constant 0.9999 would leave most of the starting weights in a short training, so the average
    reaches back over a twentieth of the planned updates at most, and over fewer at the start.
    """
    horizon = max(1.0, training.num_updates / 20.0)
    return min(training.ema_decay, 1.0 - 1.0 / horizon, (1.0 + done) / (10.0 + done))


def shuffled_batches(num_examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices: every example once an epoch, epochs joined without a gap."""
    queue = torch.empty(0, dtype=torch.int64, device=generator.device)
    while True:
        while len(queue) < batch_size:
            epoch = torch.randperm(num_examples, generator=generator, device=generator.device)
            queue = torch.cat([queue, epoch])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def _averaging(training: TrainingConfig) -> Callable[..., None]:
    def average(averaged: list[Tensor], current: list[Tensor], done: Tensor) -> None:
        get_ema_multi_avg_fn(ema_decay(training, int(done)))(averaged, current, done)

    return average
