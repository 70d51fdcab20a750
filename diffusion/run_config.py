"""The sections of the config that say how a model is made: its data, its training, its judgement.

Imports neither torch nor ray nor mlflow.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from diffusion.checks import check_choice, check_whole, require
from diffusion.errors import InputError

DataName = Literal["digits", "heart", "mnist", "fashion-mnist", "cifar10"]
Precision = Literal["fp32", "bf16", "fp16"]
Loss = Literal["l2", "l1", "huber"]
Weighting = Literal["simple", "vlb", "min_snr"]
TimestepSampling = Literal["uniform", "stratified", "importance"]
FeatureNetwork = Literal["auto", "classifier", "random", "inception"]
ObjectiveName = Literal["val/elbo_window", "val/mse", "sample/distance"]

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
    conditional: bool = False
    """Learn the classes of images as well: a folder's subfolders, or those of a named set."""
    label_column: str | None = None
    """Column of a table that is no coordinate but the class of its rows, which is learned as well."""
    memory_limit_gb: float = 4.0
    """Images of a folder that need more than this as uint8 are streamed from disk; in units of 10^9 bytes."""
    val_fraction: float = 0.15
    """Share that the sweep judges by, at most 10,000 examples."""
    test_fraction: float = 0.15
    """Share that only the champion's final figures see, at most 10,000 examples."""

    @property
    def uses_labels(self) -> bool:
        """Whether models of these data are told each example's class."""
        return self.conditional or self.label_column is not None

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
    loss: Loss = "l2"
    """l2, l1 or huber. The last two do not aim at the mean, which the samplers and the bound are made for."""
    weighting: Weighting = "simple"
    """How much each timestep's loss counts: simple (all alike), vlb (as in the bound) or min_snr."""
    min_snr_gamma: float = 5.0
    """Where min_snr cuts off the signal-to-noise ratio."""
    timestep_sampling: TimestepSampling = "uniform"
    """uniform, stratified (each batch covers all timesteps) or importance (more where losses are large)."""
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
    label_dropout: float = 0.1
    """Share of the labels that conditional models do not see in training, which guidance needs."""
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
        check_choice("training.loss", self.loss, Loss)
        check_choice("training.weighting", self.weighting, Weighting)
        check_choice("training.timestep_sampling", self.timestep_sampling, TimestepSampling)
        gamma = self.min_snr_gamma
        require(0.0 < gamma < math.inf, "training.min_snr_gamma", gamma, "above 0, such as 5")
        if self.weighting == "vlb" and self.loss != "l2":
            raise InputError(
                f"--training.weighting vlb weighs squared errors, and --training.loss {self.loss} has none: "
                "give --training.loss l2"
            )
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
        require(0.0 <= self.label_dropout < 1.0, "training.label_dropout", self.label_dropout, "0 to below 1")
        require(norm > 0.0, "training.max_gradient_norm", norm, "above 0")
        require(0.0 <= self.ema_decay < 1.0, "training.ema_decay", self.ema_decay, "0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """How models are measured. The same data and noise are used in every trial."""

    num_samples: int = 1000
    """Samples behind sample/distance, in a trial; a champion is measured by twice as many."""
    num_examples: int = 1024
    """Held-out examples behind val/mse and val/elbo_window, at most."""
    seed: int = 0
    """Seed of the noise that every trial is measured with."""
    features: FeatureNetwork = "auto"
    """What images are compared by: a classifier trained on their classes, a random network, or inception.
    auto is the classifier where there are classes."""
    objective: ObjectiveName = "val/elbo_window"
    """What a sweep judges its trials by; lower is better."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_examples"):
            check_whole(f"metrics.{name}", getattr(self, name), 2, 10_000_000)
        check_whole("metrics.seed", self.seed, 0, LARGEST_SEED)
        check_choice("metrics.features", self.features, FeatureNetwork)
        check_choice("metrics.objective", self.objective, ObjectiveName)
