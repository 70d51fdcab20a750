"""Command-line options of tune.py: flags, defaults, checks.

The docstring under a field is the help text of its flag.

Imports neither torch, ray nor mlflow.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_type_hints

from diffusion.config import Config
from diffusion.data.sources import DataSource
from diffusion.errors import InputError
from diffusion.files import path_kind
from diffusion.json_values import check_types
from diffusion.presets import source_preset
from diffusion.registry import OBJECTIVES
from workflows.cli.run_options import (
    ANY_BATCH,
    DATA_FLAGS,
    RunFlags,
    RunOptions,
    check_positive,
    sections,
)
from workflows.cli.search_space import SearchSpace
from workflows.storage.run_record import RunRecord

_NUMBER = r"([0-9]{1,9}(?:\.[0-9]*)?|\.[0-9]+)"
_DURATION = re.compile(rf"(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?")
_UNET_TRIALS = 6  # by default; each takes longer than that of an MLP
# Larger ones take twice the time for little: benchmarks/results/network_sizes.md.
SIZES_FOR_POINTS: dict[str, Any] = {"hidden_size": (64, 128), "num_blocks": (3, 6)}
UNLIMITED = 10_000  # number of trials when only --time-budget limits a sweep
_SAVED_FOR_RESUME = (
    "num_trials",
    "time_budget",
    "workers_per_trial",
    "gpus_per_worker",
    "start_from",
    "final_epochs",
    "final_workers",
    "training_seed_error",
    "early_stopping",
)
EarlyStopping = Literal["proven", "eager", "off"]


@dataclass(frozen=True, kw_only=True)
class TuneFlags(RunFlags):
    """Search noise schedules, embedding sizes and learning rates; export the best model to ONNX."""

    num_trials: int = 12
    """Number of trials, including those stopped early; 6 by default for a U-Net."""
    time_budget: str | None = None
    """Time after which all trials are stopped, such as 30m or 1h30m.
    Their number is then unlimited unless --num-trials is given."""
    workers_per_trial: int = 1
    """Data-parallel workers per trial, one per GPU, otherwise on CPU cores."""
    gpus_per_worker: float = 1.0
    """Fraction of a GPU per trial; 0.25 packs four small trials on each GPU."""
    objective: str | None = None
    """Metric to minimise: val/elbo_window (the default), val/mse or sample/distance.
    val/mse cannot compare models with different noise schedules."""
    start_from: tuple[str, ...] = ()
    """config.json files, such as those of earlier trials, or models:/NAME@ALIAS, whose values are tried
    first."""
    final_epochs: float | None = None
    """Retrain the champion's config from scratch for this many epochs, and export the better model."""
    training_seed_error: float | None = None
    """Standard deviation of the objective over training seeds, 0 or more, in the objective's units.
    By default 0.007 (points) or 0.001 (images) nats per dimension of val/elbo_window, and 0 of other
    objectives."""
    early_stopping: EarlyStopping = "proven"
    """When trials that fall behind are stopped: proven, at evaluations that have been shown to predict the
    final order; eager, also before four trials have finished, which saves more and loses the best trial more
    often; off, never."""
    final_workers: int = 1
    """Data-parallel workers of the training that --final-epochs asks for."""

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
            raise InputError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: give a fraction above 0, at most 1"
            )
        if self.gpus_per_worker < 1.0 and self.workers_per_trial > 1:
            raise InputError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: data-parallel workers need one GPU each; "
                "leave out --workers-per-trial, or give 1"
            )
        if self.final_epochs is not None and not 0.0 < self.final_epochs < 1e6:
            raise InputError(f"--final-epochs {self.final_epochs:g}: give a number above 0, such as 50")
        error = self.training_seed_error
        if error is not None and not 0.0 <= error < float("inf"):
            raise InputError(f"--training-seed-error {error:g}: give 0 or more, such as 0.001")
        if self.final_workers > 1 and self.final_epochs is None:
            raise InputError(f"--final-workers {self.final_workers}: give --final-epochs as well")
        self.budget_seconds()
        if self.early_stopping not in get_args(EarlyStopping):
            choices = ", ".join(get_args(EarlyStopping))
            raise InputError(f"--early-stopping {self.early_stopping}: choose one of {choices}")
        if self.objective is not None:
            OBJECTIVES.check(self.objective, "objective")

    def budget_seconds(self) -> float | None:
        """Return the time budget in seconds, or None if --time-budget is not given.

        Raises:
            InputError: --time-budget is not a duration.
        """
        return None if self.time_budget is None else _seconds(self.time_budget)


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TuneFlags, RunOptions):
    """Every flag of tune.py."""

    search: SearchSpace = field(default_factory=SearchSpace)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_batch("--workers-per-trial", self.workers_per_trial)

    trains_one_model: ClassVar[bool] = False

    def preset_values(self) -> dict[str, Any]:
        """Return the values that the preset of the data sets; `num_trials` is among them."""
        return super().preset_values() | {"num_trials": self.num_trials}

    def with_preset(self, source: DataSource, given: Mapping[str, Any]) -> Self:
        """Return a copy with the preset of the data.

        For a U-Net it includes `num_trials`, and for points the sizes of the MLP to search unless given.

        See `RunOptions.with_preset`.
        """
        values = {name: value for name, value in given.items() if name != "num_trials"}
        options = super().with_preset(source, values)
        if source.image_side is None and options.network.kind == "mlp":
            sizes = {
                name: choices
                for name, choices in SIZES_FOR_POINTS.items()
                if not getattr(options.search, name) and f"network.{name}" not in given
            }
            options = replace(options, search=replace(options.search, **sizes))
        if "num_trials" in given or source_preset(source).network.kind != "unet":
            return options
        return replace(options, num_trials=_UNET_TRIALS)

    @classmethod
    def defaults(cls, record: RunRecord | None, *, limits_time: bool) -> tuple["TuneOptions", dict[str, Any]]:
        """Return the default options, and those of their values that the preset of the data does not replace.

        Args:
            record: record of the sweep to resume, or None.
            limits_time: whether a time budget is given; the number of trials is then unlimited.

        Raises:
            InputError: the saved options are damaged.
        """
        if record is not None:
            names = {"name": record.name, "experiment": record.experiment}
            return cls.for_run(record.config, record.options, **names), {}
        defaults = cls(training=ANY_BATCH)
        if not limits_time:
            return defaults, {}
        return replace(defaults, num_trials=UNLIMITED), {"num_trials": UNLIMITED}

    @classmethod
    def for_run(cls, config: Config, saved: dict[str, Any], **flags: Any) -> "TuneOptions":
        """Return the options of an earlier sweep.

        Args:
            config: config of the sweep.
            saved: other options of the sweep, as returned by `resume_options`.
            **flags: Further options by name, such as `name` and `experiment`.

        Raises:
            InputError: the saved options are damaged.
        """
        data = {name: getattr(config.data, name) for name in DATA_FLAGS}
        try:
            check_types(saved, get_type_hints(cls) | {"search": dict[str, Any]}, "options.")
            check_types(saved["search"], get_type_hints(SearchSpace), "options.search.")
            space: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in saved["search"].items()
            }
            search = SearchSpace(**space)
            restored = {**saved, "search": search, "start_from": tuple(saved["start_from"])}
            return cls(
                data=config.data.name, seed=config.seed, **data, **sections(config), **restored, **flags
            )
        except (TypeError, KeyError) as error:
            raise InputError(
                f"the record of the sweep {flags.get('name', '')} is damaged (options: {error}): restore its "
                "run.json from a copy, or start a new sweep"
            ) from error

    def run_directory(self) -> Path | None:
        """Return the absolute path of the sweep's folder, which exists only if the sweep is resumed.

        None for a sweep in a bucket, which is looked into later.

        Raises:
            InputError: the name given by --name is taken, or the output folder cannot be created.
        """
        if "://" in self.output_dir:
            return None
        parent = self.output_folder()
        if self.may_exist and self.name is not None:
            return parent / self.name
        return parent / self.free_name(lambda name: path_kind(parent / name) is not None)

    def extends(self, saved: Mapping[str, Any]) -> bool:
        """Whether the options allow more trials, or more time, than the finished sweep had."""
        earlier, budget = saved["time_budget"], self.budget_seconds()
        has_more_time = earlier is not None and budget is not None and budget > _seconds(earlier)
        return self.num_trials > saved["num_trials"] or has_more_time

    def resume_options(self) -> dict[str, Any]:
        """Return the options, other than the config, that a resumed sweep needs; fit for JSON."""
        return {name: getattr(self, name) for name in _SAVED_FOR_RESUME} | {"search": asdict(self.search)}

    def config(self) -> Config:
        """Return the config into which each trial puts the values that it tries."""
        config = super().config()
        return config.with_values({"metrics.objective": self.objective}) if self.objective else config


def _seconds(duration: str) -> float:
    """Seconds of a duration such as 1h30m.

    Raises:
        InputError: it is not a duration.
    """
    parts = _DURATION.fullmatch(duration.strip())
    amounts = zip(parts.groups(), (3600, 60, 1), strict=True) if parts else ()
    seconds = sum(float(amount) * unit for amount, unit in amounts if amount)
    if seconds <= 0.0:
        raise InputError(
            f"--time-budget {duration}: give hours, minutes or seconds, such as 2h, 30m or 1h30m"
        )
    return seconds
