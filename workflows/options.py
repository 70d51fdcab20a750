"""The command line of a sweep: flags, defaults and checks. Imports neither torch, ray nor mlflow."""

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

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
from workflows.search_space import SearchSpace

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class TuneFlags:
    """Sweep diffusion models over steps, noise and embeddings; keep, judge and export the best."""

    data: str = "digits"
    """digits, heart, mnist, fashion-mnist, cifar10, or the path of a folder of images or of a .csv,
    .parquet or .npy table of points."""
    image_size: int | None = None
    """Side that a folder's images are resized and cropped to; by default their own, at most 64."""
    skip_bad_images: bool = False
    """Leave out images of a folder that cannot be read."""
    num_trials: int = 12
    """Trials in the sweep, pruned ones included; 6 by default where the network is a U-Net."""
    name: str | None = None
    """Name of the sweep and of its folder; a fresh one by default."""
    experiment: str | None = None
    """MLflow experiment; the data's name by default."""
    output_dir: str = "runs"
    """Folder that holds the sweep's folder."""
    tracking_uri: str | None = None
    """MLflow server or database; MLFLOW_TRACKING_URI or sqlite:///mlflow.db by default."""
    seed: int = 0
    """Seed of the search and of every training."""
    verbose: bool = False
    """Show the logs and warnings of Ray, MLflow and the trials."""

    def __post_init__(self) -> None:
        if self.num_trials < 1:
            raise InputError(f"--num-trials {self.num_trials}: give 1 or more")
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
        if "://" in self.output_dir:
            raise InputError(
                f"--output-dir {self.output_dir}: only local folders and mounts can be written so far"
            )


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TuneFlags):
    """Every flag of a sweep."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    search: SearchSpace = field(default_factory=SearchSpace)

    @classmethod
    def for_data(cls, data: str, image_size: int | None = None) -> "TuneOptions":
        """The defaults for a data set.

        Raises:
            InputError: no data set has that name or path.
        """
        config = preset(data, image_size)
        return cls(
            data=data,
            num_trials=6 if config.network.kind == "unet" else cls.num_trials,
            schedule=config.schedule,
            network=config.network,
            training=config.training,
            sampler=config.sampler,
            metrics=config.metrics,
        )

    def config(self) -> Config:
        """The config that trials start from."""
        return Config(
            data=self.data_config(),
            schedule=self.schedule,
            network=self.network,
            training=self.training,
            sampler=self.sampler,
            metrics=self.metrics,
            seed=self.seed,
        )

    def data_config(self) -> DataConfig:
        """The data, a path made absolute."""
        return DataConfig(
            name=resolve(self.data), image_size=self.image_size, skip_bad_images=self.skip_bad_images
        )

    def run_directory(self) -> Path:
        """The sweep's folder, absolute and not there yet.

        Raises:
            InputError: a name that the user chose is taken, or the output folder cannot be made.
        """
        parent = Path(self.output_dir).expanduser().absolute()
        existing = next(path for path in (parent, *parent.parents) if path.exists())
        if not existing.is_dir():
            raise InputError(f"--output-dir {self.output_dir}: {existing} is a file; give a folder")
        if not os.access(existing, os.W_OK):
            raise InputError(
                f"--output-dir {self.output_dir}: {existing} must not be written; give another folder"
            )
        if self.name is not None:
            if (parent / self.name).exists():
                raise InputError(
                    f"--name {self.name}: {parent / self.name} exists; choose another name or remove it"
                )
            return parent / self.name
        stem = time.strftime(f"{short_name(self.data_config())}-%Y%m%d-%H%M")
        candidates = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
        return next(path for path in (parent / name for name in candidates) if not path.exists())
