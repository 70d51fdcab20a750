"""Command-line options of train.py, and those that it shares with tune.py: flags, defaults, checks.

The docstring under a field is the help text of its flag.

Imports neither torch, ray nor mlflow.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import tyro

from diffusion.config import (
    MAX_SEED,
    Config,
    DataConfig,
    MetricsConfig,
    NetworkConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from diffusion.data.sources import DataSource, resolve, short_name
from diffusion.errors import InputError
from diffusion.files import path_kind, user_path
from diffusion.presets import source_preset
from workflows.cli.model_reference import SavedConfig, StartingPoint
from workflows.environment import default_output_dir
from workflows.storage.run_record import RunRecord

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Flags that train.py and tune.py share."""

    data: str = "digits"
    """digits, heart, mnist, fashion-mnist, cifar10, or the path of a folder of images or a table of points.
    Tables are .csv, .parquet or .npy files."""
    image_size: int | None = None
    """Side in pixels, 4 to 4096, to which images of a folder are resized and cropped, or those of a named
    data set are reduced. By default the shorter side of the first image, at most 64."""
    horizontal_flips: bool = False
    """Mirror each training image left to right with probability 0.5."""
    conditional: bool = False
    """Train a class-conditional model; classes are a folder's subfolders or those of a named data set."""
    label_column: str | None = None
    """Table column that holds the class of each row; the model is conditioned on it."""
    split_column: str | None = None
    """Table column that holds the split of each row: train, val or test. Folders train, val and test do the
    same for images."""
    group_column: str | None = None
    """Table column whose equal rows, such as those of one patient, stay in one split."""
    skip_bad_images: bool = False
    """Skip unreadable images of a folder instead of failing."""
    memory_limit_gb: float = 4.0
    """Stream images of a folder from disk if they exceed this size as uint8, in GB (10^9 bytes)."""
    name: str | None = None
    """Name of the run and of its folder; by default made of the data's name and the time."""
    experiment: str | None = None
    """MLflow experiment; by default the data's name."""
    output_dir: str = field(default_factory=default_output_dir)
    """Parent of the run's folder, or s3://bucket/prefix; on a cluster by default its shared storage."""
    storage_retry_minutes: float = 60.0
    """Minutes for which a run goes on, and tries again, while the storage of its checkpoints is silent."""
    tracking_uri: str | None = None
    """MLflow server or database; by default MLFLOW_TRACKING_URI, or sqlite:///mlflow.db if it is not set."""
    seed: int = 0
    """Seed of all random numbers, 0 to 4294967295."""
    resume: bool = False
    """Resume the run named by --name, or without --name the newest unfinished run."""
    start_or_resume: bool = False
    """Start the run named by --name, or resume it if there is one; a finished run ends with status 0.
    For schedulers that run the same command again."""
    dry_run: bool = False
    """Print what would run, on which hardware and for how long, plot the noise schedule, and exit."""
    progress: bool = True
    """Show progress and a summary."""
    verbose: bool = False
    """Show logs and warnings of Ray, MLflow and the workers."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"--seed {self.seed}: give a whole number from 0 to {MAX_SEED}")
        for flag, value in (("--name", self.name), ("--experiment", self.experiment)):
            if value is not None and not _NAME.fullmatch(value):
                raise InputError(
                    f"{flag} {value!r}: give 1 to 64 letters, digits, '.', '_' and '-', "
                    "the first a letter or a digit"
                )
        minutes = self.storage_retry_minutes
        if not 0.0 <= minutes < float("inf"):
            raise InputError(f"--storage-retry-minutes {minutes:g}: give 0 or more, such as 60")
        if self.start_or_resume and self.name is None:
            raise InputError("--start-or-resume: give --name, so that the command finds its run again")
        if self.start_or_resume and self.resume:
            raise InputError("--resume and --start-or-resume: give one of them")
        for flag, text in (("--output-dir", self.output_dir), ("--tracking-uri", self.tracking_uri)):
            if text is not None and not text.strip():
                raise InputError(f"{flag} is empty: give a value, or leave the flag out")

    @property
    def may_exist(self) -> bool:
        """Whether the run may have been started by an earlier command."""
        return self.resume or self.start_or_resume

    def data_config(self) -> DataConfig:
        """Return the data config, with a path made absolute."""
        return DataConfig(
            name=resolve(self.data),
            image_size=self.image_size,
            horizontal_flips=self.horizontal_flips,
            conditional=self.conditional,
            label_column=self.label_column,
            split_column=self.split_column,
            group_column=self.group_column,
            skip_bad_images=self.skip_bad_images,
            memory_limit_gb=self.memory_limit_gb,
        )

    def output_folder(self) -> Path:
        """Return the absolute path of the local folder that holds runs; it may not exist yet.

        Raises:
            InputError: the folder cannot be created or written to.
        """
        parent = user_path(self.output_dir)
        existing = next(path for path in (parent, *parent.parents) if path_kind(path) is not None)
        if path_kind(existing) != "folder":
            raise InputError(f"--output-dir {self.output_dir}: {existing} is a file; give a folder")
        if not os.access(existing, os.W_OK):
            raise InputError(
                f"--output-dir {self.output_dir}: {existing} is not writable; give another folder"
            )
        return parent

    def free_name(self, taken: Callable[[str], bool]) -> str:
        """Return the name given by --name, or a new one.

        Args:
            taken: whether a run of this name exists.

        Raises:
            InputError: the name given by --name is taken.
        """
        if self.name is not None:
            if taken(self.name):
                path = f"{self.output_dir}/{self.name}"
                raise InputError(f"--name {self.name}: {path} exists; choose another name or remove it")
            return self.name
        stem = time.strftime(f"{short_name(self.data_config())}-%Y%m%d-%H%M")
        candidates = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
        return next(name for name in candidates if not taken(name))


@dataclass(frozen=True, kw_only=True)
class RunOptions(RunFlags):
    """The shared flags, and every parameter of a training as a dotted flag."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    trains_one_model: ClassVar[bool] = True
    """Whether the preset of the data is that of a single training, rather than that of a sweep's trials."""

    def preset_values(self) -> dict[str, Any]:
        """Return the values that the preset of the data sets, by dotted name."""
        return {
            f"{section}.{name}": value
            for section, part in sections(self).items()
            for name, value in asdict(part).items()
        }

    def with_preset(self, source: DataSource, given: Mapping[str, Any]) -> Self:
        """Return a copy in which the preset of the data replaces all values but the given ones.

        The sampler of the finished model is chosen by measurement unless values of the sampler are given.

        Args:
            source: the opened data.
            given: values to keep, by dotted name.

        Raises:
            InputError: a given value does not fit the preset, or a folder cannot be read.
        """
        config = source_preset(source, alone=self.trains_one_model)
        keeps_sampler = any(name.startswith("sampler.") for name in given)
        choice = {"metrics.choose_sampler": False} if keeps_sampler else {}
        config = config.with_values({**choice, **given})
        if config.training.augment and source.kind != "image":
            raise InputError(
                f"--training.augment {config.training.augment:g}: --data {self.data} holds points, and only "
                "images are augmented; leave it out"
            )
        return replace(self, **sections(config))

    def config(self) -> Config:
        """Return the config of a training."""
        return Config(
            data=self.data_config(),
            schedule=self.schedule,
            network=self.network,
            training=self.training,
            sampler=self.sampler,
            metrics=self.metrics,
            seed=self.seed,
        )

    def extends(self, saved: Mapping[str, Any]) -> bool:
        """Whether a finished run with these saved options has more to do with the options of this one."""
        return False

    def check_batch(self, flag: str, num_workers: int) -> None:
        """Check that a batch gives every worker an example in each of its accumulation steps.

        Args:
            flag: the flag that sets the number of workers, for the message.
            num_workers: maximum number of data-parallel workers.

        Raises:
            InputError: the batch is too small.
        """
        batch, steps = self.training.batch_size, self.training.accumulation_steps
        if batch < num_workers * steps:
            times = f" times {steps} accumulation steps" if steps > 1 else ""
            raise InputError(
                f"--training.batch-size {batch} is smaller than {flag} {num_workers}{times}: give "
                f"{num_workers * steps} or more, or fewer workers"
            )


@dataclass(frozen=True, kw_only=True)
class TrainFlags(RunFlags):
    """Train one diffusion model on one machine or on a cluster, with checkpoints, and export it to ONNX."""

    num_workers: int | str = 1
    """Data-parallel workers, one per GPU, otherwise on CPU cores.
    2:8 is elastic: between 2 and 8, as many as the cluster has room for."""
    config_file: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """config.json of a trial, champion or model, its folder, or models:/NAME@ALIAS.
    Its parameters and its data are the defaults; flags replace them."""
    init_from: str | None = None
    """Folder of a run, model or checkpoint, or models:/NAME@ALIAS, whose weights and network a new training
    starts from."""
    keep_checkpoints: int = 3
    """Number of recent checkpoints to keep, in addition to the best one."""
    super_resolution: str | None = None
    """LOW:HIGH, such as 7:28: train the second model of a cascade, which draws images of HIGH pixels for
    those that a model of --image-size LOW draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        min_workers, max_workers = self.workers
        check_positive({"--num-workers": min_workers, "--keep-checkpoints": self.keep_checkpoints})
        if min_workers > max_workers:
            raise InputError(
                f"--num-workers {self.num_workers}: the minimum comes first, "
                f"such as {max_workers}:{min_workers}"
            )
        for flag, value in (("--config", self.config_file), ("--init-from", self.init_from)):
            if self.resume and value is not None:
                raise InputError(f"{flag} starts a new run: leave out --resume, or {flag}")

    def data_config(self) -> DataConfig:
        """Return the data config, with a path made absolute."""
        return replace(super().data_config(), super_resolution=self.super_resolution)

    @property
    def workers(self) -> tuple[int, int]:
        """Minimum and maximum number of workers; equal unless the training is elastic.

        Raises:
            InputError: --num-workers is neither N nor MIN:MAX.
        """
        minimum, _, maximum = str(self.num_workers).partition(":")
        try:
            return int(minimum), int(maximum or minimum)
        except ValueError as error:
            raise InputError(
                f"--num-workers {self.num_workers}: give a number, or a minimum and a maximum such as 2:8"
            ) from error


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainFlags, RunOptions):
    """Every flag of train.py."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_batch("--num-workers", self.workers[1])

    @classmethod
    def defaults(
        cls, record: RunRecord | None, start: StartingPoint, data: str | None = None
    ) -> tuple["TrainOptions", dict[str, Any]]:
        """Return the default options, and those of their values that the preset of the data does not replace.

        Args:
            record: record of the run to resume, whose config is kept, or None.
            start: what a new training starts from.
            data: resolved name of its data, or None for those of the config that it starts from.
        """
        if record is not None:
            return cls.for_config(record.config, name=record.name, experiment=record.experiment), {}
        defaults, kept = cls(training=ANY_BATCH), {}
        if start.saved is not None:
            defaults = cls.for_config(start.saved.config)
            if data is not None:
                defaults = defaults._for_data(data, start.saved)
            kept = defaults.preset_values()
        if start.network is not None:
            defaults = replace(defaults, network=start.network)
            values = defaults.preset_values()
            kept |= {name: value for name, value in values.items() if name.startswith("network.")}
        return defaults, kept

    @classmethod
    def for_config(cls, config: Config, **flags: Any) -> "TrainOptions":
        """Return the options that reproduce an earlier run's config."""
        data = {name: getattr(config.data, name) for name in (*DATA_FLAGS, "super_resolution")}
        return cls(data=config.data.name, seed=config.seed, **data, **sections(config), **flags)

    def _for_data(self, data: str, saved: SavedConfig) -> "TrainOptions":
        """A copy, of the options of a saved config, for data of the same shape."""
        image_size, features = self.image_size, self.metrics.features
        if saved.kind == "image" and saved.shape and Path(data).is_dir():
            image_size = saved.shape[-1]
        if features in ("classifier", "degradations"):
            features = "auto"  # which of the two the other data allow is found out anew
        metrics = replace(self.metrics, features=features)
        return replace(self, data=data, image_size=image_size, metrics=metrics)


# Before the data are opened, the default batch size is not known: checks against it must pass until then.
ANY_BATCH = TrainingConfig(batch_size=10**9)
DATA_FLAGS = (
    "image_size",
    "horizontal_flips",
    "conditional",
    "label_column",
    "split_column",
    "group_column",
    "skip_bad_images",
    "memory_limit_gb",
)


def flag_name(argument: str) -> str:
    """Return the name of the flag that an argument gives: --sampler.num-steps=5 gives sampler.num_steps."""
    return argument.split("=", 1)[0].removeprefix("--").replace("-", "_") if argument[:2] == "--" else ""


def sections(config: Config | RunOptions) -> dict[str, Any]:
    """Return the sections of a config that appear as dotted flags, by name."""
    return {
        "schedule": config.schedule,
        "network": config.network,
        "training": config.training,
        "sampler": config.sampler,
        "metrics": config.metrics,
    }


def check_positive(flags: dict[str, int]) -> None:
    """Check that the value of each flag is 1 or more.

    Raises:
        InputError: a value is below 1.
    """
    for flag, value in flags.items():
        if value < 1:
            raise InputError(f"{flag} {value}: give 1 or more")
