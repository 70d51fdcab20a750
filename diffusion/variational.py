"""The variational bound of seeds 000 to 002, term by term: L_T + ... + L_{t-1} + ... + L_0."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.order import seed_of
from diffusion.portions import in_portions
from diffusion.process import q_sample, to_x_0
from diffusion.reverse import BoundTerms, ErrorCurve, TableVariance, bound_terms
from diffusion.sampling import PredictionType
from diffusion.schedules import Float64Array, NoiseSchedule

# (x_0, mean, variance) -> -ln p(x_0) of every value, in nats, where x_0 was noised by one step.
Decoder = Callable[[Tensor, Tensor, float], Tensor]

_NOISE = 1  # a stream of its own beside that of the windowed bound


@dataclass(frozen=True, eq=False)
class VariationalBound:
    """An upper bound on the negative log-likelihood, in nats per dimension.

    Attributes:
        per_example: float64 [examples], the bound of each; their mean is `value`.
        prior: L_T, the KL of q(x_T | x_0) to N(0, I).
        reconstruction: L_0, what the decoder pays for x_0 given x_1.
        terms: float64 [T + 1], L_0, L_1, ..., L_T in the paper's numbering; None where those between
            the first and the last were estimated.
    """

    per_example: Float64Array
    prior: float
    reconstruction: float
    terms: Float64Array | None

    @property
    def value(self) -> float:
        """The mean over the examples, in nats per dimension."""
        return float(self.per_example.mean())

    @property
    def standard_error(self) -> float:
        """Of `value`, over the examples, their noise and their timesteps."""
        return float(self.per_example.std(ddof=1) / np.sqrt(self.per_example.size))

    @property
    def bits_per_dim(self) -> float:
        """`value` in bits per dimension."""
        return self.value / math.log(2.0)


def gaussian_decoder(x_0: Tensor, mean: Tensor, variance: float) -> Tensor:
    """-ln N(x_0; mean, variance) of every value: for data that are real numbers, such as points.

    A density: its unit is that of x_0, so in other units the bound is another, and it has no lower end.
    """
    return 0.5 * ((x_0 - mean).square() / variance + math.log(2.0 * math.pi * variance))


class DiscretisedGaussian:
    """-ln of the probability that N(mean, variance) gives the level of every value.

    A level is one of the whole numbers from the lowest to the highest possible value in data units (17
    for the digits, 256 for 8-bit images). It owns what lies nearer to it than to any other: half a step
    to either side, and everything beyond at both ends.

    Args:
        mean, std: nested lists that broadcast against an example; data = x * std + mean.
        value_range: lowest and highest level.

    Source: DDPM, arXiv:2006.11239, Eq. 13, where the levels are 256.
    """

    def __init__(self, mean: Sequence[Any], std: Sequence[Any], value_range: Sequence[float]) -> None:
        self._mean, self._std = (torch.tensor(moment, dtype=torch.float64) for moment in (mean, std))
        self._lowest, self._highest = value_range

    def __call__(self, x_0: Tensor, mean: Tensor, variance: float) -> Tensor:
        """x_0 and mean [batch, ...] normalised, float64; the result is of their shape, in nats."""
        centre, scale = self._mean.to(x_0.device), self._std.to(x_0.device)
        level = (x_0 * scale + centre).round().clip(self._lowest, self._highest)
        lower, upper = (
            ((level + half - centre) / scale - mean) / math.sqrt(variance) for half in (-0.5, 0.5)
        )
        lower = torch.where(level == self._lowest, -math.inf, lower)
        upper = torch.where(level == self._highest, math.inf, upper)
        # Right of the middle both are close to 1: mirrored, their difference keeps its digits.
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
    variance: TableVariance = "beta_tilde",
    error_curve: ErrorCurve | None = None,
    num_terms: int | None = None,
    seed: int = 0,
    labels: Tensor | None = None,
) -> VariationalBound:
    """The bound on -ln p(x_0) / d of the chain that ancestral sampling over all T timesteps draws from.

        L_T      = KL(q(x_T | x_0) || N(0, I))
        L_{t-1}  = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))        for t = T, ..., 2
        L_0      = -ln p(x_0 | x_1)

    all of them averaged over the noise and divided by d. L_T needs no network, and L_0 is always
    measured. Of the rest, which need T - 1 calls, all are, or a stratified estimate is made: timesteps
    are drawn for each example, one from each of `num_terms` parts of equal probability, with
    probability proportional to what a denoiser of N(0, I) would lose there.

    Seed 000 calls it L; seed 001's L_VLB is its negative.

    The figure says how well the chain compresses, not how good samples look: it falls with the number
    of steps, and for points, which have no levels, with beta_0 too.

    Args:
        network: (x_t, timesteps) -> output, in evaluation mode.
        schedule: the schedule that it was trained on.
        x_0: [examples, ...] data in normalised units.
        decoder: of L_0, given the variance beta_0: beta-tilde is 0 there.
        prediction_type: what the output means.
        clip: the sampler's clip interval for x0, or None.
        variance: of p(x_{t-1} | x_t), see `diffusion.reverse.ancestral_coefficients`.
        error_curve: for "optimal".
        num_terms: calls of the network, at least 1, for the estimate of L_1 + ... + L_{T-1}; None, or
            T - 1 and more, measures every one.
        seed: of the noise and of the timesteps.
        labels: int64 [examples] for a conditional network.

    Raises:
        ValueError: num_terms below 1, or variance and error_curve that do not fit.

    Source: DDPM, arXiv:2006.11239, Eq. 5 and Section 3.3; seed 000, Section 4.1; seed 001, "reverse
    process"; estimates as in improved DDPM, arXiv:2102.09672, Section 3.3.
    """
    if num_terms is not None and num_terms < 1:
        raise ValueError(f"num_terms {num_terms}: need at least 1, or None for every term")
    terms = bound_terms(schedule, variance, error_curve)
    exact = x_0.double()

    def x0_hat(timesteps: Tensor, call: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(seed, _NOISE, call))
        noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
        x_t = q_sample(schedule, x_0, timesteps, noise)
        output = in_portions(network, x_t, timesteps, labels).double()
        found = to_x_0(schedule, prediction_type, output, x_t.double(), timesteps)
        return found if clip is None else found.clip(*clip)

    first = x0_hat(torch.zeros(len(x_0), dtype=torch.int64, device=x_0.device), 0)
    reconstruction = _per_example(decoder(exact, first, float(terms.variances[0])))
    second_moment = _per_example(exact.square())
    prior = kl_to_prior(second_moment, float(schedule.log_snr[-1]))
    measured = [reconstruction]
    calls = schedule.num_train_timesteps - 1
    if is_exact := num_terms is None or num_terms >= calls:
        plan = _every_timestep(terms, len(x_0))
    else:
        plan = _stratified(schedule, terms, len(x_0), num_terms, seed)
    for call, (timesteps, factors) in enumerate(plan, start=1):
        squared = (x0_hat(timesteps.to(x_0.device), call) - exact).square()
        measured.append(factors * _per_example(squared))
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

    At t = T it is L_T. It is half the integral of the epsilon error of N(0, I)'s denoiser over all
    log-SNR below this one, too.

    Args:
        second_moment: m = |x_0|^2 / d, any shape.
        log_snr: at t; -inf, where nothing of x_0 is left, gives 0.

    Source: DDPM, arXiv:2006.11239, Eq. 5.
    """
    a = np.exp(-np.logaddexp(0.0, -log_snr))
    return (second_moment * a - a + np.logaddexp(0.0, log_snr)) / 2.0


def _every_timestep(terms: BoundTerms, count: int) -> Iterator[tuple[Tensor, Float64Array]]:
    """(timesteps [examples], factor of x_0's squared error [examples]) for every t from 1 on."""
    for timestep, weight in enumerate(terms.weights[1:], start=1):
        yield torch.full((count,), timestep, dtype=torch.int64), np.full(count, weight)


def _stratified(
    schedule: NoiseSchedule, terms: BoundTerms, count: int, num_terms: int, seed: int
) -> Iterator[tuple[Tensor, Float64Array]]:
    """The same for drawn timesteps: the factors' sum over the calls estimates the sum over t."""
    # N(0, I)'s denoiser is off by 1 - alphas_cumprod in x_0.
    size = terms.weights[1:] * (1.0 - schedule.alphas_cumprod[1:])
    ends = np.cumsum(size) / size.sum()
    generator = np.random.default_rng(np.random.SeedSequence((seed, _NOISE)))
    for part in range(num_terms):
        u = (part + generator.random(count)) / num_terms
        drawn = np.minimum(np.searchsorted(ends, u, side="right"), len(ends) - 1)
        factors = (size.sum() / num_terms / size)[drawn] * terms.weights[1:][drawn]
        yield torch.from_numpy(drawn + 1), factors


def _per_example(values: Tensor) -> Float64Array:
    """Mean over the dimensions of each example."""
    return values.double().flatten(1).mean(dim=1).cpu().numpy()
