"""The command line of a training, and what it shares with a sweep's: flags, defaults, checks.

Imports neither torch, ray nor mlflow.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion.config import (
    LARGEST_SEED,
    Config,
    DataConfig,
    MetricsConfig,
    NetworkConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from diffusion.errors import InputError
from diffusion.presets import preset
from diffusion.sources import resolve, short_name
from workflows.storage_place import default_output_dir

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What every command that trains is told."""

    data: str = "digits"
    """digits, heart, mnist, fashion-mnist, cifar10, or the path of a folder of images or of a .csv,
    .parquet or .npy table of points."""
    image_size: int | None = None
    """Side that a folder's images are resized and cropped to; by default their own, at most 64."""
    horizontal_flips: bool = False
    """Show images to the network mirrored half of the time."""
    conditional: bool = False
    """Learn classes as well: a folder's subfolders, or those of a named set."""
    label_column: str | None = None
    """Column of a table that names a class, which is learned as well, and is no coordinate."""
    skip_bad_images: bool = False
    """Leave out images of a folder that cannot be read."""
    memory_limit_gb: float = 4.0
    """Images of a folder that need more than this are streamed from disk."""
    name: str | None = None
    """Name of the run and of its folder; a fresh one by default."""
    experiment: str | None = None
    """MLflow experiment; the data's name by default."""
    output_dir: str = field(default_factory=lambda: default_output_dir(buckets=True))
    """Folder that holds the run's folder; on a cluster by default what all its machines see."""
    tracking_uri: str | None = None
    """MLflow server or database; MLFLOW_TRACKING_URI or sqlite:///mlflow.db by default."""
    seed: int = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on with the run of --name, or with the newest unfinished one."""
    dry_run: bool = False
    """Say what would run, on what and for how long, and plot the schedule; nothing is kept."""
    verbose: bool = False
    """Show the logs and warnings of Ray, MLflow and the workers."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"--seed {self.seed}: give a whole number from 0 to {LARGEST_SEED}")
        for flag, value in (("--name", self.name), ("--experiment", self.experiment)):
            if value is not None and not _NAME.fullmatch(value):
                raise InputError(
                    f"{flag} {value!r}: give 1 to 64 letters, digits, '.', '_' and '-', "
                    "the first a letter or a digit"
                )
        for flag, text in (("--output-dir", self.output_dir), ("--tracking-uri", self.tracking_uri)):
            if text is not None and not text.strip():
                raise InputError(f"{flag} is empty: give a value, or leave the flag out")

    def data_config(self) -> DataConfig:
        """The data, a path made absolute."""
        return DataConfig(
            name=resolve(self.data),
            image_size=self.image_size,
            horizontal_flips=self.horizontal_flips,
            conditional=self.conditional,
            label_column=self.label_column,
            skip_bad_images=self.skip_bad_images,
            memory_limit_gb=self.memory_limit_gb,
        )

    def output_folder(self) -> Path:
        """The local folder that holds runs, absolute; it need not be there yet.

        Raises:
            InputError: it cannot be made or written.
        """
        parent = Path(self.output_dir).expanduser().absolute()
        existing = next(path for path in (parent, *parent.parents) if path.exists())
        if not existing.is_dir():
            raise InputError(f"--output-dir {self.output_dir}: {existing} is a file; give a folder")
        if not os.access(existing, os.W_OK):
            raise InputError(
                f"--output-dir {self.output_dir}: {existing} must not be written; give another folder"
            )
        return parent

    def free_name(self, taken: Callable[[str], bool]) -> str:
        """The name that the user chose, or a fresh one.

        Raises:
            InputError: the chosen name is taken.
        """
        if self.name is not None:
            if taken(self.name):
                there = f"{self.output_dir}/{self.name}"
                raise InputError(f"--name {self.name}: {there} exists; choose another name or remove it")
            return self.name
        stem = time.strftime(f"{short_name(self.data_config())}-%Y%m%d-%H%M")
        candidates = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
        return next(name for name in candidates if not taken(name))


@dataclass(frozen=True, kw_only=True)
class RunOptions(RunFlags):
    """The same with the whole tree of a training."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def config(self) -> Config:
        """The config of a training."""
        return Config(
            data=self.data_config(),
            schedule=self.schedule,
            network=self.network,
            training=self.training,
            sampler=self.sampler,
            metrics=self.metrics,
            seed=self.seed,
        )

    def check_batch(self, flag: str, num_workers: int) -> None:
        """See that every worker gets an example for each of its parts of a batch.

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
    """Train one diffusion model, on one machine or many; keep checkpoints; export it."""

    num_workers: int | str = 1
    """Processes that share each batch: one a GPU, or over the processors. 2:8 is from 2 to 8 of them,
    as many as there are places for."""
    init_from: str | None = None
    """Start from the weights of another run, model or checkpoint (a folder)."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; the best one is kept as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest, most = self.workers
        check_positive({"--num-workers": fewest, "--keep-checkpoints": self.keep_checkpoints})
        if fewest > most:
            raise InputError(
                f"--num-workers {self.num_workers}: the fewest come first, such as {most}:{fewest}"
            )
        if self.resume and self.init_from is not None:
            raise InputError("--init-from starts a new run: leave out --resume, or --init-from")

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most.

        Raises:
            InputError: --num-workers says neither a number nor two.
        """
        fewest, _, most = str(self.num_workers).partition(":")
        try:
            return int(fewest), int(most or fewest)
        except ValueError as error:
            raise InputError(
                f"--num-workers {self.num_workers}: give a number, or the fewest and the most, such as 2:8"
            ) from error


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainFlags, RunOptions):
    """Every flag of a training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_batch("--num-workers", self.workers[1])

    @classmethod
    def for_data(cls, data: str, image_size: int | None = None) -> "TrainOptions":
        """The defaults for a data set.

        Raises:
            InputError: no data set has that name or path.
        """
        return cls(data=data, **sections(preset(data, image_size, alone=True)))

    @classmethod
    def for_config(cls, config: Config, **flags: Any) -> "TrainOptions":
        """The defaults that an earlier run's config gives."""
        data = {name: getattr(config.data, name) for name in DATA_FLAGS}
        return cls(data=config.data.name, seed=config.seed, **data, **sections(config), **flags)


DATA_FLAGS = (
    "image_size",
    "horizontal_flips",
    "conditional",
    "label_column",
    "skip_bad_images",
    "memory_limit_gb",
)


def sections(config: Config) -> dict[str, Any]:
    """The config's sections that have flags of their own, by name."""
    return {
        "schedule": config.schedule,
        "network": config.network,
        "training": config.training,
        "sampler": config.sampler,
        "metrics": config.metrics,
    }


def check_positive(flags: dict[str, int]) -> None:
    """See that each flag's number is 1 or more.

    Raises:
        InputError: one is not.
    """
    for flag, value in flags.items():
        if value < 1:
            raise InputError(f"{flag} {value}: give 1 or more")
