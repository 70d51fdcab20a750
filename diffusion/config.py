"""Config: every setting of a training run, validated when it is constructed.

The same tree of dataclasses defines the command-line flags (the docstring under a field is its help text),
the config.json of a model, the parameters logged to MLflow and a part of the metadata of ONNX files.

This module imports neither torch, ray nor mlflow, so that command lines can check their input first.
"""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from diffusion.errors import InputError, nearest
from diffusion.json_values import check_types
from diffusion.metrics import VAL_ELBO_WINDOW
from diffusion.process.posterior import Variance
from diffusion.process.prediction_types import PredictionType
from diffusion.process.samplers import SamplerTable, eta_of, sampler_table, samplers_with_eta
from diffusion.process.schedule_checks import infeasible_reason
from diffusion.process.schedules import BetaSchedule, NoiseSchedule, Spacing, zero_terminal_snr
from diffusion.registry import DATA_SOURCES, NETWORKS, OBJECTIVES, SAMPLERS, SCHEDULES

Precision = Literal["fp32", "bf16", "fp16"]
Loss = Literal["l2", "l1", "huber"]
Weighting = Literal["simple", "vlb", "min_snr"]
TimestepSampling = Literal["uniform", "stratified", "importance"]
FeatureNetwork = Literal["auto", "classifier", "degradations", "random", "inception"]


# Data that a program passes to `run_training` or `run_sweep` have a name that starts like this.
IN_MEMORY = "memory://"

# Values that tell a network how an image was augmented, see `diffusion.data.augmentation`.
AUGMENTATION_SIZE = 9
MAX_LOW_RESOLUTION_NOISE = 10.0  # standard deviations of the data

MAX_SEED = 2**32 - 1  # numpy's limit, which also holds for the search algorithms


def _check_low_resolution_noise(section: str, noise: float, example: float) -> None:
    allowed = f"0 to {MAX_LOW_RESOLUTION_NOISE:g}, such as {example:g}"
    _require(0.0 <= noise <= MAX_LOW_RESOLUTION_NOISE, f"{section}.low_resolution_noise", noise, allowed)


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise InputError unless the condition holds; `allowed` completes the message "give ..."."""
    if not condition:
        raise InputError(f"--{name.replace('_', '-')} {value}: give {allowed}")


def _check_integer(name: str, value: Any, smallest: int, largest: int, reason: str = "") -> None:
    """Raise InputError unless the value is an integer from `smallest` to `largest`."""
    allowed = f"a whole number from {smallest} to {largest}"
    valid = isinstance(value, int) and smallest <= value <= largest
    _require(valid, name, value, f"{allowed} ({reason})" if reason else allowed)


def is_data_name(name: str) -> bool:
    """Whether a value of --data is the name of a data set, rather than a path."""
    return name[:1] not in (".", "/") and name in DATA_SOURCES


def data_names() -> list[str]:
    """Names of the named data sets."""
    return [name for name in DATA_SOURCES if is_data_name(name)]


def allowed_data() -> str:
    """The allowed values of --data, in words for an error message that says "give ..."."""
    suffixes = [name for name in DATA_SOURCES if name.startswith(".")]
    return (
        f"one of {', '.join(data_names())}, or the path of a folder of images or of a "
        f"{', '.join(suffixes[:-1])} or {suffixes[-1]} table"
    )


def _check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise InputError unless the value is one of those of a Literal type."""
    _require(value in get_args(choices), name, value, f"one of {', '.join(get_args(choices))}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The noise schedule."""

    kind: str = "linear"
    """linear, scaled_linear (alias quadratic) and sigmoid go from beta_start to beta_end.
    constant uses terminal_noise; cosine has no parameters."""
    num_train_timesteps: int = 1000
    """T, the number of noising steps, 1 to 100,000."""
    beta_start: float = 1e-4
    """Noise variance of the first step, between 0 and 1."""
    beta_end: float = 0.02
    """Noise variance of the last step, from beta_start to below 1."""
    terminal_noise: float = 0.9999
    """constant only: fraction of noise in the variance of x_T, 1 - alphas_cumprod_T, between 0 and 1."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that x_T is pure noise; needs prediction type sample or v_prediction."""

    def __post_init__(self) -> None:
        SCHEDULES.check(self.kind, "schedule.kind")
        _check_integer("schedule.num_train_timesteps", self.num_train_timesteps, 1, 100_000)
        for name in ("beta_start", "beta_end", "terminal_noise"):
            value = getattr(self, name)
            _require(0.0 < value < 1.0, f"schedule.{name}", value, "a number above 0 and below 1")
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
        """Whether this kind of schedule depends on beta_start and beta_end."""
        return {"beta_start", "beta_end"} <= set(self._beta_schedule.parameters)

    def build(self) -> NoiseSchedule:
        """Build the noise schedule."""
        schedule = self._beta_schedule
        parameters = {name: getattr(self, name) for name in schedule.parameters}
        betas = schedule.betas(self.num_train_timesteps, **parameters)
        return NoiseSchedule(zero_terminal_snr(betas) if self.zero_terminal_snr else betas)

    @property
    def _beta_schedule(self) -> BetaSchedule:
        return SCHEDULES[self.kind]

    def infeasible_reason(self, prediction_type: PredictionType = "epsilon") -> str | None:
        """Why no model can be trained with this schedule, in one line, or None if it is usable."""
        try:
            return infeasible_reason(self.build(), prediction_type)
        except ValueError as error:  # zero_terminal_snr cannot rescale these betas
            return str(error)


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The denoiser: an MLP over the embedded timestep and data, or a U-Net for images."""

    kind: str = "mlp"
    """mlp (points or images) or unet (images of 8x8 pixels or more)."""
    prediction_type: PredictionType = "epsilon"
    """What the network predicts: epsilon (the noise), sample (x_0) or v_prediction (a mix of both)."""
    hidden_size: int = 256
    """MLP only: width of every block, 1 to 65,536."""
    num_blocks: int = 4
    """MLP only: number of residual LayerNorm-Linear-GELU blocks, 1 to 1000."""
    base_channels: int = 16
    """U-Net only: channels of the first level, a multiple of 8 from 8 to 4096."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2)
    """U-Net only: channels of each level as a multiple (1 to 64) of base_channels.
    Each level after the first halves the image."""
    num_res_blocks: int = 1
    """U-Net only: residual blocks per level, 1 to 100."""
    attention_resolutions: tuple[int, ...] = (7, 8)
    """U-Net only: image sides, in pixels, of the levels that use self-attention."""
    gradient_checkpointing: bool = False
    """U-Net only: recompute activations in the backward pass; saves memory, takes more time."""
    dropout: float = 0.0
    """Dropout probability in every block, from 0 to below 1."""
    time_embedding_size: int = 64
    """Size of the sinusoidal embedding of the timestep, 2 to 4096."""
    data_embedding_size: int = 32
    """Points only: size of the sinusoidal embedding of each coordinate, 2 to 4096."""
    data_embedding_scale: float = 25.0
    """Points only: factor, above 0, by which coordinates are multiplied before they are embedded."""
    raw_coordinates: bool = True
    """Points only: feed in the coordinates in addition to their embedding.
    Without them, unclipped sampling can diverge."""
    input_activation: bool = True
    """MLP only: apply GELU after the first layer."""
    output_norm: bool = True
    """MLP only: apply LayerNorm before the last layer; by default for points only."""
    rescale_timesteps: bool = True
    """Embed t * 1000 / T instead of t, so that the range of the input does not depend on T."""

    def __post_init__(self) -> None:
        NETWORKS.check(self.kind, "network.kind")
        _check_choice("network.prediction_type", self.prediction_type, PredictionType)
        _check_integer("network.hidden_size", self.hidden_size, 1, 65536)
        channels = self.base_channels
        valid = isinstance(channels, int) and 8 <= channels <= 4096 and channels % 8 == 0
        _require(valid, "network.base_channels", channels, "a multiple of 8 from 8 to 4096")
        _require(
            len(self.channel_multipliers) > 0, "network.channel_multipliers", "()", "one number per level"
        )
        for multiplier in self.channel_multipliers:
            _check_integer("network.channel_multipliers", multiplier, 1, 64)
        _check_integer("network.num_res_blocks", self.num_res_blocks, 1, 100)
        _check_integer("network.num_blocks", self.num_blocks, 1, 1000)
        _require(0.0 <= self.dropout < 1.0, "network.dropout", self.dropout, "a number from 0 to below 1")
        for name in ("time_embedding_size", "data_embedding_size"):
            _check_integer(
                f"network.{name}", getattr(self, name), 2, 4096, "at least one sine and one cosine"
            )
        scale = self.data_embedding_scale
        _require(0.0 < scale < math.inf, "network.data_embedding_scale", scale, "a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """The sampler used in evaluations and stored in the exported model."""

    name: str = "ddpm"
    """ddpm (ancestral sampling), ddim, dpmpp_2m or dpmpp_3m (DPM-Solver++ of second or third order, which
    need fewer steps), dpmpp_2m_sde (with fresh noise), heun (EDM's), or heun_churn (with fresh noise)."""
    num_steps: int = 100
    """Sampling steps, 1 to 100,000; T is used if it is smaller. Each is one network evaluation,
    or two with heun and heun_churn."""
    eta: float | None = None
    """ddim and heun_churn only: noise added in each step, from 0 (none, deterministic) to 1 (as much as ddpm;
    EDM's largest churn). By default 0 in ddim and 0.25 in heun_churn."""
    variance: Variance = "beta_tilde"
    """Variance of ddpm's reverse steps: beta_tilde (that of q(x_{t-1} | x_t, x_0)) or beta."""
    spacing: Spacing = "logsnr"
    """How timesteps are chosen: evenly in log-SNR (logsnr), by EDM's rule (karras), which takes more of
    little noise, or evenly in t (leading, trailing, linspace), which takes few of these or none."""
    guidance_scale: float = 1.0
    """Classifier-free guidance scale of conditional models, 0 to 100.
    0 ignores the label, 1 samples the class as learned, larger values emphasise the class."""
    clip: bool = True
    """Clip the predicted x_0 to the range of the data in every step."""
    low_resolution_noise: float = 0.1
    """Super-resolution only: standard deviation of the noise that is added to the low-resolution image,
    from 0 to training.low_resolution_noise."""

    def __post_init__(self) -> None:
        SAMPLERS.check(self.name, "sampler.name")
        for name, choices in (("variance", Variance), ("spacing", Spacing)):
            _check_choice(f"sampler.{name}", getattr(self, name), choices)
        _check_integer("sampler.num_steps", self.num_steps, 1, 100_000)
        eta = self.eta
        _require(eta is None or 0.0 <= eta <= 1.0, "sampler.eta", eta, "0 to 1")
        scale = self.guidance_scale
        _require(0.0 <= scale <= 100.0, "sampler.guidance_scale", scale, "0 to 100, such as 3")
        _check_low_resolution_noise("sampler", self.low_resolution_noise, 0.1)
        if eta and not SAMPLERS[self.name].uses_eta:
            users = samplers_with_eta()
            raise InputError(
                f"--sampler.eta {eta:g}: only {' and '.join(users)} use it; add --sampler.name {users[0]}"
            )

    @property
    def used_eta(self) -> float:
        """`eta`, or the sampler's own if none is given."""
        return eta_of(self.name, self.eta)

    def build(
        self, schedule: NoiseSchedule, clip: tuple[float, float], prediction_type: PredictionType
    ) -> SamplerTable:
        """Build the sampler's coefficient table with `num_steps` steps, or T if that is smaller.

        Args:
            schedule: the schedule that the network was trained with.
            clip: (lo, hi) limits of the predicted x_0 in normalised units, used if `self.clip` is set.
            prediction_type: what the network predicts.
        """
        return sampler_table(
            schedule,
            self.name,
            min(self.num_steps, schedule.num_train_timesteps),
            prediction_type=prediction_type,
            eta=self.eta,
            variance=self.variance,
            spacing=self.spacing,
            clip=clip if self.clip else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data set and how it is split."""

    name: str = "digits"
    """A named data set, or the absolute path of a folder of images or of a table of points.
    memory://KIND stands for data that were passed from Python."""
    image_size: int | None = None
    """Side in pixels, 4 to 4096, to which images of a folder are resized and cropped, or those of a named
    data set are reduced. By default the shorter side of the first image, at most 64."""
    super_resolution: str | None = None
    """LOW:HIGH, such as 7:28: train the second model of a cascade, which receives images reduced to LOW
    pixels and draws them with HIGH pixels, a multiple of LOW."""
    skip_bad_images: bool = False
    """Skip unreadable images of a folder instead of failing."""
    horizontal_flips: bool = False
    """Mirror each training image left to right with probability 0.5."""
    conditional: bool = False
    """Train a class-conditional model; classes are a folder's subfolders or those of a named data set."""
    label_column: str | None = None
    """Table column that holds the class of each row; the model is conditioned on it."""
    split_column: str | None = None
    """Table column that holds the split of each row: train, val or test."""
    group_column: str | None = None
    """Table column whose equal rows, such as those of one patient, stay in one split."""
    memory_limit_gb: float = 4.0
    """Stream images of a folder from disk if they exceed this size as uint8, in GB (10^9 bytes)."""
    val_fraction: float = 0.15
    """Fraction of the examples for validation, 0.01 to 0.4, at most 10,000 examples."""
    test_fraction: float = 0.15
    """Fraction of the examples for the final test, 0.01 to 0.4, at most 10,000 examples."""

    @property
    def uses_labels(self) -> bool:
        """Whether models of these data are conditional: they receive the class of each example."""
        return self.conditional or self.label_column is not None

    @property
    def low_resolution(self) -> int | None:
        """Side in pixels of the images that a super-resolution model receives; None for other models."""
        return None if self.super_resolution is None else int(self.super_resolution.partition(":")[0])

    @property
    def image_side(self) -> int | None:
        """Side in pixels that images are to have; None: that of the data."""
        if self.super_resolution is None:
            return self.image_size
        return int(self.super_resolution.partition(":")[2])

    def __post_init__(self) -> None:
        is_path = Path(self.name).is_absolute()
        if not (is_path or is_data_name(self.name) or self.name.startswith(IN_MEMORY)):
            raise InputError(f"--data {self.name}: give {allowed_data()}")
        if self.image_size is not None:
            _check_integer("image_size", self.image_size, 4, 4096)
        if self.super_resolution is not None:
            self._check_super_resolution(self.super_resolution)
        columns = [self.label_column, self.split_column, self.group_column]
        for flag, column in zip(("label", "split", "group"), columns, strict=True):
            _require(column != "", f"{flag}_column", '""', "the name of a column")
        given = [column for column in columns if column is not None]
        if len(set(given)) < len(given):
            raise InputError(
                f"--label-column, --split-column and --group-column name {', '.join(given)}: give different "
                "columns"
            )
        limit = self.memory_limit_gb
        _require(0.0 < limit < math.inf, "memory_limit_gb", limit, "above 0, such as 4")
        for name in ("val_fraction", "test_fraction"):
            value = getattr(self, name)
            _require(0.01 <= value <= 0.4, f"data.{name}", value, "0.01 to 0.4")

    def _check_super_resolution(self, text: str) -> None:
        flag = f"--super-resolution {text}"
        if not re.fullmatch("[0-9]{1,4}:[0-9]{1,4}", text):
            raise InputError(f"{flag}: give LOW:HIGH, the two sides in pixels, such as 7:28")
        low, high = map(int, text.split(":"))
        if not (4 <= low < high <= 4096 and high >= 8 and high % low == 0):
            raise InputError(
                f"{flag}: the images have to become larger by a whole factor, from 4 pixels or more to 8 or "
                "more; give a low and a high side such as 7:28"
            )
        if self.image_size not in (None, high):
            raise InputError(
                f"--image-size {self.image_size} and {flag}, which makes images of {high} pixels: leave out "
                "--image-size"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How the denoiser is trained."""

    num_updates: int = 8000
    """Number of updates (optimizer steps), at least 1; the learning rate decays to 0 over them."""
    num_epochs: float | None = None
    """Passes over the training split, in place of num_updates, which is then computed from them."""
    batch_size: int = 128
    """Examples per update, over all workers together, at least 1."""
    accumulation_steps: int = 1
    """Chunks into which each worker splits its part of a batch (gradient accumulation), to save memory."""
    loss: Loss = "l2"
    """l2, l1 or huber. Only l2 learns the conditional mean that samplers and likelihoods are derived for."""
    weighting: Weighting = "simple"
    """Loss weight of each timestep: simple (all equal), vlb (variational bound) or min_snr."""
    min_snr_gamma: float = 5.0
    """min_snr only: upper limit, above 0, of the signal-to-noise ratio in the weight."""
    timestep_sampling: TimestepSampling = "uniform"
    """uniform, stratified (evenly spread in each batch) or importance (more often where losses are large)."""
    precision: Precision = "fp32"
    """Precision of the forward pass: fp32, bf16 (not on all CPUs) or fp16 (GPUs only); weights are fp32."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, above 0, at most 1."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, 0 or more."""
    warmup_updates: int = 100
    """Updates over which the learning rate rises linearly; at most a tenth of all updates."""
    max_gradient_norm: float = 1.0
    """Norm, above 0, to which gradients are clipped."""
    ema_decay: float = 0.9999
    """Maximum decay of the moving average of the weights, from 0 to below 1.
    The decay is lower early in a training and in short trainings."""
    label_dropout: float = 0.1
    """Probability of hiding a label from a conditional model in training, from 0 to below 1.
    Classifier-free guidance needs it above 0."""
    augment: float = 0.0
    """Images only: probability of each random change of a training image (flips, scale, rotation, stretch and
    shift), from 0 (none) to 1. The network is told the changes, and samples are drawn with none."""
    low_resolution_noise: float = 0.5
    """Super-resolution only: largest standard deviation, 0 to 10, of the noise that is added to
    low-resolution images, in units of the data's. Each example has its own, and the network is told it."""
    num_evaluations: int = 8
    """Evaluations on the validation split, evenly spaced over the updates; the last is at the end."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints of train.py, which also writes one at every evaluation."""

    def __post_init__(self) -> None:
        for name, smallest in (
            ("num_updates", 1),
            ("batch_size", 1),
            ("accumulation_steps", 1),
            ("warmup_updates", 0),
            ("num_evaluations", 1),
        ):
            _check_integer(f"training.{name}", getattr(self, name), smallest, 10**9)
        _check_choice("training.precision", self.precision, Precision)
        _check_choice("training.loss", self.loss, Loss)
        _check_choice("training.weighting", self.weighting, Weighting)
        _check_choice("training.timestep_sampling", self.timestep_sampling, TimestepSampling)
        gamma = self.min_snr_gamma
        _require(0.0 < gamma < math.inf, "training.min_snr_gamma", gamma, "above 0, such as 5")
        if self.weighting == "vlb" and self.loss != "l2":
            raise InputError(
                "--training.weighting vlb is only defined for squared errors, not for --training.loss "
                f"{self.loss}: give --training.loss l2"
            )
        epochs, minutes = self.num_epochs, self.checkpoint_minutes
        _require(epochs is None or 0.0 < epochs < 1e6, "training.num_epochs", epochs, "above 0, such as 20")
        _require(0.0 < minutes < math.inf, "training.checkpoint_minutes", minutes, "above 0, such as 5")
        steps, batch = self.accumulation_steps, self.batch_size
        _require(
            steps <= batch, "training.accumulation_steps", steps, f"at most the batch size, which is {batch}"
        )
        rate, decay, norm = self.learning_rate, self.weight_decay, self.max_gradient_norm
        _require(0.0 < rate <= 1.0, "training.learning_rate", rate, "above 0, at most 1, such as 0.001")
        _require(0.0 <= decay < math.inf, "training.weight_decay", decay, "0 or more")
        _require(
            0.0 <= self.label_dropout < 1.0, "training.label_dropout", self.label_dropout, "0 to below 1"
        )
        _require(0.0 <= self.augment <= 1.0, "training.augment", self.augment, "0 to 1, such as 0.1")
        _check_low_resolution_noise("training", self.low_resolution_noise, 0.5)
        _require(norm > 0.0, "training.max_gradient_norm", norm, "above 0")
        _require(0.0 <= self.ema_decay < 1.0, "training.ema_decay", self.ema_decay, "0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """How models are evaluated. All trials use the same held-out examples and noise."""

    num_samples: int = 1000
    """Samples generated for sample/distance, at least 2; the final test generates twice as many."""
    num_examples: int = 1024
    """Maximum number of validation examples for val/mse and val/elbo_window, at least 2."""
    seed: int = 0
    """Seed of the noise in evaluations, the same for all trials."""
    features: FeatureNetwork = "auto"
    """Network whose features images are compared by: classifier, degradations, random or inception.
    auto is a classifier trained on the images' classes if each has enough images, else degradations: a
    network trained to tell in which way an image was degraded. Both stand beside a random one."""
    choose_sampler: bool = False
    """Measure the finished model with every sampler at several numbers of steps, and deploy the cheapest
    that is as good as the best. The default, unless values of the sampler are given."""
    objective: str = VAL_ELBO_WINDOW
    """What a sweep ranks its trials by, lower is better: val/elbo_window, val/mse or sample/distance."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_examples"):
            _check_integer(f"metrics.{name}", getattr(self, name), 2, 10_000_000)
        _check_integer("metrics.seed", self.seed, 0, MAX_SEED)
        _check_choice("metrics.features", self.features, FeatureNetwork)
        OBJECTIVES.check(self.objective, "metrics.objective")


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
    """Seed of the initial weights, the order of the examples and the training noise."""

    def __post_init__(self) -> None:
        _check_integer("seed", self.seed, 0, MAX_SEED)
        if self.schedule.zero_terminal_snr and self.prediction_type == "epsilon":
            raise InputError(
                "--schedule.zero-terminal-snr makes x_T pure noise, where epsilon says nothing about the "
                "data: add --network.prediction-type v_prediction"
            )
        if self.data.super_resolution is not None:
            self._check_super_resolution()

    def _check_super_resolution(self) -> None:
        if self.network.kind != "unet":
            raise InputError(
                f"--network.kind {self.network.kind}: only a U-Net receives low-resolution images; give "
                "unet, or leave out --super-resolution"
            )
        largest, used = self.training.low_resolution_noise, self.sampler.low_resolution_noise
        if used > largest:
            raise InputError(
                f"--sampler.low-resolution-noise {used:g} is more than the {largest:g} of "
                "--training.low-resolution-noise: the network would not know it; give less, or train with "
                "more"
            )

    @property
    def prediction_type(self) -> PredictionType:
        """What the network predicts."""
        return self.network.prediction_type

    @property
    def timestep_scale(self) -> float:
        """Factor by which networks multiply timesteps before they embed them."""
        return 1000.0 / self.schedule.num_train_timesteps if self.network.rescale_timesteps else 1.0

    def infeasible_reason(self) -> str | None:
        """Why this config cannot be trained, in one line, or None if it can."""
        return self.schedule.infeasible_reason(self.prediction_type)

    def to_dict(self) -> dict[str, Any]:
        """Convert to nested dicts of plain values, for JSON."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """All values by dotted name, such as `schedule.beta_start`."""
        return _flatten(self.to_dict())

    def resolve_epochs(self, num_examples: int) -> "Config":
        """A copy in which `training.num_epochs`, if set, is converted to `training.num_updates`.

        Args:
            num_examples: number of examples in the training split.
        """
        training = self.training
        if training.num_epochs is None:
            return self
        updates = max(1, math.ceil(training.num_epochs * num_examples / training.batch_size))
        return self.with_values({"training.num_updates": updates, "training.num_epochs": None})

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Config":
        """Read nested dicts that `to_dict` wrote, also those of older versions that lack some fields.

        Raises:
            InputError: an unknown name, or a value that has another type or is not allowed.
        """
        if not isinstance(tree, dict):
            raise InputError("the config is not an object with sections")
        for section, hints in _hints().items():
            values = tree.get(section) if section else tree
            if isinstance(values, dict):
                check_types(values, hints, f"{section}." if section else "")
        try:
            # JSON has lists only, the config has tuples.
            sections = {
                name: _SECTIONS[name](
                    **{
                        key: tuple(leaf) if isinstance(leaf, list) else leaf
                        for key, leaf in (_VALUES_OF_OLDER_VERSIONS.get(name, {}) | value).items()
                    }
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
        """A copy with some values replaced, given by dotted name.

        Raises:
            InputError: an unknown name, or a value that is not allowed.
        """
        tree = self.to_dict()
        for dotted, value in values.items():
            section, _, name = dotted.rpartition(".")
            branch = tree.get(section) if section else tree
            if not isinstance(branch, dict) or name not in branch:
                raise InputError(f"{dotted}: no parameter has that name; {nearest(dotted, self.flat())}")
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

# Fields that older versions lack, where the default is not what these versions did.
_VALUES_OF_OLDER_VERSIONS: dict[str, dict[str, Any]] = {
    "network": {"input_activation": False, "output_norm": False}
}


@functools.cache
def _hints() -> dict[str, dict[str, Any]]:
    """Type hints of the values of each section, and of the seed under an empty name."""
    return {"": {"seed": int}} | {name: get_type_hints(section) for name, section in _SECTIONS.items()}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
