"""What a model is judged by: the same held-out data and noise for every model."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.generation import deployed_table, generate
from diffusion.likelihood import ElboWindow, elbo_window
from diffusion.metrics import energy_distance, frechet_distance
from diffusion.portions import in_portions
from diffusion.process import q_sample, to_epsilon
from diffusion.schedules import NoiseSchedule

# More rows than examples, so that each timestep's share of val/mse is even.
_MSE_ROWS, _MSE_ROWS_AN_EXAMPLE = 4096, 16
# Images are compared by their pixels, averaged to at most this many a side.
_FEATURE_SIDE = 8


def schedule_metrics(schedule: NoiseSchedule, num_values: int) -> dict[str, float]:
    """The preflight's figures of a schedule.

    Args:
        schedule: the schedule.
        num_values: d, the number of values of one example.

    Returns:
        `schedule/alphas_cumprod_T`, `schedule/log_snr_min`, `schedule/log_snr_max`, and the bound
        -1/2 ln(1 - alphas_cumprod_T) on the prior's mismatch for unit second moment, in nats:
        `schedule/prior_kl` per dimension and `schedule/prior_kl_total`.
    """
    last = float(schedule.alphas_cumprod[-1])
    prior_kl = -0.5 * math.log1p(-last)
    return {
        "schedule/alphas_cumprod_T": last,
        "schedule/log_snr_min": float(schedule.log_snr[-1]),
        "schedule/log_snr_max": float(schedule.log_snr[0]),
        "schedule/prior_kl": prior_kl,
        "schedule/prior_kl_total": prior_kl * num_values,
    }


class Evaluator:
    """Measures denoisers of one config on one data set."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.config = config
        self.dataset = dataset
        self.schedule = config.schedule.build()
        self.clip = dataset.spec.clip if config.sampler.clip else None

    def held_out_losses(self, network: nn.Module) -> tuple[dict[str, float], ElboWindow]:
        """val/mse and val/elbo_window with its parts, and the bound example by example."""
        examples = self.dataset.val[: self.config.metrics.num_examples]
        bound = elbo_window(
            network,
            self.schedule,
            examples,
            self.dataset.spec.log_snr_window,
            prediction_type=self.config.prediction_type,
            clip=self.clip,
            seed=self.config.metrics.seed,
        )
        metrics = {
            "val/mse": self._mean_squared_error(network, examples),
            "val/elbo_window": bound.value,
            "val/elbo_window_se": bound.standard_error,
            "val/elbo_window_above": bound.above,
            "val/elbo_window_below": bound.below,
        }
        return metrics, bound

    def sample_distance(
        self, network: nn.Module, reference: Tensor, *, num_samples: int, seed: int
    ) -> dict[str, float]:
        """Distance of generated samples to held-out data by the deployed sampler, and its floor.

        Points: energy distance in normalised units. Images: Frechet distance on the pixels in data
        units, averaged to at most 8 a side.
        The floor is the distance of as many training examples (as many as there are) to the same
        reference.

        Args:
            network: the denoiser, in evaluation mode.
            reference: [examples, *shape] held-out data, normalised.
            num_samples: N.
            seed: of the samples' noise.
        """
        spec = self.dataset.spec
        num_samples = min(num_samples, len(self.dataset.train))
        table = deployed_table(self.config.sampler, self.schedule, spec.clip, self.config.prediction_type)
        samples = generate(network, table, spec.shape, num_samples, seed=seed, device=reference.device)
        return {
            "sample/distance": self._distance(samples, reference),
            "sample/distance_floor": self._distance(self.dataset.train[:num_samples], reference),
            "sample/num_samples": num_samples,
            "sample/num_reference": len(reference),
            "sample/network_evaluations": len(table.timesteps),
        }

    def _distance(self, samples: Tensor, reference: Tensor) -> float:
        if not bool(samples.isfinite().all()):
            return math.inf
        if self.dataset.spec.kind == "points":
            return energy_distance(samples, reference)
        features = (
            nn.functional.adaptive_avg_pool2d(
                torch.from_numpy(self.dataset.raw(images)),
                (min(images.shape[2], _FEATURE_SIDE), min(images.shape[3], _FEATURE_SIDE)),
            )
            for images in (samples, reference)
        )
        return frechet_distance(*features)

    @torch.no_grad()
    def _mean_squared_error(self, network: nn.Module, examples: Tensor) -> float:
        """Mean over dimensions and uniform t of the squared epsilon error."""
        generator = torch.Generator().manual_seed(self.config.metrics.seed)
        count = min(_MSE_ROWS, _MSE_ROWS_AN_EXAMPLE * len(examples))
        rows = examples[torch.arange(count, device=examples.device) % len(examples)]
        total = self.schedule.num_train_timesteps
        spread = torch.from_numpy(np.arange(count) * total // count)
        timesteps = spread[torch.randperm(count, generator=generator)].to(examples.device)
        noise = torch.randn(rows.shape, generator=generator).to(examples.device)
        squared = 0.0
        for x_0, t, z in zip(rows.split(512), timesteps.split(512), noise.split(512), strict=True):
            x_t = q_sample(self.schedule, x_0, t, z)
            epsilon = to_epsilon(
                self.schedule, self.config.prediction_type, in_portions(network, x_t, t), x_t, t
            )
            squared += float((epsilon - z).double().square().sum())
        return squared / noise.numel()
