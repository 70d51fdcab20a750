"""The variational bound L_T + ... + L_{t-1} + ... + L_0 of the schedule's discrete steps, term by term.

It is the bound of the source documents 000 to 002.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.devices import to_float64
from diffusion.evaluation.sharing import ALONE, Workers
from diffusion.process.forward import q_sample, to_x_0
from diffusion.process.generate import apply_in_batches
from diffusion.process.posterior import BoundTerms, Variance, bound_terms
from diffusion.process.prediction_types import PredictionType
from diffusion.process.schedules import Float64Array, NoiseSchedule
from diffusion.seeding import seed_of

# (x_0, mean, variance) -> -ln p(x_0 | x_1) of every value, in nats.
Decoder = Callable[[Tensor, Tensor, float], Tensor]

_NOISE_STREAM = 1  # keeps the noise independent of that of the windowed bound


@dataclass(frozen=True, eq=False)
class HeldOutBound:
    """A bound on held-out examples, in nats per dimension; lower is better.

    Attributes:
        per_example: float64 [examples], bound of each example; the mean is `value`.
    """

    per_example: Float64Array

    @property
    def value(self) -> float:
        """Mean over the examples."""
        return float(self.per_example.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of `value`, over the examples with their noise and timesteps."""
        return float(self.per_example.std(ddof=1) / np.sqrt(self.per_example.size))


@dataclass(frozen=True, eq=False)
class VariationalBound(HeldOutBound):
    """An upper bound on the negative log-likelihood, in nats per dimension.

    Attributes:
        prior: L_T, the KL divergence of q(x_T | x_0) from N(0, I).
        reconstruction: L_0, the decoder's negative log-likelihood of x_0 given x_1.
        terms: float64 [T + 1], L_0, L_1, ..., L_T in the paper's numbering; None if L_1, ..., L_{T-1} were
            estimated.
    """

    prior: float
    reconstruction: float
    terms: Float64Array | None

    @property
    def bits_per_dim(self) -> float:
        """`value` in bits per dimension."""
        return self.value / math.log(2.0)


def gaussian_decoder(x_0: Tensor, mean: Tensor, variance: float) -> Tensor:
    """-ln N(x_0; mean, variance) of every value, for continuous data such as points.

    This is a density, so the bound depends on the unit of x_0 and can be negative without limit.
    """
    return 0.5 * ((x_0 - mean).square() / variance + math.log(2.0 * math.pi * variance))


class DiscretisedGaussian:
    """-ln of the probability that N(mean, variance) assigns to the level of every value.

    Levels are the whole numbers from the lowest to the highest possible value in data units (17 for the
    digits, 256 for 8-bit images). The probability of a level is the integral of the density over half a
    step to either side; the lowest and the highest level extend to infinity.

    Args:
        mean, std: nested lists that broadcast against an example; data = x * std + mean.
        value_range: lowest and highest level.

    Source: DDPM, arXiv:2006.11239, Eq. 13, where there are 256 levels.
    """

    def __init__(self, mean: Sequence[Any], std: Sequence[Any], value_range: Sequence[float]) -> None:
        self._mean, self._std = (torch.tensor(moment, dtype=torch.float64) for moment in (mean, std))
        self._lowest, self._highest = value_range

    def __call__(self, x_0: Tensor, mean: Tensor, variance: float) -> Tensor:
        """Nats of every value, for normalised float64 x_0 and mean [batch, ...]; same shape."""
        centre, scale = self._mean.to(x_0.device), self._std.to(x_0.device)
        level = (x_0 * scale + centre).round().clip(self._lowest, self._highest)
        lower, upper = (
            ((level + half - centre) / scale - mean) / math.sqrt(variance) for half in (-0.5, 0.5)
        )
        lower = torch.where(level == self._lowest, -math.inf, lower)
        upper = torch.where(level == self._highest, math.inf, upper)
        # Above the mean both CDFs are close to 1; mirroring them keeps the precision of their difference.
        mirrored = lower > 0.0
        lower, upper = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
        smaller, larger = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
        return -(larger + torch.log1p(-torch.exp(smaller - larger)))


@torch.no_grad()
def variational_bound(
    network: nn.Module,
    schedule: NoiseSchedule,
    x_0: Tensor,
    *,
    decoder: Decoder = gaussian_decoder,
    prediction_type: PredictionType = "epsilon",
    clip: tuple[float, float] | None = None,
    variance: Variance = "beta_tilde",
    num_terms: int | None = None,
    seed: int = 0,
    inputs: Sequence[Tensor] = (),
    workers: Workers = ALONE,
) -> VariationalBound:
    """Bound on -ln p(x_0) / d under the reverse chain of ancestral sampling over all T timesteps.

        L_T      = KL(q(x_T | x_0) || N(0, I))
        L_{t-1}  = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))        for t = T, ..., 2
        L_0      = -ln p(x_0 | x_1)

    All terms are averaged over the noise and divided by d. L_T needs no network, and L_0 is always
    measured. The T - 1 terms in between take one call of the network each; either all are measured, or
    their sum is estimated by stratified sampling: one timestep per example is drawn from each of
    `num_terms` strata of equal probability, where the probability of a timestep is proportional to the
    loss of a denoiser of N(0, I).

    Source document 000 calls the bound L; L_VLB of source document 001 is its negative.

    The bound measures how well the chain compresses the data, not how good samples look. It falls with
    the number of steps and, for points, which have no levels, also with beta_0.

    Args:
        network: (x_t, timesteps) -> output, in evaluation mode.
        schedule: the schedule that the network was trained on.
        x_0: [examples, ...] data in normalised units.
        decoder: likelihood of L_0; its variance is beta_0, since beta-tilde is 0 at the first step.
        prediction_type: quantity that the network predicts.
        clip: the sampler's clip interval for x0, or None.
        variance: variance of p(x_{t-1} | x_t), see `diffusion.process.posterior.ancestral_coefficients`.
        num_terms: calls of the network, at least 1, for the estimate of L_1 + ... + L_{T-1}; None, or
            T - 1 and more, measures every term.
        seed: seed of the noise and of the timesteps.
        inputs: further inputs of the network, such as labels, each [examples, ...].
        workers: share the calls of the network, which are independent of each other.

    Raises:
        ValueError: num_terms is below 1.

    Source: DDPM, arXiv:2006.11239, Eq. 5 and Section 3.3; source document 000, Section 4.1; source document
    001, "reverse process"; estimates as in improved DDPM, arXiv:2102.09672, Section 3.3.
    """
    if num_terms is not None and num_terms < 1:
        raise ValueError(f"num_terms {num_terms}: need at least 1, or None for every term")
    terms = bound_terms(schedule, variance)
    target = to_float64(x_0)

    def x0_hat(timesteps: Tensor, call: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(seed, _NOISE_STREAM, call))
        noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
        x_t = q_sample(schedule, x_0, timesteps, noise)
        output = to_float64(apply_in_batches(network, x_t, timesteps, *inputs))
        predicted = to_x_0(schedule, prediction_type, output, to_float64(x_t), timesteps)
        return predicted if clip is None else predicted.clip(*clip)

    second_moment = _per_example(target.square())
    prior = kl_to_prior(second_moment, float(schedule.log_snr[-1]))
    num_inner_terms = schedule.num_train_timesteps - 1
    if is_exact := num_terms is None or num_terms >= num_inner_terms:
        calls = list(_every_timestep(terms, len(x_0)))
    else:
        calls = list(_stratified(schedule, terms, len(x_0), num_terms, seed))

    def term(call: int) -> Float64Array:
        if call == 0:
            mean = x0_hat(torch.zeros(len(x_0), dtype=torch.int64, device=x_0.device), 0)
            return _per_example(decoder(target, mean, float(terms.variances[0])))
        timesteps, factors = calls[call - 1]
        squared = (x0_hat(timesteps.to(x_0.device), call) - target).square()
        return factors * _per_example(squared)

    measured = workers.map(term, range(len(calls) + 1))
    reconstruction = measured[0]
    total = np.sum(measured, axis=0) + prior + terms.constants.sum()
    means = np.array([values.mean() for values in measured]) + terms.constants if is_exact else None
    return VariationalBound(
        per_example=total,
        prior=float(prior.mean()),
        reconstruction=float(reconstruction.mean()),
        terms=None if means is None else np.append(means, prior.mean()),
    )


def kl_to_prior(second_moment: Float64Array, log_snr: float) -> Float64Array:
    """KL(q(x_t | x_0) || N(0, I)) / d = (m a - a - ln(1 - a)) / 2, with a = sigmoid(log_snr).

    At t = T it is L_T. It also equals half the integral of the epsilon error of the denoiser of N(0, I)
    over all lower log-SNRs.

    Args:
        second_moment: m = |x_0|^2 / d, any shape.
        log_snr: log-SNR at t; the result is 0 at -inf, where nothing of x_0 is left.

    Source: DDPM, arXiv:2006.11239, Eq. 5.
    """
    a = np.exp(-np.logaddexp(0.0, -log_snr))
    return (second_moment * a - a + np.logaddexp(0.0, log_snr)) / 2.0


def _every_timestep(terms: BoundTerms, num_examples: int) -> Iterator[tuple[Tensor, Float64Array]]:
    """Timesteps [examples] and factors of x_0's squared error [examples] for each timestep from 1 on."""
    for timestep, weight in enumerate(terms.weights[1:], start=1):
        yield torch.full((num_examples,), timestep, dtype=torch.int64), np.full(num_examples, weight)


def _stratified(
    schedule: NoiseSchedule, terms: BoundTerms, num_examples: int, num_terms: int, seed: int
) -> Iterator[tuple[Tensor, Float64Array]]:
    """Drawn timesteps [examples] and factors of x_0's squared error [examples] for each stratum.

    The sum over the strata is an unbiased estimate of the sum over all timesteps from 1 on.
    """
    # The squared error of N(0, I)'s denoiser in x_0 is 1 - alphas_cumprod.
    losses = terms.weights[1:] * (1.0 - schedule.alphas_cumprod[1:])
    cumulative = np.cumsum(losses) / losses.sum()
    generator = np.random.default_rng(np.random.SeedSequence((seed, _NOISE_STREAM)))
    for stratum in range(num_terms):
        u = (stratum + generator.random(num_examples)) / num_terms
        drawn = np.minimum(np.searchsorted(cumulative, u, side="right"), len(cumulative) - 1)
        factors = (losses.sum() / num_terms / losses)[drawn] * terms.weights[1:][drawn]
        yield torch.from_numpy(drawn + 1), factors


def _per_example(values: Tensor) -> Float64Array:
    """Mean over the dimensions of each example: float64 [examples]."""
    return to_float64(values).flatten(1).mean(dim=1).cpu().numpy()
