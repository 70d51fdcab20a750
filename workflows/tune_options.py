"""The command line of a sweep: flags, defaults, checks.

Imports neither torch, ray nor mlflow.
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.presets import preset
from diffusion.run_config import ObjectiveName
from workflows.options import DATA_FLAGS, RunFlags, RunOptions, check_positive, sections
from workflows.search_space import SearchSpace
from workflows.storage_place import default_output_dir

_DURATION = re.compile(r"(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s)?")
UNLIMITED = 10_000  # trials, where only the time is limited
_KEPT = (
    "num_trials",
    "time_budget",
    "workers_per_trial",
    "gpus_per_worker",
    "start_from",
    "final_epochs",
    "final_workers",
)


@dataclass(frozen=True, kw_only=True)
class TuneFlags(RunFlags):
    """Sweep diffusion models over steps, noise and embeddings; keep, judge and export the best."""

    output_dir: str = field(default_factory=lambda: default_output_dir(buckets=False))
    """Folder that holds the run's folder; on a cluster by default one that outlives the workers."""
    num_trials: int = 12
    """Trials in the sweep, pruned ones included; 6 by default where the network is a U-Net."""
    time_budget: str | None = None
    """Stop the trials after so long, such as 30m or 1h30m; as many run as that allows, or --num-trials."""
    workers_per_trial: int = 1
    """Processes that share each batch of a trial: one a GPU, or over the processors."""
    gpus_per_worker: float = 1.0
    """Share of a GPU that a trial gets; 0.25 packs four small trials on each."""
    objective: ObjectiveName | None = None
    """What trials are judged by, lower is better; val/elbo_window by default. val/mse misleads."""
    start_from: tuple[str, ...] = ()
    """config.json files, such as a trial's, that are tried first."""
    final_epochs: float | None = None
    """Train the champion's config anew for so many passes over the data before it is exported."""
    final_workers: int = 1
    """Processes that share each batch of that training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            {
                "--num-trials": self.num_trials,
                "--workers-per-trial": self.workers_per_trial,
                "--final-workers": self.final_workers,
            }
        )
        if not 0.0 < self.gpus_per_worker <= 1.0:
            raise InputError(f"--gpus-per-worker {self.gpus_per_worker:g}: give a share above 0, at most 1")
        if self.gpus_per_worker < 1.0 and self.workers_per_trial > 1:
            raise InputError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: workers that share batches need a GPU each; "
                "leave out --workers-per-trial, or give 1"
            )
        if self.final_epochs is not None and not 0.0 < self.final_epochs < 1e6:
            raise InputError(f"--final-epochs {self.final_epochs:g}: give a number above 0, such as 50")
        if self.final_workers > 1 and self.final_epochs is None:
            raise InputError(f"--final-workers {self.final_workers}: give --final-epochs as well")
        self.budget_seconds()
        if "://" in self.output_dir:
            raise InputError(
                f"--output-dir {self.output_dir}: a sweep can be written to local folders and mounts only"
            )

    def budget_seconds(self) -> float | None:
        """The time budget in seconds, or None where there is none.

        Raises:
            InputError: it is no length of time.
        """
        if self.time_budget is None:
            return None
        parts = _DURATION.fullmatch(self.time_budget.strip())
        seconds = (
            sum(
                float(amount) * unit
                for amount, unit in zip(parts.groups(), (3600, 60, 1), strict=True)
                if amount
            )
            if parts
            else 0.0
        )
        if seconds <= 0.0:
            raise InputError(
                f"--time-budget {self.time_budget}: give hours, minutes or seconds, such as 2h, 30m or 1h30m"
            )
        return seconds


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TuneFlags, RunOptions):
    """Every flag of a sweep."""

    search: SearchSpace = field(default_factory=SearchSpace)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_batch("--workers-per-trial", self.workers_per_trial)

    @classmethod
    def for_data(cls, data: str, image_size: int | None = None) -> "TuneOptions":
        """The defaults for a data set.

        Raises:
            InputError: no data set has that name or path.
        """
        config = preset(data, image_size)
        num_trials = 6 if config.network.kind == "unet" else cls.num_trials
        return cls(data=data, num_trials=num_trials, **sections(config))

    @classmethod
    def for_run(cls, config: Config, command: dict[str, Any], **flags: Any) -> "TuneOptions":
        """The defaults that an earlier sweep gives: its config, and what `kept` returned."""
        data = {name: getattr(config.data, name) for name in DATA_FLAGS}
        space: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in command["search"].items()
        }
        search = SearchSpace(**space)
        own = {**command, "search": search, "start_from": tuple(command["start_from"])}
        return cls(data=config.data.name, seed=config.seed, **data, **sections(config), **own, **flags)

    def run_directory(self) -> Path:
        """The sweep's folder, absolute; not there yet, unless it is gone on with.

        Raises:
            InputError: a name that the user chose is taken, or the output folder cannot be made.
        """
        parent = self.output_folder()
        if self.resume and self.name is not None:
            return parent / self.name
        return parent / self.free_name(lambda name: (parent / name).exists())

    def kept(self) -> dict[str, Any]:
        """What a sweep that goes on needs to know besides its config, for JSON."""
        return {name: getattr(self, name) for name in _KEPT} | {"search": asdict(self.search)}

    def config(self) -> Config:
        """The config that a trial's own values are put into."""
        config = super().config()
        return config.with_values({"metrics.objective": self.objective}) if self.objective else config
