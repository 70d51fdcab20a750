"""Evaluation of a denoiser on held-out data, with the same data and noise for every model."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import metrics as names
from diffusion.config import Config
from diffusion.data.dataset import Dataset
from diffusion.data.low_resolution import LowResolution, noised_by_seed
from diffusion.devices import to_float64
from diffusion.evaluation.elbo_window import ElboWindow, elbo_window
from diffusion.evaluation.features import Features
from diffusion.evaluation.sample_metrics import SampleMetrics
from diffusion.evaluation.sharing import ALONE, Workers
from diffusion.evaluation.variational_bound import (
    Decoder,
    DiscretisedGaussian,
    gaussian_decoder,
    variational_bound,
)
from diffusion.process.forward import q_sample, to_epsilon
from diffusion.process.generate import Condition, apply_in_batches, generate, rows_per_batch
from diffusion.process.samplers import SamplerTable
from diffusion.seeding import seed_of

# val/mse uses more rows than there are examples, so that every timestep contributes evenly.
_MAX_MSE_ROWS, _MAX_MSE_ROWS_PER_EXAMPLE = 4096, 16
_MSE_BATCH_SIZE = 512
# Calls of the network for val/bits_per_dim, in addition to the one for L_0: fewer than for val/elbo_window.
_BOUND_TERMS = 24
_STREAM = 31  # of the noise of low-resolution images


class Evaluator:
    """Measures denoisers of one config on one data set.

    Args:
        config: the model's config.
        dataset: the data, on the model's device.
        features: features by which images are compared; None fits those of a random network when needed.
        workers: share all calls of the network; each of them must call the same methods.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        features: Features | None = None,
        workers: Workers = ALONE,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.features = features
        self._workers = workers
        self.schedule = config.schedule.build()
        self.clip = dataset.spec.clip if config.sampler.clip else None

    def held_out_losses(self, network: nn.Module) -> tuple[dict[str, float], ElboWindow]:
        """Metrics `val/mse`, `val/elbo_window` and `val/mse_at_log_snr_N`, and the windowed bound itself.

        `val/mse_at_log_snr_N` is the squared epsilon error at each even log-SNR N within the window and
        the schedule. It is interpolated between the timesteps at which val/elbo_window measured it, so x0
        is clipped as in the sampler.
        """
        examples, inputs = self._held_out()
        bound = elbo_window(
            network,
            self.schedule,
            examples,
            self.dataset.spec.log_snr_window,
            prediction_type=self.config.prediction_type,
            clip=self.clip,
            seed=self.config.metrics.seed,
            inputs=inputs,
            workers=self._workers,
        )
        metrics = {
            names.VAL_MSE: self._mean_squared_error(network, examples, inputs),
            names.VAL_ELBO_WINDOW: bound.value,
            names.VAL_ELBO_WINDOW + names.STANDARD_ERROR: bound.standard_error,
            names.VAL_ELBO_WINDOW + "_above": bound.above,
            names.VAL_ELBO_WINDOW + "_below": bound.below,
        }
        for log_snr in range(-100, 101, 2):
            if len(bound.log_snr) and bound.log_snr[0] <= log_snr <= bound.log_snr[-1]:
                error = float(np.interp(log_snr, bound.log_snr, bound.errors))
                metrics[f"{names.VAL_MSE_AT_LOG_SNR}{log_snr}"] = error
        return metrics, bound

    def discrete_bound(self, network: nn.Module) -> dict[str, float]:
        """Estimate of the variational bound over the schedule's own steps, and its standard error.

        Images: `val/bits_per_dim`, for the discrete levels of their pixels. Points: `val/nats_per_dim`, for
        a density in normalised units. Neither is a suitable objective for tuning: they depend on the
        number of steps, see `diffusion.evaluation.variational_bound`.
        """
        spec = self.dataset.spec
        decoder: Decoder = gaussian_decoder
        if spec.range is not None:
            decoder = DiscretisedGaussian(spec.mean, spec.std, spec.range)
        examples, inputs = self._held_out()
        bound = variational_bound(
            network,
            self.schedule,
            examples,
            decoder=decoder,
            prediction_type=self.config.prediction_type,
            clip=self.clip,
            variance=self.config.sampler.variance,
            num_terms=_BOUND_TERMS,
            seed=self.config.metrics.seed,
            inputs=inputs,
            workers=self._workers,
        )
        if spec.range is None:
            return {
                names.VAL_NATS_PER_DIM: bound.value,
                names.VAL_NATS_PER_DIM + names.STANDARD_ERROR: bound.standard_error,
            }
        return {
            names.VAL_BITS_PER_DIM: bound.bits_per_dim,
            names.VAL_BITS_PER_DIM + names.STANDARD_ERROR: bound.standard_error / math.log(2.0),
        }

    def _held_out(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The validation examples used for every model, and the further inputs of the network for them."""
        examples = self.dataset.val[: self.config.metrics.num_examples]
        labels = self.dataset.val.labels if self.dataset.spec.num_classes else None
        own = () if labels is None else (labels[: len(examples)],)
        return examples, own + self.low_resolution(len(examples))

    def low_resolution(self, count: int) -> tuple[Tensor, ...]:
        """Low-resolution images of the validation examples, again from the first if there are fewer.

        They have noise as in the deployed sampler, always the same.

        Returns:
            What a super-resolution network receives, see `noised`; nothing for other networks.
        """
        side, val = self.config.data.low_resolution, self.dataset.val
        if side is None:
            return ()
        examples = val[torch.arange(count, device=val.device) % len(val)]
        images = LowResolution(self.dataset.spec, side).of(examples)
        return noised_by_seed(
            images, self.config.sampler.low_resolution_noise, seed_of(self.config.metrics.seed, _STREAM)
        )

    def samples(self, network: nn.Module, *, num_samples: int, seed: int) -> Tensor:
        """Normalised samples [num_samples, *shape] of the deployed sampler.

        For one number of samples and one seed, sample i of every model comes from the same noise. Classes of
        a conditional model are those of the training examples, in order; low-resolution images are those of
        the validation examples.

        Args:
            network: the denoiser, in evaluation mode.
            num_samples: number of samples.
            seed: seed of the samples' noise.
        """
        spec, device, table = self.dataset.spec, self.dataset.val.device, self._table()
        labels = self.dataset.train.labels
        if labels is not None:
            labels = labels[torch.arange(num_samples, device=labels.device) % len(labels)]
        low_resolution = self.low_resolution(num_samples)

        def draw(rows: slice) -> Tensor:
            condition = None
            if spec.num_classes:
                assert labels is not None
                condition = Condition(labels[rows], spec.num_classes, self.config.sampler.guidance_scale)
            return generate(
                network,
                table,
                spec.shape,
                num_samples,
                seed=seed,
                device=device,
                condition=condition,
                inputs=[each[rows] for each in low_resolution],
                rows=rows,
            ).cpu()

        # Each worker draws whole batches of the network, so that these do not depend on how many workers
        # there are.
        batch_size = rows_per_batch(spec.shape, device)
        num_batches = -(-num_samples // batch_size)
        num_workers = self._workers.world_size
        ends = [num_batches * worker // num_workers for worker in range(num_workers + 1)]
        portions = [
            slice(first * batch_size, min(last * batch_size, num_samples))
            for first, last in pairwise(ends)
            if first < last
        ]
        return torch.cat(self._workers.map(draw, portions)).to(device)

    @property
    def network_evaluations(self) -> int:
        """Number of network calls for each sample: the rows of the sampler's table."""
        return self._table().num_rows

    def _table(self) -> SamplerTable:
        return self.config.sampler.build(self.schedule, self.dataset.spec.clip, self.config.prediction_type)

    def sample_metrics(
        self,
        network: nn.Module,
        held_out: Tensor,
        *,
        num_samples: int,
        seed: int,
        add_training: bool = True,
    ) -> dict[str, float]:
        """Metrics `sample/...`: distances between samples of the deployed sampler and the data.

        Only rank 0 compares the samples of several workers with the data; the result of others is empty.

        They are those of `SampleMetrics.compute`, and `sample/network_evaluations`, the rows of the
        sampler's table.

        Args:
            network: the denoiser, in evaluation mode.
            held_out: [examples, *shape] held-out data, normalised.
            num_samples: number of samples; reduced to the number of training examples if there are fewer.
            seed: seed of the samples' noise.
            add_training: whether training examples join the held-out data in the reference.
        """
        samples = self.samples(network, num_samples=min(num_samples, len(self.dataset.train)), seed=seed)
        if not self._workers.is_main:
            return {}
        measure = SampleMetrics(self.dataset, held_out, self.features, add_training)
        metrics = {**measure.compute(samples), names.NETWORK_EVALUATIONS: self.network_evaluations}
        return {names.SAMPLE_PREFIX + name: float(value) for name, value in metrics.items()}

    @torch.no_grad()
    def _mean_squared_error(self, network: nn.Module, examples: Tensor, inputs: tuple[Tensor, ...]) -> float:
        """Mean squared epsilon error over dimensions and uniform t."""
        generator = torch.Generator().manual_seed(self.config.metrics.seed)
        count = min(_MAX_MSE_ROWS, _MAX_MSE_ROWS_PER_EXAMPLE * len(examples))
        indices = torch.arange(count, device=examples.device) % len(examples)
        rows = examples[indices]
        evenly_spaced = torch.from_numpy(np.arange(count) * self.schedule.num_train_timesteps // count)
        timesteps = evenly_spaced[torch.randperm(count, generator=generator)].to(examples.device)
        noise = torch.randn(rows.shape, generator=generator).to(examples.device)
        each_row = (rows, timesteps, noise, *(each[indices] for each in inputs))
        batches = zip(*(each.split(_MSE_BATCH_SIZE) for each in each_row), strict=True)

        def squared_error(batch: tuple[Tensor, ...]) -> float:
            x_0, t, z, *inputs = batch
            x_t = q_sample(self.schedule, x_0, t, z)
            output = apply_in_batches(network, x_t, t, *inputs)
            epsilon = to_epsilon(self.schedule, self.config.prediction_type, output, x_t, t)
            return float(to_float64(epsilon - z).square().sum())

        errors = self._workers.map(squared_error, list(batches))
        return sum(errors) / noise.numel()
