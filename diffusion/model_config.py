"""The sections of the config that say what a model is: its schedule, its network, its sampler.

Imports neither torch nor ray nor mlflow.
"""

import math
from dataclasses import dataclass
from typing import Literal

from diffusion.checks import check_choice, check_whole, require
from diffusion.errors import InputError
from diffusion.preflight import why_it_cannot_run
from diffusion.sampling import PredictionType, SamplerName, Variance
from diffusion.schedules import (
    NoiseSchedule,
    Spacing,
    constant_betas,
    cosine_betas,
    linear_betas,
    quadratic_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_terminal_snr,
)

NetworkKind = Literal["mlp", "unet"]
ScheduleKind = Literal["linear", "scaled_linear", "quadratic", "cosine", "sigmoid", "constant"]
# Kinds that run from beta_start to beta_end.
_BETA_RANGES = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "quadratic": quadratic_betas,
    "sigmoid": sigmoid_betas,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The noise schedule."""

    kind: ScheduleKind = "linear"
    """linear, scaled_linear (also named quadratic) and sigmoid run from beta_start to beta_end; constant
    uses terminal_noise, cosine none of the three."""
    num_train_timesteps: int = 1000
    """T, the number of noising steps."""
    beta_start: float = 1e-4
    """Variance of the first noising step."""
    beta_end: float = 0.02
    """Variance of the last noising step."""
    terminal_noise: float = 0.9999
    """Share of noise at the last step, 1 - alphas_cumprod_T, of a constant schedule."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that nothing of the signal is left at the last step; not for epsilon."""

    def __post_init__(self) -> None:
        check_choice("schedule.kind", self.kind, ScheduleKind)
        check_whole("schedule.num_train_timesteps", self.num_train_timesteps, 1, 100_000)
        for name in ("beta_start", "beta_end", "terminal_noise"):
            value = getattr(self, name)
            require(0.0 < value < 1.0, f"schedule.{name}", value, "a number between 0 and 1, both excluded")
        if self.uses_betas and self.beta_start > self.beta_end:
            raise InputError(
                f"--schedule.beta-start {self.beta_start:g} is larger than --schedule.beta-end "
                f"{self.beta_end:g}: noise must grow, so give beta_start <= beta_end, such as 0.0001 and 0.02"
            )
        if self.zero_terminal_snr and self.num_train_timesteps < 2:
            raise InputError(
                "--schedule.zero-terminal-snr needs a first and a last step: give "
                "--schedule.num-train-timesteps 2 or more"
            )

    @property
    def uses_betas(self) -> bool:
        """Whether beta_start and beta_end say anything about this kind."""
        return self.kind in _BETA_RANGES

    def build(self) -> NoiseSchedule:
        """The schedule that these numbers describe."""
        if self.uses_betas:
            betas = _BETA_RANGES[self.kind](self.num_train_timesteps, self.beta_start, self.beta_end)
        elif self.kind == "cosine":
            betas = cosine_betas(self.num_train_timesteps)
        else:
            betas = constant_betas(self.num_train_timesteps, self.terminal_noise)
        return NoiseSchedule(zero_terminal_snr(betas) if self.zero_terminal_snr else betas)

    def why_it_cannot_run(self, prediction_type: PredictionType = "epsilon") -> str | None:
        """A reason to prune this schedule before it costs anything, or None."""
        try:
            return why_it_cannot_run(self.build(), prediction_type)
        except ValueError as error:  # what zero_terminal_snr cannot rescale
            return str(error)


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The denoiser: a joint MLP over the embedded timestep and the data, or a U-Net for images."""

    kind: NetworkKind = "mlp"
    """mlp, or unet (images only)."""
    prediction_type: PredictionType = "epsilon"
    """What the output means: epsilon, the noise; sample, x_0; v_prediction, a mixture of both."""
    hidden_size: int = 256
    """Width of every block of the MLP."""
    num_blocks: int = 4
    """Residual LayerNorm-Linear-GELU blocks of the MLP."""
    base_channels: int = 16
    """Channels of the U-Net's first level, a multiple of 8."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2)
    """Channels of each level of the U-Net over base_channels; each level halves the image."""
    num_res_blocks: int = 1
    """Residual blocks a level of the U-Net."""
    attention_resolutions: tuple[int, ...] = (7, 8)
    """The U-Net attends at levels of this many pixels a side."""
    gradient_checkpointing: bool = False
    """Compute the U-Net's blocks anew in the backward pass, to save memory."""
    dropout: float = 0.0
    """Share of each block's output that is dropped in training."""
    time_embedding_size: int = 64
    """Size of the sinusoidal embedding of the timestep."""
    data_embedding_size: int = 32
    """Size of the sinusoidal embedding of each coordinate of a point; images go in as they are."""
    data_embedding_scale: float = 25.0
    """Coordinates are multiplied by this before they are embedded."""
    raw_coordinates: bool = True
    """Put the coordinates beside their embedding. Without them unclipped sampling can diverge."""
    rescale_timesteps: bool = True
    """Show the network t * 1000 / T, so that T does not change the embedding's range."""

    def __post_init__(self) -> None:
        check_choice("network.kind", self.kind, NetworkKind)
        check_choice("network.prediction_type", self.prediction_type, PredictionType)
        check_whole("network.hidden_size", self.hidden_size, 1, 65536)
        channels = self.base_channels
        whole = isinstance(channels, int) and 8 <= channels <= 4096 and channels % 8 == 0
        require(whole, "network.base_channels", channels, "a multiple of 8 from 8 to 4096")
        require(len(self.channel_multipliers) > 0, "network.channel_multipliers", "", "one number a level")
        for multiplier in self.channel_multipliers:
            check_whole("network.channel_multipliers", multiplier, 1, 64)
        check_whole("network.num_res_blocks", self.num_res_blocks, 1, 100)
        check_whole("network.num_blocks", self.num_blocks, 1, 1000)
        require(0.0 <= self.dropout < 1.0, "network.dropout", self.dropout, "a number from 0 to below 1")
        for name in ("time_embedding_size", "data_embedding_size"):
            check_whole(f"network.{name}", getattr(self, name), 2, 4096, "at least one sine and one cosine")
        scale = self.data_embedding_scale
        require(0.0 < scale < math.inf, "network.data_embedding_scale", scale, "a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """The sampler that is deployed."""

    name: SamplerName = "ddpm"
    """ddpm (ancestral), ddim or dpmpp_2m (DPM-Solver++(2M): fewer steps)."""
    num_steps: int = 100
    """Network evaluations a sample; at most T, so a shorter schedule uses all its steps."""
    eta: float = 0.0
    """DDIM's share of fresh noise."""
    variance: Variance = "beta_tilde"
    """DDPM's noise: beta_tilde or beta."""
    spacing: Spacing = "trailing"
    """Which timesteps are visited."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of conditional models: 1 is the class as learned, 0 none, more exaggerates."""
    clip: bool = True
    """Keep the predicted clean sample within the range of the data."""

    def __post_init__(self) -> None:
        for name, choices in (("name", SamplerName), ("variance", Variance), ("spacing", Spacing)):
            check_choice(f"sampler.{name}", getattr(self, name), choices)
        check_whole("sampler.num_steps", self.num_steps, 1, 100_000)
        require(0.0 <= self.eta <= 1.0, "sampler.eta", self.eta, "0 to 1")
        scale = self.guidance_scale
        require(0.0 <= scale <= 100.0, "sampler.guidance_scale", scale, "0 to 100, such as 3")
        if self.eta > 0.0 and self.name != "ddim":
            raise InputError(f"--sampler.eta {self.eta:g}: only ddim has it; add --sampler.name ddim")
