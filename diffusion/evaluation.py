"""What a model is judged by: the same held-out data and noise for every model."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.generation import Condition, deployed_table, generate
from diffusion.likelihood import ElboWindow, elbo_window, variational_bound
from diffusion.portions import in_portions
from diffusion.process import q_sample, to_epsilon
from diffusion.sample_quality import SampleJudge
from diffusion.variational import Decoder, DiscretisedGaussian, gaussian_decoder

# More rows than examples, so that each timestep's share of val/mse is even.
_MSE_ROWS, _MSE_ROWS_AN_EXAMPLE = 4096, 16
# Calls of the network for val/bits_per_dim, beside the one for L_0: less than val/elbo_window takes.
_BOUND_TERMS = 24


class Evaluator:
    """Measures denoisers of one config on one data set."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.config = config
        self.dataset = dataset
        self.schedule = config.schedule.build()
        self.clip = dataset.spec.clip if config.sampler.clip else None

    def held_out_losses(self, network: nn.Module) -> tuple[dict[str, float], ElboWindow]:
        """val/mse, its curve, val/elbo_window with its parts, and that example by example.

        The curve is `val/mse_at_log_snr_N`, the squared epsilon error at every even log-SNR N that the
        window and the schedule reach, between the timesteps where val/elbo_window measured it (so with
        x0 clipped as the sampler clips it).
        """
        examples, labels = self._held_out()
        bound = elbo_window(
            network,
            self.schedule,
            examples,
            self.dataset.spec.log_snr_window,
            prediction_type=self.config.prediction_type,
            clip=self.clip,
            seed=self.config.metrics.seed,
            labels=labels,
        )
        metrics = {
            "val/mse": self._mean_squared_error(network, examples, labels),
            "val/elbo_window": bound.value,
            "val/elbo_window_se": bound.standard_error,
            "val/elbo_window_above": bound.above,
            "val/elbo_window_below": bound.below,
        }
        for log_snr in range(-100, 101, 2):
            if len(bound.log_snr) and bound.log_snr[0] <= log_snr <= bound.log_snr[-1]:
                error = float(np.interp(log_snr, bound.log_snr, bound.errors))
                metrics[f"val/mse_at_log_snr_{log_snr}"] = error
        return metrics, bound

    def discrete_bound(self, network: nn.Module) -> dict[str, float]:
        """The variational bound of the schedule's own steps, estimated, with its standard error.

        Images: `val/bits_per_dim`, of the levels that their pixels have. Points: `val/nats_per_dim`, of
        a density in normalised units. No objective: see `diffusion.variational`.
        """
        spec = self.dataset.spec
        decoder: Decoder = gaussian_decoder
        if spec.range is not None:
            decoder = DiscretisedGaussian(spec.mean, spec.std, spec.range)
        examples, labels = self._held_out()
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
            labels=labels,
        )
        if spec.range is None:
            return {"val/nats_per_dim": bound.value, "val/nats_per_dim_se": bound.standard_error}
        return {
            "val/bits_per_dim": bound.bits_per_dim,
            "val/bits_per_dim_se": bound.standard_error / math.log(2.0),
        }

    def _held_out(self) -> tuple[Tensor, Tensor | None]:
        """The examples that every model is judged by, and their labels for a conditional one."""
        count = self.config.metrics.num_examples
        labels = self.dataset.val.labels if self.dataset.spec.num_classes else None
        return self.dataset.val[:count], None if labels is None else labels[:count]

    def samples(
        self, network: nn.Module, reference: Tensor, *, num_samples: int, seed: int
    ) -> dict[str, float]:
        """`sample/...`: how near samples of the deployed sampler come to held-out data, with floors.

        See `SampleJudge.figures`; there is also `sample/network_evaluations`.

        Args:
            network: the denoiser, in evaluation mode.
            reference: [examples, *shape] held-out data, normalised.
            num_samples: N; at most as many as there are training examples.
            seed: of the samples' noise.
        """
        spec = self.dataset.spec
        num_samples = min(num_samples, len(self.dataset.train))
        table = deployed_table(self.config.sampler, self.schedule, spec.clip, self.config.prediction_type)
        condition = None
        if spec.num_classes:
            assert self.dataset.train.labels is not None
            # As many of each class as the data have.
            labels = self.dataset.train.labels[:num_samples]
            condition = Condition(labels, spec.num_classes, self.config.sampler.guidance_scale)
        samples = generate(
            network, table, spec.shape, num_samples, seed=seed, device=reference.device, condition=condition
        )
        figures = SampleJudge(self.dataset, reference).figures(samples)
        figures["network_evaluations"] = len(table.timesteps)
        return {f"sample/{name}": float(value) for name, value in figures.items()}

    @torch.no_grad()
    def _mean_squared_error(self, network: nn.Module, examples: Tensor, labels: Tensor | None) -> float:
        """Mean over dimensions and uniform t of the squared epsilon error."""
        generator = torch.Generator().manual_seed(self.config.metrics.seed)
        count = min(_MSE_ROWS, _MSE_ROWS_AN_EXAMPLE * len(examples))
        places = torch.arange(count, device=examples.device) % len(examples)
        rows = examples[places]
        known = [None] * count if labels is None else labels[places].split(512)
        total = self.schedule.num_train_timesteps
        spread = torch.from_numpy(np.arange(count) * total // count)
        timesteps = spread[torch.randperm(count, generator=generator)].to(examples.device)
        noise = torch.randn(rows.shape, generator=generator).to(examples.device)
        squared = 0.0
        parts = zip(rows.split(512), timesteps.split(512), noise.split(512), known, strict=False)
        for x_0, t, z, y in parts:
            x_t = q_sample(self.schedule, x_0, t, z)
            output = in_portions(network, x_t, t, y)
            epsilon = to_epsilon(self.schedule, self.config.prediction_type, output, x_t, t)
            squared += float((epsilon - z).double().square().sum())
        return squared / noise.numel()
