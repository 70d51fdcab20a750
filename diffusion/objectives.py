"""What training minimises: what the network predicts, how its error counts, and how much at each t."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.process import q_sample
from diffusion.reverse import bound_terms
from diffusion.run_config import Loss, Weighting
from diffusion.sampling import PredictionType
from diffusion.schedules import Float64Array, NoiseSchedule

_LOSSES: dict[Loss, Callable[..., Tensor]] = {
    "l2": nn.functional.mse_loss,
    "l1": nn.functional.l1_loss,
    "huber": nn.functional.huber_loss,
}


@dataclass(frozen=True, eq=False)
class BatchLoss:
    """What one batch costs.

    Attributes:
        loss: scalar to differentiate, the mean over the batch.
        mse: scalar, the mean over batch and dimensions of the squared epsilon error, whatever is
            predicted and minimised; an estimate for t drawn uniformly, however t was drawn.
        per_example: [batch], each example's loss, not multiplied by the importance of its t.
    """

    loss: Tensor
    mse: Tensor
    per_example: Tensor


class Objective:
    """E_{t, x_0, epsilon} weight(t) * loss(output, target), averaged over dimensions.

    With its defaults it is the paper's L_simple (DDPM, arXiv:2006.11239, Eq. 14) divided by the number
    of dimensions, over which the paper sums.

    Seed 003 prints |x_0 - epsilon - epsilon_theta(x_t, t)|^2, twice. That cannot be: its minimum is
    E[x_0 - epsilon | x_t], which the seed's own sampler would then subtract as if it were the noise.

    l1 and huber do not aim at the conditional mean E[target | x_t] but at the median and at something
    between the two: the bound (`diffusion.variational`) and the samplers, which are written for the
    mean, no longer describe what is trained.

    Args:
        schedule: T timesteps.
        prediction_type: the target: epsilon, x_0 ("sample") or v.
        loss: l2, the squared error; l1, the absolute one; huber, half the squared error up to 1 and
            linear beyond.
        weighting: see `loss_weights`.
        min_snr_gamma: its gamma.
        device: where the batches are.

    Raises:
        ValueError: see `loss_weights`.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        prediction_type: PredictionType = "epsilon",
        loss: Loss = "l2",
        weighting: Weighting = "simple",
        min_snr_gamma: float = 5.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._schedule, self._prediction_type, self._loss = schedule, prediction_type, loss
        weights = loss_weights(schedule, prediction_type, weighting, min_snr_gamma)
        self._weights = torch.from_numpy(weights).to(device)
        self._to_epsilon = torch.from_numpy(epsilon_error_factors(schedule, prediction_type)).to(device)

    def __call__(
        self,
        network: nn.Module,
        x_0: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> BatchLoss:
        """Noise a batch, ask the network, and compare.

        Args:
            network: (x_t, timesteps) -> output of x_t's shape.
            x_0: [batch, ...] clean data in normalised units.
            timesteps: int64 [batch], each in 0..T-1.
            noise: standard normal, of x_0's shape.
            labels: int64 [batch] for a conditional network, which takes them as a third argument.
            importance: [batch], 1 / (T p(t)) where t was not drawn uniformly but with p(t).
        """
        x_t = q_sample(self._schedule, x_0, timesteps, noise)
        output = network(x_t, timesteps) if labels is None else network(x_t, timesteps, labels)
        output = output.to(x_0.dtype)
        target = training_target(self._schedule, self._prediction_type, x_0, timesteps, noise)
        error = _LOSSES[self._loss](output, target, reduction="none")
        error = error * _shaped(self._weights[timesteps], error)
        squared = (output.detach() - target).square() * _shaped(self._to_epsilon[timesteps], error)
        per_example = error.detach().flatten(1).mean(dim=1)
        if importance is not None:
            error, squared = error * _shaped(importance, error), squared * _shaped(importance, error)
        return BatchLoss(error.mean(), squared.mean(), per_example)


def training_target(
    schedule: NoiseSchedule, prediction_type: PredictionType, x_0: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """What a network that makes no error returns; shapes as in `diffusion.process.q_sample`.

    Source: DDPM, arXiv:2006.11239, Section 3.2 (epsilon and x_0); v = sqrt(alphas_cumprod) epsilon -
    sqrt(1 - alphas_cumprod) x_0 as in arXiv:2202.00512, Appendix D.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    # The noising of (x_0, noise) by a rotation, a quarter turn on: signal noise - sigma x_0.
    return q_sample(schedule, noise, timesteps, -x_0)


def epsilon_error_factors(schedule: NoiseSchedule, prediction_type: PredictionType) -> Float64Array:
    """|epsilon - epsilon_hat|^2 over the squared error of the output, float64 [T].

    For the same x_t: 1 for epsilon, the SNR for x_0, alphas_cumprod for v.
    """
    signal = schedule.alphas_cumprod
    factors = {"epsilon": np.ones_like(signal), "sample": signal / (1.0 - signal), "v_prediction": signal}
    return np.array(factors[prediction_type])


def loss_weights(
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    weighting: Weighting = "simple",
    min_snr_gamma: float = 5.0,
) -> Float64Array:
    """The weight of each timestep's error, float64 [T].

    simple: 1.
    vlb: T times the error's factor in L_t, so that the mean over uniform t is the bound's L_0 + ... +
        L_{T-1} in nats per dimension, with the variance beta-tilde and, at t = 0, a Gaussian decoder of
        variance beta_0, less its constant.
    min_snr: min(SNR, gamma) for x_0, over the SNR for epsilon, over SNR + 1 for v: one weight of x_0's
        error whatever the network predicts.

    Args:
        schedule: T timesteps.
        prediction_type: what the error is one of.
        weighting: which.
        min_snr_gamma: gamma, above 0.

    Raises:
        ValueError: an unknown weighting, a gamma that is not positive, or epsilon prediction with
            alphas_cumprod = 0.

    Source: DDPM, arXiv:2006.11239, Eqs. 12 and 14; min-SNR, arXiv:2303.09556, Section 3.4.
    """
    signal = schedule.alphas_cumprod
    if prediction_type == "epsilon" and signal[-1] == 0.0:
        raise ValueError(
            "alphas_cumprod reaches 0, where epsilon does not determine x_0: "
            "use prediction_type 'v_prediction' or 'sample', or a gentler schedule"
        )
    if not min_snr_gamma > 0.0:
        raise ValueError(f"min_snr_gamma {min_snr_gamma}: need a positive number, such as 5")
    if weighting == "simple":
        return np.ones_like(signal)
    if weighting == "min_snr":
        of_x_0 = np.minimum(signal / (1.0 - signal), min_snr_gamma)
    elif weighting == "vlb":
        of_x_0 = schedule.num_train_timesteps * bound_terms(schedule).weights
    else:
        raise ValueError(f"weighting {weighting!r}: choose simple, vlb or min_snr")
    # Times |x_0 - x0|^2 over the squared error of the output: 1 / SNR, 1 and 1 - alphas_cumprod.
    if prediction_type == "epsilon":
        return of_x_0 * (1.0 - signal) / signal
    return of_x_0 if prediction_type == "sample" else of_x_0 * (1.0 - signal)


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    """[batch] as [batch, 1, ...], of the dtype of `like`."""
    return values.to(like.dtype).reshape((-1,) + (1,) * (like.ndim - 1))
