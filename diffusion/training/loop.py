"""The training loop, which passes its results to callables and does not depend on what runs it."""

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import metrics as names
from diffusion.config import Config, TrainingConfig
from diffusion.data.augmentation import augment
from diffusion.data.dataset import Dataset
from diffusion.data.low_resolution import LowResolution, noised
from diffusion.devices import widest_float
from diffusion.evaluation.elbo_window import ElboWindow
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features import Features, fit_features
from diffusion.evaluation.measured_objective import MeasuredObjective
from diffusion.metrics import Objective
from diffusion.networks.build import build_network
from diffusion.process.schedule_checks import schedule_metrics
from diffusion.registry import OBJECTIVES
from diffusion.seeding import ShuffledBatchSampler, seed_dropout
from diffusion.training.best_evaluation import BestEvaluation, best_evaluation
from diffusion.training.checkpoints import TrainedModel, TrainingState
from diffusion.training.distributed import DistributedContext, Interrupted
from diffusion.training.random_draws import RandomDraws
from diffusion.training.timestep_sampling import LossSecondMoment, stratified_timesteps, uniform_timesteps
from diffusion.training.train_step import TrainStep, learning_rate_factor

# How often the workers combine their requests, which costs a collective operation.
_UPDATES_BETWEEN_REQUESTS = 10


class Request(IntEnum):
    """What a worker asks all workers to do; the highest value among the workers counts.

    The last two are those of all workers: the evaluation was interrupted, or training has diverged.
    """

    CONTINUE = 0
    CHECKPOINT = 1
    STOP = 2
    INTERRUPTED = 3
    ABORT = 4


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite; the message says after how many updates."""


class TrainingStopped(RuntimeError):
    """Training stopped on request, after writing a checkpoint."""


def no_low_resolution(count: int) -> tuple[Tensor, ...]:
    """The low-resolution images of a model that takes none.

    Args:
        count: number of samples.
    """
    return ()


@dataclass(frozen=True)
class EvaluationResult:
    """Result of an evaluation during training.

    Attributes:
        updates: number of optimizer steps so far.
        metrics: value of each metric by name. `best_update` and `best_objective` are those of the best
            evaluation so far, see `diffusion.training.best_evaluation`.
        elbo: the windowed bound of each example, for comparing trials example by example.
        model: the denoiser with averaged weights; valid until training continues.
        best: the best evaluation so far, which may be this one.
        low_resolution: `Training.low_resolution`, for pictures of samples.
    """

    updates: int
    metrics: dict[str, float]
    elbo: ElboWindow
    model: TrainedModel
    best: BestEvaluation
    low_resolution: Callable[[int], tuple[Tensor, ...]] = no_low_resolution


class Training:
    """Training of a denoiser, by one worker or by several data-parallel ones.

    Every random number of update u is a function of (seed, u), so a training that resumes from a
    checkpoint ends with exactly the weights of an uninterrupted one. With importance sampling, the
    timesteps also depend on earlier losses, which checkpoints contain.

    Args:
        config: what to train and how.
        dataset: the data, on the device to train on.
        report: called on rank 0 with the result of each evaluation, see `evaluation_points`. Only the last
            result has metrics `sample/...` and the discrete bound, computed for the best weights, unless
            the objective needs samples: then every result has `sample/...` for its own weights.
        features: features by which images are compared, on the same device, see `Evaluator`.
        resume: model with averaged weights and state of the checkpoint to resume from.
        initial_weights: another model's weights to start from.
        save: writes a checkpoint; called on rank 0 after each evaluation, when `request` asks for it, and
            before `TrainingStopped` is raised.
        request: polled between updates, and between calls of the network during evaluations.

    Raises:
        InputError: the network does not fit the data, or the device does not support the precision.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        report: Callable[[EvaluationResult], None],
        *,
        features: Features | None = None,
        resume: tuple[TrainedModel, TrainingState] | None = None,
        initial_weights: Mapping[str, Tensor] | None = None,
        save: Callable[[TrainedModel, TrainingState], None] | None = None,
        request: Callable[[], Request] = lambda: Request.CONTINUE,
    ) -> None:
        self.config, self._dataset, self._features = config, dataset, features
        self._report, self._save, self._request = report, save, request
        self._distributed = DistributedContext.from_process_group(dataset.train.device)
        self._schedule = config.schedule.build()
        self._train_step = TrainStep(config, dataset.spec.shape, self._distributed, dataset.spec.num_classes)
        self._model = TrainedModel(config, dataset.spec, self._train_step.averaged_network)
        self._model.network.register_forward_pre_hook(self._interrupt_if_requested)
        self._loss_history = (
            LossSecondMoment(self._schedule.num_train_timesteps)
            if config.training.timestep_sampling == "importance"
            else None
        )
        self._evaluation_points = set(evaluation_points(config.training))
        self._interruptible = False
        self.updates = 0
        self.history: list[dict[str, Any]] = []
        self.best: BestEvaluation | None = None
        self._evaluated: set[int] = set()
        self._batch_sampler = ShuffledBatchSampler(
            len(dataset.train), config.training.batch_size, config.seed
        )
        device, side = self._distributed.device, config.data.low_resolution
        self._low_resolution = None if side is None else LowResolution(dataset.spec, side)
        self._draws = RandomDraws(
            config.seed,
            self._distributed.rank,
            config.training.batch_size,
            dataset.spec.shape,
            self._draw_timesteps,
            ahead=self._loss_history is None,
            device=device,
            low_resolution_shape=None if self._low_resolution is None else self._low_resolution.shape,
            augment=config.training.augment,
        )
        # Of the updates since the last evaluation.
        self._loss_sum = torch.zeros((), dtype=widest_float(device), device=device)
        self._num_losses = 0
        if initial_weights is not None:
            self._train_step.start_from(initial_weights)
        if resume is not None:
            self._restore(*resume)

    @property
    def model(self) -> TrainedModel:
        """The denoiser with averaged weights; valid until training continues."""
        return self._model

    @property
    def train_step(self) -> TrainStep:
        """The network in training, with its averaged weights and optimizer."""
        return self._train_step

    def low_resolution(self, count: int) -> tuple[Tensor, ...]:
        """See `Evaluator.low_resolution`."""
        return Evaluator(self.config, self._dataset).low_resolution(count)

    def run(self) -> None:
        """Train to the end.

        Raises:
            TrainingDiverged: the loss or the validation error is no longer finite.
            TrainingStopped: `request` asked for it on some worker.
        """
        training, dataset = self.config.training, self._dataset
        shard = self._distributed.shard(training.batch_size)
        # Closed at the end, because streamed images are decoded ahead in the background.
        with closing(dataset.train.batches(self._batch_sampler.batches(self.updates, shard))) as batches:
            while True:
                evaluation_due = self.updates in self._evaluation_points - self._evaluated
                if evaluation_due or self.updates % _UPDATES_BETWEEN_REQUESTS == 0:
                    self._evaluate_and_handle_requests(evaluation_due)
                if self.updates == training.num_updates:
                    return
                self._update(next(batches), shard)

    def _update(self, x_0: Tensor, shard: slice) -> None:
        """Update once; noise is drawn for the whole batch, so it does not depend on the number of workers."""
        draws = self._draws.of(self.updates)
        importance = None if draws.importance is None else draws.importance[shard]
        if self.config.data.horizontal_flips:
            x_0 = torch.where(draws.flips[shard, None, None, None] < 0.5, x_0.flip(-1), x_0)
        augmentations = None if draws.augmentations is None else draws.augmentations[shard]
        if augmentations is not None:
            x_0 = augment(x_0, augmentations, self._dataset.spec.clip)
        labels = self._visible_labels(draws.labels, shard)
        inputs: tuple[Tensor, ...] = () if labels is None else (labels,)
        if self._low_resolution is not None and draws.low_resolution is not None:
            noise, u = (each[shard] for each in draws.low_resolution)
            levels = u * self.config.training.low_resolution_noise
            inputs += noised(self._low_resolution.of(x_0), noise, levels)
        seed_dropout(draws.dropout_seed, self._distributed.device)
        self._loss_sum += self._train_step.run(
            self.updates,
            x_0,
            draws.timesteps[shard],
            draws.noise[shard],
            inputs,
            importance,
            augmentations,
        )
        if self._loss_history is not None:
            batch_size = self.config.training.batch_size
            losses = self._distributed.all_gather(self._train_step.last_losses, batch_size)
            self._loss_history.observe(draws.timesteps, losses)
        self._num_losses += 1
        self.updates += 1

    def _draw_timesteps(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Timesteps of the whole batch, and their importance weights unless each is drawn uniformly."""
        if self._loss_history is not None:
            return self._loss_history.draw(count, generator)
        stratified = self.config.training.timestep_sampling == "stratified"
        draw = stratified_timesteps if stratified else uniform_timesteps
        return draw(self._schedule.num_train_timesteps, count, generator), None

    def _visible_labels(self, u: Tensor, shard: slice) -> Tensor | None:
        """Labels of this worker's shard, some replaced at random by the null label; None if unconditional."""
        null_label = self._dataset.spec.num_classes
        if not null_label:
            return None
        labels = self._dataset.train.labels
        assert labels is not None
        # The host does not wait for the copy to a GPU.
        indices = self._batch_sampler.batch(self.updates)[shard].to(u.device, non_blocking=True)
        return torch.where(u[shard] < self.config.training.label_dropout, null_label, labels[indices])

    def _evaluate_and_handle_requests(self, evaluation_due: bool) -> None:
        """Evaluate if an evaluation is due, then act on the highest request of any worker."""
        request = self._request()
        diverged = f"the loss is no longer a finite number after {self.updates} updates"
        if evaluation_due:
            try:
                self._evaluate(self._gather_losses())
            except Interrupted:
                request = Request.INTERRUPTED
            except TrainingDiverged:
                request = Request.ABORT
        request = Request(self._distributed.all_reduce_max(request))
        if request == Request.ABORT:
            raise TrainingDiverged(diverged)
        if evaluation_due and request != Request.INTERRUPTED:
            self._evaluated.add(self.updates)
        if request >= Request.CHECKPOINT and self.updates:
            self._gather_losses()
            self._save_checkpoint()
        finished = self.updates == self.config.training.num_updates
        if request == Request.INTERRUPTED or request == Request.STOP and not finished:
            raise TrainingStopped(f"stopped after {self.updates} updates")

    def _evaluate(self, loss_sum: float) -> None:
        """Evaluate the averaged weights, report the result, and write a checkpoint.

        The workers share the evaluation; rank 0 alone reports and writes.
        """
        self._interruptible = True
        try:
            metrics, elbo, best = self._compute_metrics(loss_sum)
        finally:
            self._interruptible = False
        self.best = best
        self.history.append({"update": self.updates, "metrics": metrics})
        self._loss_sum.zero_()
        self._num_losses = 0
        # Reported before it is saved: every evaluation in a checkpoint's history has been reported.
        if self._distributed.is_main:
            self._report(
                EvaluationResult(self.updates, metrics, elbo, self._model, best, self.low_resolution)
            )
        self._save_checkpoint()

    def _compute_metrics(self, loss_sum: float) -> tuple[dict[str, float], ElboWindow, BestEvaluation]:
        training = self.config.training
        evaluator = Evaluator(self.config, self._dataset, self._features, self._distributed)
        metrics, elbo = evaluator.held_out_losses(self._model.network)
        metrics[names.TRAIN_MSE] = loss_sum / self._num_losses
        if not (math.isfinite(metrics[names.TRAIN_MSE]) and math.isfinite(metrics[names.VAL_ELBO_WINDOW])):
            raise TrainingDiverged
        metrics[names.LEARNING_RATE] = training.learning_rate * learning_rate_factor(
            training, self.updates - 1
        )
        metrics |= schedule_metrics(self._schedule, math.prod(self._dataset.spec.shape))
        objective: Objective = OBJECTIVES[self.config.metrics.objective]
        if objective.needs_samples:
            metrics |= self._sample_metrics(evaluator, self._model.network)
        # Rank 0's, so that workers of different hardware agree on the best evaluation.
        metrics = self._distributed.broadcast(metrics)
        metrics[names.OBJECTIVE] = objective.value(metrics)
        measured = MeasuredObjective.of(objective, metrics, elbo.per_example)
        best = best_evaluation(self.best, self.updates, measured, self._model.network)
        metrics |= {names.BEST_UPDATE: best.update, names.BEST_OBJECTIVE: best.objective}
        if self.updates == training.num_updates:
            network = self._network_of(best)
            metrics |= evaluator.discrete_bound(network)
            if not objective.needs_samples:
                metrics |= self._sample_metrics(evaluator, network)
        return metrics, elbo, best

    def _sample_metrics(self, evaluator: Evaluator, network: nn.Module) -> dict[str, float]:
        settings = self.config.metrics
        return evaluator.sample_metrics(
            network, self._dataset.val[:], num_samples=settings.num_samples, seed=settings.seed
        )

    def _network_of(self, best: BestEvaluation) -> nn.Module:
        """The network with the weights of the best evaluation."""
        if best.update == self.updates:
            return self._model.network
        network = self._model.with_weights(best.weights).network.to(self._distributed.device)
        network.register_forward_pre_hook(self._interrupt_if_requested)
        return network

    def _gather_losses(self) -> float:
        """Move the loss sums of all workers to rank 0, and return their sum."""
        total = self._distributed.all_reduce_sum(float(self._loss_sum))
        self._loss_sum.fill_(total if self._distributed.is_main else 0.0)
        return total

    def _save_checkpoint(self) -> None:
        if self._save is None or not self._distributed.is_main:
            return
        state = TrainingState(
            update=self.updates,
            random={"seed": self.config.seed, "update": self.updates}
            | ({"loss_history": self._loss_history.state()} if self._loss_history else {}),
            history=list(self.history),
            loss_sum=float(self._loss_sum),
            losses=self._num_losses,
            best=self.best,
            **self._train_step.state(),
        )
        self._save(self._model, state)

    def _restore(self, model: TrainedModel, state: TrainingState) -> None:
        train_step_state = {
            "network": state.network,
            "optimizer": state.optimizer,
            "scaler": state.scaler,
            "ema_updates": state.ema_updates,
        }
        self._train_step.restore(train_step_state, model.network.state_dict())
        self.updates, self.history, self.best = state.update, list(state.history), state.best
        self._evaluated = {entry["update"] for entry in self.history}
        self._num_losses = state.losses
        if self._loss_history is not None and "loss_history" in state.random:
            self._loss_history.restore(state.random["loss_history"])
        if self._distributed.is_main:
            self._loss_sum.fill_(state.loss_sum)

    def _interrupt_if_requested(self, *_hook_arguments: object) -> None:
        """Forward hook of the averaged network: interrupts an evaluation when training is to stop."""
        if self._interruptible and self._request() == Request.STOP:
            raise Interrupted


def train(
    config: Config,
    dataset: Dataset,
    report: Callable[[EvaluationResult], None] = lambda result: None,
    device: str | torch.device = "cpu",
) -> TrainedModel:
    """Train a model in this process, without Ray, MLflow or files.

        model = train(preset("heart"), load_dataset(DataConfig(name="heart")))
        points = model.sample(1000)

    PyTorch's random generators are left as they are.

    Args:
        config: what to train and how; `config.data` is only recorded.
        dataset: the data, on the CPU.
        report: called with the result of each evaluation.
        device: device to train on.

    Returns:
        The denoiser with the averaged weights of the best evaluation, on the CPU.

    Raises:
        InputError: the network does not fit the data, or the device does not support the precision.
        TrainingDiverged: the loss is no longer finite.
    """
    device, spec = torch.device(device), dataset.spec
    config = config.resolve_epochs(len(dataset.train))
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        features = fit_features(dataset, config.metrics.features)
        training = Training(
            config, dataset.to(device), report, features=None if features is None else features.to(device)
        )
        training.run()
        assert training.best is not None, "the last update is followed by an evaluation"
        # A network of its own: that of the training is tied to it by a hook.
        network = build_network(config, spec.shape, spec.num_classes)
    network.load_state_dict(training.best.weights)
    return TrainedModel(config, spec, network.eval().requires_grad_(False))


def evaluation_points(training: TrainingConfig) -> list[int]:
    """Numbers of updates after which to evaluate: evenly spaced, with the last at the end of training."""
    count = min(training.num_evaluations, training.num_updates)
    return [round(training.num_updates * (index + 1) / count) for index in range(count)]
