"""The training loss: prediction target, error function and weight of each timestep."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.config import Loss, Weighting
from diffusion.devices import widest_float
from diffusion.process.forward import q_sample
from diffusion.process.posterior import bound_terms
from diffusion.process.prediction_types import PredictionType, check_determines_x_0
from diffusion.process.schedules import Float64Array, NoiseSchedule

_LOSSES: dict[Loss, Callable[..., Tensor]] = {
    "l2": nn.functional.mse_loss,
    "l1": nn.functional.l1_loss,
    "huber": nn.functional.huber_loss,
}


@dataclass(frozen=True, eq=False)
class BatchLoss:
    """Losses of one batch.

    Attributes:
        loss: scalar to differentiate, the mean over the batch.
        mse: scalar, mean squared epsilon error over batch and dimensions, whatever the network predicts
            and the loss is; an estimate for uniform t, however t was drawn.
        error: the loss of each value, of x_0's shape, not multiplied by importance weights.
    """

    loss: Tensor
    mse: Tensor
    error: Tensor

    @property
    def per_example(self) -> Tensor:
        """[batch], loss of each example, not multiplied by its importance weight."""
        return self.error.flatten(1).mean(dim=1)


class DenoisingLoss:
    """E_{t, x_0, epsilon} weight(t) * loss(output, target), averaged over dimensions.

    With its defaults it is the paper's L_simple (DDPM, arXiv:2006.11239, Eq. 14) divided by the number
    of dimensions, over which the paper sums.

    Source document 003 prints |x_0 - epsilon - epsilon_theta(x_t, t)|^2, twice. This must be an error: the
    minimum is E[x_0 - epsilon | x_t], which the document's own sampler would subtract as if it were noise.

    The minimum of l2 is the conditional mean E[target | x_t], for which the samplers and the bound
    (`diffusion.evaluation.variational_bound`) are derived. The minimum of l1 is the conditional median,
    and that of huber lies in between, so samplers and bound no longer match the trained network.

    Args:
        schedule: noise schedule of T timesteps.
        prediction_type: the target: epsilon, x_0 ("sample") or v.
        loss: l2, the squared error; l1, the absolute error; huber, half the squared error up to 1 and
            linear beyond.
        weighting: weight of each timestep, see `loss_weights`.
        min_snr_gamma: gamma of the weighting min_snr.
        device: device of the batches.

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
        factors = epsilon_error_factors(schedule, prediction_type)
        dtype = widest_float(torch.device(device))
        # None where all are 1, which by default they are: then nothing is multiplied.
        self._weights, self._to_epsilon = (
            None if np.all(values == 1.0) else torch.from_numpy(values).to(device, dtype)
            for values in (weights, factors)
        )

    def __call__(
        self,
        network: nn.Module,
        x_0: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        importance: Tensor | None = None,
        augmentation: Tensor | None = None,
        *inputs: Tensor,
    ) -> BatchLoss:
        """Loss of the network on a batch that is noised here.

        Args:
            network: (x_t, timesteps) -> output of x_t's shape.
            x_0: [batch, ...] clean data in normalised units.
            timesteps: int64 [batch], each in 0..T-1.
            noise: standard normal, of x_0's shape.
            importance: [batch], importance weights 1 / (T p(t)) if t was drawn with probability p(t).
            augmentation: how each example was augmented, see `diffusion.data.augmentation`.
            inputs: further inputs of the network after the timesteps, such as labels, each [batch, ...].
        """
        x_t = q_sample(self._schedule, x_0, timesteps, noise)
        told = {} if augmentation is None else {"augmentation": augmentation}
        output = network(x_t, timesteps, *inputs, **told)
        output = output.to(x_0.dtype)
        target = training_target(self._schedule, self._prediction_type, x_0, timesteps, noise)
        error = _LOSSES[self._loss](output, target, reduction="none")
        # Of epsilon, as far as the network's output determines it.
        squared = error.detach() if self._loss == "l2" else (output.detach() - target).square()
        error, squared = (
            values if factors is None else values * _broadcast(factors[timesteps], values)
            for values, factors in ((error, self._weights), (squared, self._to_epsilon))
        )
        unweighted = error.detach()
        if importance is not None:
            error, squared = (values * _broadcast(importance, values) for values in (error, squared))
        loss = error.mean()
        same = self._loss == "l2" and self._weights is None and self._to_epsilon is None
        return BatchLoss(loss, loss.detach() if same else squared.mean(), unweighted)


def training_target(
    schedule: NoiseSchedule, prediction_type: PredictionType, x_0: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Output that the network is trained towards; shapes as in `diffusion.process.forward.q_sample`.

    Source: DDPM, arXiv:2006.11239, Section 3.2 (epsilon and x_0); v = sqrt(alphas_cumprod) epsilon -
    sqrt(1 - alphas_cumprod) x_0 as in arXiv:2202.00512, Appendix D.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    # q_sample with noise instead of x_0, and -x_0 instead of noise.
    return q_sample(schedule, noise, timesteps, -x_0)


def epsilon_error_factors(schedule: NoiseSchedule, prediction_type: PredictionType) -> Float64Array:
    """Ratio of |epsilon - epsilon_hat|^2 to the squared error of the output, float64 [T].

    At the same x_t it is 1 for epsilon, the SNR for x_0 and alphas_cumprod for v.
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
    """Weight of each timestep's error, float64 [T].

    simple: 1.
    vlb: T times the factor of the error in L_t. The mean over uniform t is then L_0 + ... + L_{T-1} of the
        variational bound in nats per dimension, with variance beta-tilde, and at t = 0 a Gaussian decoder
        of variance beta_0, except for the decoder's constant.
    min_snr: min(SNR, gamma) for x_0; this divided by the SNR for epsilon and by SNR + 1 for v, so that the
        weight of x_0's error does not depend on what the network predicts.

    Args:
        schedule: noise schedule of T timesteps.
        prediction_type: quantity that the network predicts.
        weighting: one of the above.
        min_snr_gamma: gamma of min_snr, above 0.

    Raises:
        ValueError: the weighting is unknown, gamma is not positive, or epsilon is predicted and
            alphas_cumprod reaches 0.

    Source: DDPM, arXiv:2006.11239, Eqs. 12 and 14; min-SNR, arXiv:2303.09556, Section 3.4.
    """
    signal = schedule.alphas_cumprod
    check_determines_x_0(prediction_type, signal[-1])
    if not min_snr_gamma > 0.0:
        raise ValueError(f"min_snr_gamma {min_snr_gamma}: need a positive number, such as 5")
    if weighting == "simple":
        return np.ones_like(signal)
    if weighting == "min_snr":
        x_0_weights = np.minimum(signal / (1.0 - signal), min_snr_gamma)
    elif weighting == "vlb":
        x_0_weights = schedule.num_train_timesteps * bound_terms(schedule).weights
    else:
        raise ValueError(f"weighting {weighting!r}: choose simple, vlb or min_snr")
    # Times the ratio of |x_0 - x0|^2 to the squared error of the output: 1 / SNR, 1 or 1 - alphas_cumprod.
    if prediction_type == "epsilon":
        return x_0_weights * (1.0 - signal) / signal
    return x_0_weights if prediction_type == "sample" else x_0_weights * (1.0 - signal)


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Values [batch] as [batch, 1, ...], with the dtype and number of dimensions of `like`."""
    return values.to(like.dtype).reshape((-1,) + (1,) * (like.ndim - 1))
