"""One optimizer update, and the state that it changes: network, averaged weights and optimizer."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusion.config import Config, TrainingConfig
from diffusion.devices import cpu_has_bf16
from diffusion.errors import InputError
from diffusion.networks.build import build_network, check_training_memory
from diffusion.training.distributed import DistributedContext
from diffusion.training.flat_parameters import FlatParameters
from diffusion.training.loss import BatchLoss, DenoisingLoss
from diffusion.training.traced_loss import TracedLoss
from diffusion.training.weight_averaging import WeightAverage

_HALF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Recording the operations of an update takes as long as some hundreds of updates, and saves a constant time
# in each, which is a large part of the updates of small networks only.
_MIN_TRACED_UPDATES, _MAX_TRACED_WEIGHTS = 2000, 2**17


class TrainStep:
    """A network in training, with its averaged weights and optimizer.

    Its state is the same on every worker after every update.

    Args:
        config: config of the network and its training.
        shape: shape of one example.
        distributed: the workers; gradients are those of the whole batch, whatever the number of workers.
        num_classes: number of classes of a conditional network, else 0.

    Attributes:
        network: the network that the optimizer updates.

    Raises:
        InputError: the network does not fit the shape or into memory, or the device does not support the
            precision.
    """

    def __init__(
        self, config: Config, shape: tuple[int, ...], distributed: DistributedContext, num_classes: int = 0
    ) -> None:
        check_precision(config.training, distributed.device)
        self._training, self._distributed = config.training, distributed
        self._loss = DenoisingLoss(
            config.schedule.build(),
            prediction_type=config.prediction_type,
            loss=config.training.loss,
            weighting=config.training.weighting,
            min_snr_gamma=config.training.min_snr_gamma,
            device=distributed.device,
        )
        self._last: list[BatchLoss] = []
        self._traced: TracedLoss | None = None
        check_training_memory(
            config, shape, num_classes, num_workers=distributed.world_size, device=distributed.device
        )
        torch.manual_seed(config.seed)
        self.network = build_network(config, shape, num_classes).to(distributed.device)
        self._weights = FlatParameters(self.network)
        self._average = WeightAverage(self.network, self._weights, config.training)
        self._optimizer = torch.optim.AdamW(
            self._weights.tensors,
            lr=config.training.learning_rate,
            weight_decay=config.training.weight_decay,
            fused=True,
        )
        self._scaler = torch.amp.GradScaler(
            distributed.device.type, enabled=config.training.precision == "fp16"
        )
        self._worth_tracing = (
            distributed.device.type == "cpu"
            and distributed.world_size == 1
            and config.training.precision == "fp32"
            and config.training.accumulation_steps == 1
            and getattr(self.network, "static_graph", False)
            and sum(weight.numel() for weight in self.network.parameters()) <= _MAX_TRACED_WEIGHTS
        )
        self._parallel: nn.Module = self.network
        if distributed.world_size > 1:
            self._parallel = DistributedDataParallel(self.network)

    @property
    def averaged_network(self) -> nn.Module:
        """The network with averaged weights, in evaluation mode: the one to evaluate and save."""
        return self._average.network.eval()

    @property
    def last_losses(self) -> Tensor:
        """[examples], `BatchLoss.per_example` of this worker's shard of the last batch."""
        return torch.cat([chunk.per_example for chunk in self._last])

    def run(
        self,
        update: int,
        x_0: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        inputs: Sequence[Tensor] = (),
        importance: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """Update the weights once, from this worker's shard of the batch.

        Args:
            update: number of updates before this one.
            x_0: [examples, *shape] clean data, normalised.
            timesteps: int64 [examples].
            noise: standard normal, of x_0's shape.
            inputs: further inputs of the network after the timesteps, such as labels, each [examples, ...].
            importance: [examples], weights that correct for timesteps that were not drawn uniformly.
            augmentation: [examples, AUGMENTATION_SIZE], how they were augmented, or None.

        Returns:
            This worker's contribution to the batch's `BatchLoss.mse`, a scalar; the sum over the workers
            is that of the batch.
        """
        batch = x_0, timesteps, noise, importance, augmentation, *inputs
        if self._worth_tracing and self._training.num_updates - update > _MIN_TRACED_UPDATES:
            self._worth_tracing = False
            self._traced = TracedLoss(self._loss, self.network, self._weights, batch)
        if self._traced is not None:
            batch_loss, gradients = self._traced(*batch)
            self._last = [batch_loss]
            self._apply(gradients, update)
            return batch_loss.mse
        chunks = self._chunks(x_0, *batch[1:])
        self._last, contributions = [], []
        for number, chunk in enumerate(chunks, start=1):
            # Workers exchange gradients once per update, after the last chunk.
            sync_gradients = number == len(chunks) or self._distributed.world_size == 1
            with nullcontext() if sync_gradients else self._parallel.no_sync():  # type: ignore[operator]
                with self._autocast():
                    batch_loss = self._loss(self._parallel, *chunk)
                fraction = len(chunk[0]) / self._training.batch_size
                # The chunks are to be summed, but DistributedDataParallel averages over the workers.
                loss = batch_loss.loss * (fraction * self._distributed.world_size)
                self._scaler.scale(loss).backward()
            self._last.append(batch_loss)
            contributions.append(batch_loss.mse * fraction)
        self._apply(self._weights.take_gradients(), update)
        return contributions[0] if len(contributions) == 1 else torch.stack(contributions).sum()

    def _apply(self, gradients: list[Tensor], update: int) -> None:
        """Clip the joined gradients, take AdamW's step and average the weights."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.learning_rate * learning_rate_factor(self._training, update)
        for weight, gradient in zip(self._weights.tensors, gradients, strict=True):
            weight.grad = gradient
        self._scaler.unscale_(self._optimizer)
        # What `clip_grad_norm_` does, but the fused optimizer divides where it reads the gradients anyway.
        norms = [torch.linalg.vector_norm(gradient).float() for gradient in gradients]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        scale = (norm / self._training.max_gradient_norm).clamp(min=1.0)
        if self._distributed.device.type in ("cpu", "cuda"):
            self._optimizer.grad_scale = scale  # type: ignore[attr-defined]  # as GradScaler passes it
        else:  # whose fused optimizers may ignore it
            for gradient in gradients:
                gradient.div_(scale)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._average.update()

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Start from another model's weights; to be called before the first update."""
        self.network.load_state_dict(weights)
        self._average.network.load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        """The state that `restore` needs, except for the averaged weights."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._weights.split_state(self._optimizer.state_dict()),
            "scaler": self._scaler.state_dict(),
            "ema_updates": self._average.num_averaged,
        }

    def restore(self, state: Mapping[str, Any], averaged_weights: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, and the averaged weights."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(self._weights.join_state(state["optimizer"]))
        self._scaler.load_state_dict(state["scaler"])
        self._average.network.load_state_dict(averaged_weights)
        self._average.num_averaged = state["ema_updates"]

    def _chunks(self, x_0: Tensor, *rest: Tensor | None) -> list[tuple[Any, ...]]:
        """The arguments split for gradient accumulation."""
        count = min(self._training.accumulation_steps, len(x_0))
        if count == 1:
            return [(x_0, *rest)]
        chunks = ([None] * count if each is None else each.tensor_split(count) for each in rest)
        return list(zip(x_0.tensor_split(count), *chunks, strict=True))

    def _autocast(self) -> Any:
        dtype = _HALF_PRECISION.get(self._training.precision)
        return nullcontext() if dtype is None else torch.autocast(self._distributed.device.type, dtype)


def check_precision(training: TrainingConfig, device: torch.device) -> None:
    """Check that a device supports the training's precision.

    Raises:
        InputError: it does not.
    """
    if training.precision == "fp16" and device.type != "cuda":
        raise InputError("--training.precision fp16: only GPUs of NVIDIA support it; give bf16 or fp32")
    if training.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError("--training.precision bf16: this GPU does not support it; give fp16 or fp32")
    if training.precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        raise InputError(
            "--training.precision bf16: this CPU has no instructions for it, which would make it up to a "
            "hundred times slower than fp32; give fp32"
        )
    if (
        training.precision == "bf16"
        and device.type == "mps"
        and not torch.backends.mps.is_macos_or_newer(14, 0)
    ):
        raise InputError("--training.precision bf16: needs macOS 14 or newer; give fp32")


def learning_rate_factor(training: TrainingConfig, num_updates_done: int) -> float:
    """Fraction of the peak learning rate for the next update: linear warm-up, then a half cosine to 0."""
    warmup = min(training.warmup_updates, training.num_updates // 10)
    if num_updates_done < warmup:
        return (num_updates_done + 1) / (warmup + 1)
    progress = (num_updates_done - warmup) / max(1, training.num_updates - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
