"""The one config tree: every choice of a run, validated when it is made.

The same tree is the command line, Ray's config, MLflow's parameters, the checkpoint's JSON and a
part of the ONNX metadata. This module imports neither torch nor ray nor mlflow.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from diffusion.checks import check_choice, check_whole, require
from diffusion.errors import InputError
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
)

DataName = Literal["digits", "heart", "mnist", "fashion-mnist", "cifar10"]
NetworkKind = Literal["mlp", "unet"]
Precision = Literal["fp32", "bf16", "fp16"]
ScheduleKind = Literal["linear", "scaled_linear", "quadratic", "cosine", "sigmoid", "constant"]
# Kinds that run from beta_start to beta_end.
_BETA_RANGES = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "quadratic": quadratic_betas,
    "sigmoid": sigmoid_betas,
}

# Below this the network's x_0 at the last timestep is lost even in float64.
SMALLEST_SIGNAL = 1e-30
LARGEST_SEED = 2**32 - 1  # numpy's, which the search uses


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which data, and how they are split."""

    name: str = "digits"
    """One of the named sets, or the absolute path of a folder of images or of a table of points."""
    image_size: int | None = None
    """Side that a folder's images are resized and cropped to; by default their own, at most 64."""
    skip_bad_images: bool = False
    """Leave out images of a folder that cannot be read."""
    horizontal_flips: bool = False
    """Show each image mirrored left to right half of the time in training."""
    label_column: str | None = None
    """Column of a table that is no coordinate but the class of its rows."""
    memory_limit_gb: float = 4.0
    """Images of a folder that need more than this as uint8 are streamed from disk; in units of 10^9 bytes."""
    val_fraction: float = 0.15
    """Share that the sweep judges by, at most 10,000 examples."""
    test_fraction: float = 0.15
    """Share that only the champion's final figures see, at most 10,000 examples."""

    def __post_init__(self) -> None:
        known = ", ".join(get_args(DataName))
        require(
            self.name in get_args(DataName) or Path(self.name).is_absolute(),
            "data",
            self.name,
            f"one of {known}, or the path of a folder of images or of a .csv, .parquet or .npy table",
        )
        if self.image_size is not None:
            check_whole("image_size", self.image_size, 8, 4096)
        require(self.label_column != "", "label_column", '""', "the name of a column")
        limit = self.memory_limit_gb
        require(0.0 < limit < math.inf, "memory_limit_gb", limit, "above 0, such as 4")
        for name in ("val_fraction", "test_fraction"):
            value = getattr(self, name)
            require(0.01 <= value <= 0.4, f"data.{name}", value, "0.01 to 0.4")


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
        return NoiseSchedule(betas)

    def why_it_cannot_run(self) -> str | None:
        """A reason to prune this schedule before it costs anything, or None."""
        schedule = self.build()
        if schedule.alphas_cumprod[0] == 1.0:
            return f"the first beta, {schedule.betas[0]:g}, is lost in float64: a larger one"
        signal = math.sqrt(schedule.alphas_cumprod[-1])
        if signal < SMALLEST_SIGNAL:
            return (
                f"sqrt(alphas_cumprod_T) is {signal:.1e}, below {SMALLEST_SIGNAL:g}: "
                "fewer steps or a smaller beta_end"
            )
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The denoiser: a joint MLP over the embedded timestep and the data, or a U-Net for images."""

    kind: NetworkKind = "mlp"
    """mlp, or unet (images only)."""
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
class TrainingConfig:
    """How the denoiser is trained."""

    num_updates: int = 8000
    """Optimizer steps; the learning rate decays to zero over them."""
    num_epochs: float | None = None
    """The same as passes over the training data; turned into updates once the data are known."""
    batch_size: int = 128
    """Examples in an update, over all workers together."""
    accumulation_steps: int = 1
    """Parts that a worker's share of the batch is computed in, one after another, to save memory."""
    precision: Precision = "fp32"
    """fp32, bf16 or fp16 (GPUs only) in the network's forward pass; weights stay in fp32."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    warmup_updates: int = 100
    """Updates over which the learning rate rises."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.9999
    """Upper limit of the averaging of weights; lower early on and in short trainings."""
    num_evaluations: int = 8
    """Evaluations on the validation split, evenly over the updates; the last is at the end."""
    checkpoint_minutes: float = 5.0
    """A run of train.py keeps a checkpoint this often, and at every evaluation."""

    def __post_init__(self) -> None:
        for name, smallest in (
            ("num_updates", 1),
            ("batch_size", 1),
            ("accumulation_steps", 1),
            ("warmup_updates", 0),
            ("num_evaluations", 1),
        ):
            check_whole(f"training.{name}", getattr(self, name), smallest, 10**9)
        check_choice("training.precision", self.precision, Precision)
        epochs, minutes = self.num_epochs, self.checkpoint_minutes
        require(epochs is None or 0.0 < epochs < 1e6, "training.num_epochs", epochs, "above 0, such as 20")
        require(0.0 < minutes < math.inf, "training.checkpoint_minutes", minutes, "above 0, such as 5")
        steps, batch = self.accumulation_steps, self.batch_size
        require(
            steps <= batch, "training.accumulation_steps", steps, f"at most the batch size, which is {batch}"
        )
        rate, decay, norm = self.learning_rate, self.weight_decay, self.max_gradient_norm
        require(0.0 < rate <= 1.0, "training.learning_rate", rate, "above 0, at most 1, such as 0.001")
        require(0.0 <= decay < math.inf, "training.weight_decay", decay, "0 or more")
        require(norm > 0.0, "training.max_gradient_norm", norm, "above 0")
        require(0.0 <= self.ema_decay < 1.0, "training.ema_decay", self.ema_decay, "0 to below 1")


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
    clip: bool = True
    """Keep the predicted clean sample within the range of the data."""

    def __post_init__(self) -> None:
        for name, choices in (("name", SamplerName), ("variance", Variance), ("spacing", Spacing)):
            check_choice(f"sampler.{name}", getattr(self, name), choices)
        check_whole("sampler.num_steps", self.num_steps, 1, 100_000)
        require(0.0 <= self.eta <= 1.0, "sampler.eta", self.eta, "0 to 1")
        if self.eta > 0.0 and self.name != "ddim":
            raise InputError(f"--sampler.eta {self.eta:g}: only ddim has it; add --sampler.name ddim")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """How models are measured. The same data and noise are used in every trial."""

    num_samples: int = 1000
    """Samples behind sample/distance, in a trial."""
    num_examples: int = 1024
    """Held-out examples behind val/mse and val/elbo_window, at most."""
    seed: int = 0
    """Seed of the noise that every trial is measured with."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_examples"):
            check_whole(f"metrics.{name}", getattr(self, name), 2, 10_000_000)
        check_whole("metrics.seed", self.seed, 0, LARGEST_SEED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that one training run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    seed: int = 0
    """Seed of the weights' start, the order of the data and the training noise."""

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, 0, LARGEST_SEED)

    @property
    def prediction_type(self) -> PredictionType:
        """What the network's output means."""
        return "epsilon"

    def to_dict(self) -> dict[str, Any]:
        """A tree of plain values, for JSON."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """The same under dotted names, such as `schedule.beta_start`."""
        return _flatten(self.to_dict())

    def for_examples(self, num_examples: int) -> "Config":
        """A copy whose `training.num_epochs`, if given, have become updates over so many examples."""
        training = self.training
        if training.num_epochs is None:
            return self
        updates = max(1, math.ceil(training.num_epochs * num_examples / training.batch_size))
        return self.with_values({"training.num_updates": updates, "training.num_epochs": None})

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Config":
        """Read a tree that `to_dict` wrote.

        Raises:
            InputError: an unknown name, or a value that its dataclass refuses.
        """
        try:
            # JSON knows lists alone.
            sections = {
                name: _SECTIONS[name](
                    **{key: tuple(leaf) if isinstance(leaf, list) else leaf for key, leaf in value.items()}
                )
                if name in _SECTIONS
                else value
                for name, value in tree.items()
            }
            return cls(**sections)
        except (TypeError, AttributeError) as error:
            raise InputError(
                f"the config has a name or shape that this version does not know: {error}"
            ) from error

    def with_values(self, values: dict[str, Any]) -> "Config":
        """A copy with values set by dotted names.

        Raises:
            InputError: an unknown name, or a value that is not allowed.
        """
        tree = self.to_dict()
        for dotted, value in values.items():
            section, _, name = dotted.rpartition(".")
            branch = tree.get(section) if section else tree
            if not isinstance(branch, dict) or name not in branch:
                raise InputError(f"{dotted}: no parameter has that name; there are {', '.join(self.flat())}")
            branch[name] = value
        return Config.from_dict(tree)


_SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "schedule": ScheduleConfig,
    "network": NetworkConfig,
    "training": TrainingConfig,
    "sampler": SamplerConfig,
    "metrics": MetricsConfig,
}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
