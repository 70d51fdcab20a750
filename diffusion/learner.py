"""What training changes: the network, its averaged weights, the optimizer. One method is one update."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffusion.config import Config, TrainingConfig
from diffusion.errors import InputError
from diffusion.networks import build_network
from diffusion.objectives import Objective
from diffusion.ranks import Ranks

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A network in training, the same on every worker after every update.

    Args:
        config: what to build and how to train it.
        shape: of one example.
        ranks: the workers; the gradients are those of the whole batch whatever their number.
        num_classes: of a conditional network.

    Attributes:
        network: the live one.
        last_losses: [examples], of this worker's share of the last batch, see `BatchLoss.per_example`.

    Raises:
        InputError: the network does not fit the shape, or the device lacks the precision asked for.
    """

    def __init__(self, config: Config, shape: tuple[int, ...], ranks: Ranks, num_classes: int = 0) -> None:
        check_precision(config.training, ranks.device)
        self._training, self._ranks = config.training, ranks
        self._objective = Objective(
            config.schedule.build(),
            prediction_type=config.prediction_type,
            loss=config.training.loss,
            weighting=config.training.weighting,
            min_snr_gamma=config.training.min_snr_gamma,
            device=ranks.device,
        )
        self.last_losses = torch.zeros(0, device=ranks.device)
        torch.manual_seed(config.seed)
        self.network = build_network(config, shape, num_classes).to(ranks.device)
        self._averaged = AveragedModel(
            self.network, multi_avg_fn=_averaging(config.training), use_buffers=False
        )
        self._averaged.requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.training.learning_rate,
            weight_decay=config.training.weight_decay,
            fused=True,
        )
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.training.precision == "fp16")
        self._parallel: nn.Module = self.network
        if ranks.world_size > 1:
            self._parallel = DistributedDataParallel(self.network)

    @property
    def averaged_network(self) -> nn.Module:
        """The denoiser to judge and keep: the network with averaged weights, in evaluation mode."""
        return self._averaged.module.eval()

    def step(
        self,
        update: int,
        x_0: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Tensor:
        """One update, from this worker's share of the batch.

        Args:
            update: updates done before.
            x_0: [examples, *shape] clean, normalised.
            timesteps: int64 [examples].
            noise: standard normal, of x_0's shape.
            labels: int64 [examples] for a conditional network.
            importance: [examples], weights that make up for timesteps drawn otherwise than uniformly.

        Returns:
            This worker's share of the batch's `BatchLoss.mse`, a scalar: the sum over the workers is that
            of the batch.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.learning_rate * learning_rate_factor(self._training, update)
        parts = list(self._parts(x_0, timesteps, noise, labels, importance))
        total, losses = torch.zeros((), device=x_0.device), []
        for number, part in enumerate(parts, start=1):
            # Gradients travel between the workers once an update.
            last = number == len(parts) or self._ranks.world_size == 1
            with nullcontext() if last else self._parallel.no_sync():  # type: ignore[operator]
                with self._autocast():
                    batch_loss = self._objective(self._parallel, *part)
                share = len(part[0]) / self._training.batch_size
                # DistributedDataParallel averages over the workers, and the shares are to be summed.
                self._scaler.scale(batch_loss.loss * share * self._ranks.world_size).backward()
            total += batch_loss.mse * share
            losses.append(batch_loss.per_example)
        self.last_losses = torch.cat(losses)
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), self._training.max_gradient_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self._averaged.update_parameters(self.network)
        return total

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take over another model's weights before the first update."""
        self.network.load_state_dict(weights)
        self._averaged.module.load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, beside the averaged weights."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "ema_updates": int(self._averaged.n_averaged),
        }

    def restore(self, state: Mapping[str, Any], averaged_weights: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._averaged.module.load_state_dict(averaged_weights)
        self._averaged.n_averaged.fill_(state["ema_updates"])

    def _parts(self, x_0: Tensor, *rest: Tensor | None) -> Any:
        count = min(self._training.accumulation_steps, len(x_0))
        parts = ([None] * count if each is None else each.tensor_split(count) for each in rest)
        return zip(x_0.tensor_split(count), *parts, strict=True)

    def _autocast(self) -> Any:
        half = _HALF.get(self._training.precision)
        return nullcontext() if half is None else torch.autocast(self._ranks.device.type, half)


def check_precision(training: TrainingConfig, device: torch.device) -> None:
    """See that a device has the precision asked for.

    Raises:
        InputError: it has not.
    """
    if training.precision == "fp16" and device.type != "cuda":
        raise InputError("--training.precision fp16: only GPUs have it; give bf16 or fp32 on a CPU")
    if training.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError("--training.precision bf16: this GPU has none; give fp16 or fp32")


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


def _averaging(training: TrainingConfig) -> Callable[..., None]:
    def average(averaged: list[Tensor], current: list[Tensor], done: Tensor) -> None:
        get_ema_multi_avg_fn(ema_decay(training, int(done)))(averaged, current, done)

    return average
