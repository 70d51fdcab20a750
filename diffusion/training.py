"""The training loop. It does not know who runs it: it hands its progress to callables."""

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from diffusion.checkpoints import TrainedModel, TrainingState
from diffusion.config import Config, TrainingConfig
from diffusion.data import Dataset
from diffusion.evaluation import Evaluator
from diffusion.learner import Learner, learning_rate_factor
from diffusion.likelihood import ElboWindow
from diffusion.order import DataOrder, noise_generator, seed_dropout
from diffusion.preflight import schedule_metrics
from diffusion.ranks import Ranks
from diffusion.timestep_sampling import LossSecondMoment, stratified_timesteps, uniform_timesteps

# The workers agree on what to do next this often; agreeing costs a message round.
_UPDATES_BETWEEN_REQUESTS = 10


class Request(IntEnum):
    """What a worker wants all of them to do; the highest wish of any worker counts.

    The last two are the leading worker's alone: its evaluation was broken off, or failed.
    """

    GO_ON = 0
    CHECKPOINT = 1
    STOP = 2
    BROKEN_OFF = 3
    GIVE_UP = 4


class Diverged(RuntimeError):
    """Training left the finite numbers; the message says after how many updates."""


class Stopped(RuntimeError):
    """Training was asked to stop and did, after writing a checkpoint."""


class _Interrupted(Exception):
    """An evaluation was broken off, since the training is to stop."""


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


class Training:
    """One training of a denoiser, alone or as one of several workers that do the same.

    Every random number of update u is a function of (seed, u), so a training that goes on from a
    checkpoint ends with the very weights of one that was never interrupted. (Where timesteps are drawn
    by importance, also of the losses before, which checkpoints hold.)

    Args:
        config: what to train.
        dataset: on the device to train on.
        report: called on the leading worker after the updates that `evaluation_points` names; only the
            last time do its metrics hold `sample/...`, unless that is the objective.
        resume: a checkpoint's averaged model and state to go on from.
        initial_weights: another model's, to start from.
        save: writes a checkpoint, on the leading worker: after each evaluation, when asked to by
            `request`, and before `Stopped`.
        request: asked between updates and between the network's calls in evaluations.

    Raises:
        InputError: the network does not fit the data, or the device lacks the precision asked for.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        report: Callable[[Progress], None],
        *,
        resume: tuple[TrainedModel, TrainingState] | None = None,
        initial_weights: Mapping[str, Tensor] | None = None,
        save: Callable[[TrainedModel, TrainingState], None] | None = None,
        request: Callable[[], Request] = lambda: Request.GO_ON,
    ) -> None:
        self.config, self._dataset = config, dataset
        self._report, self._save, self._request = report, save, request
        self._ranks = Ranks.of(dataset.train.device)
        self._schedule = config.schedule.build()
        self._learner = Learner(config, dataset.spec.shape, self._ranks, dataset.spec.num_classes)
        self._model = TrainedModel(config, dataset.spec, self._learner.averaged_network)
        self._model.network.register_forward_pre_hook(self._break_off)
        self._loss_history = (
            LossSecondMoment(self._schedule.num_train_timesteps)
            if config.training.timestep_sampling == "importance"
            else None
        )
        self._evaluate_at = set(evaluation_points(config.training))
        self._may_break_off = False
        self.updates = 0
        self.history: list[dict[str, Any]] = []
        self._evaluated: set[int] = set()
        self._losses = 0
        self._order = DataOrder(len(dataset.train), config.training.batch_size, config.seed)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        if initial_weights is not None:
            self._learner.start_from(initial_weights)
        if resume is not None:
            self._restore(*resume)

    def run(self) -> None:
        """Train to the end.

        Raises:
            Diverged: the loss or the validation error is not a finite number.
            Stopped: `request` asked for it on some worker.
        """
        training, dataset = self.config.training, self._dataset
        order = self._order
        share = self._ranks.share(training.batch_size)
        # Closed, since images that are streamed from disk are decoded ahead.
        with closing(dataset.train.batches(order.batches(self.updates, share))) as batches:
            while True:
                evaluates = self.updates in self._evaluate_at - self._evaluated
                if evaluates or self.updates % _UPDATES_BETWEEN_REQUESTS == 0:
                    self._consult(evaluates)
                if self.updates == training.num_updates:
                    return
                self._update(next(batches), share)

    def _update(self, x_0: Tensor, share: slice) -> None:
        """One update; the whole batch's noise is drawn, so that it does not depend on the workers."""
        seed, batch_size = self.config.seed, self.config.training.batch_size
        device = self._ranks.device
        generator = noise_generator(seed, self.updates, device)
        timesteps, importance = self._draw_timesteps(generator)
        noise = torch.randn(batch_size, *x_0.shape[1:], generator=generator, device=device)[share]
        if self.config.data.horizontal_flips:
            flips = torch.rand(batch_size, generator=generator, device=device)[share] < 0.5
            x_0 = torch.where(flips[:, None, None, None], x_0.flip(-1), x_0)
        labels = self._labels(generator, share)
        seed_dropout(seed, self.updates, self._ranks.rank)
        weights = None if importance is None else importance[share]
        self._loss_sum += self._learner.step(self.updates, x_0, timesteps[share], noise, labels, weights)
        if self._loss_history is not None:
            losses = self._ranks.gathered(self._learner.last_losses, self.config.training.batch_size)
            self._loss_history.observe(timesteps, losses)
        self._losses += 1
        self.updates += 1

    def _draw_timesteps(self, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The whole batch's timesteps, and weights where they are not drawn uniformly."""
        total, count = self._schedule.num_train_timesteps, self.config.training.batch_size
        if self._loss_history is not None:
            return self._loss_history.draw(count, generator)
        stratified = self.config.training.timestep_sampling == "stratified"
        draw = stratified_timesteps if stratified else uniform_timesteps
        return draw(total, count, generator), None

    def _labels(self, generator: torch.Generator, share: slice) -> Tensor | None:
        """This worker's labels of the batch, some of them hidden, for a conditional network."""
        null_label = self._dataset.spec.num_classes
        if not null_label:
            return None
        device, labels = self._ranks.device, self._dataset.train.labels
        assert labels is not None
        index = self._order.batch(self.updates).to(device)
        hidden = torch.rand(len(index), generator=generator, device=device)
        dropout = self.config.training.label_dropout
        return torch.where(hidden < dropout, null_label, labels[index])[share]

    def _consult(self, evaluates: bool) -> None:
        """Evaluate if that is due, then do what any worker wants done."""
        wish = self._request()
        failure = f"the loss is no longer a finite number after {self.updates} updates"
        if evaluates:
            self._gather_losses()
        if evaluates and self._ranks.leads:
            try:
                self._evaluate()
            except _Interrupted:
                wish = Request.BROKEN_OFF
            except Diverged:
                wish = Request.GIVE_UP
        wish = Request(self._ranks.highest(wish))
        if wish == Request.GIVE_UP:
            raise Diverged(failure)
        if evaluates and wish != Request.BROKEN_OFF:
            self._evaluated.add(self.updates)
        if wish >= Request.CHECKPOINT and self.updates:
            self._gather_losses()
            self._write()
        finished = self.updates == self.config.training.num_updates
        if wish == Request.BROKEN_OFF or wish == Request.STOP and not finished:
            raise Stopped(f"stopped after {self.updates} updates")

    def _evaluate(self) -> None:
        self._may_break_off = True
        try:
            metrics, elbo = self._measure()
        finally:
            self._may_break_off = False
        self.history.append({"update": self.updates, "metrics": metrics})
        self._loss_sum.zero_()
        self._losses = 0
        # In this order: an evaluation that a checkpoint knows of has been reported.
        self._report(Progress(self.updates, metrics, elbo, self._model))
        self._write()

    def _measure(self) -> tuple[dict[str, float], ElboWindow]:
        training = self.config.training
        evaluator = Evaluator(self.config, self._dataset)
        metrics, elbo = evaluator.held_out_losses(self._model.network)
        metrics["train/mse"] = float(self._loss_sum) / self._losses
        if not (math.isfinite(metrics["train/mse"]) and math.isfinite(metrics["val/elbo_window"])):
            raise Diverged
        metrics["training/learning_rate"] = training.learning_rate * learning_rate_factor(
            training, self.updates - 1
        )
        metrics |= schedule_metrics(self._schedule, math.prod(self._dataset.spec.shape))
        finished = self.updates == training.num_updates
        if finished:
            metrics |= evaluator.discrete_bound(self._model.network)
        if finished or self.config.metrics.objective == "sample/distance":
            metrics |= evaluator.samples(
                self._model.network,
                self._dataset.val[:],
                num_samples=self.config.metrics.num_samples,
                seed=self.config.metrics.seed,
            )
        metrics["objective"] = metrics[self.config.metrics.objective]
        return metrics, elbo

    def _gather_losses(self) -> None:
        """Bring what all workers lost together on the leading one."""
        total = self._ranks.total(float(self._loss_sum))
        self._loss_sum.fill_(total if self._ranks.leads else 0.0)

    def _write(self) -> None:
        if self._save is None or not self._ranks.leads:
            return
        state = TrainingState(
            update=self.updates,
            random={"seed": self.config.seed, "update": self.updates}
            | ({"loss_history": self._loss_history.state()} if self._loss_history else {}),
            history=list(self.history),
            loss_sum=float(self._loss_sum),
            losses=self._losses,
            **self._learner.state(),
        )
        self._save(self._model, state)

    def _restore(self, model: TrainedModel, state: TrainingState) -> None:
        learned = {
            "network": state.network,
            "optimizer": state.optimizer,
            "scaler": state.scaler,
            "ema_updates": state.ema_updates,
        }
        self._learner.restore(learned, model.network.state_dict())
        self.updates, self.history = state.update, list(state.history)
        self._evaluated = {entry["update"] for entry in self.history}
        self._losses = state.losses
        if self._loss_history is not None and "loss_history" in state.random:
            self._loss_history.restore(state.random["loss_history"])
        if self._ranks.leads:
            self._loss_sum.fill_(state.loss_sum)

    def _break_off(self, *_call: object) -> None:
        if self._may_break_off and self._request() == Request.STOP:
            raise _Interrupted


def evaluation_points(training: TrainingConfig) -> list[int]:
    """Numbers of updates after which a training is evaluated, evenly spread, the last at its end."""
    count = min(training.num_evaluations, training.num_updates)
    return [round(training.num_updates * (index + 1) / count) for index in range(count)]
