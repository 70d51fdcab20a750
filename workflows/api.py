"""Sweeps and trainings from Python: what tune.py and train.py do, also for data that are already in memory.

    from workflows.api import run_sweep

    result = run_sweep(table, label_column="kind", num_trials=8)
    result.trials                      # a DataFrame, one row a trial
    points = result.sampler.sample(1000, labels="a", guidance_scale=2.0)

Files, tracking and defaults are those of the command line: a run has its folder in `output_dir`, and its
metrics are in MLflow. `SweepResult.load("runs/NAME")` reads a result again.

Ctrl-C (in a notebook: interrupt) stops a run cleanly, and what there is by then is returned: a sweep exports
the best model so far, a training writes a checkpoint. The result's `interrupted` is then True, and the same
call with `name=...` and `resume=True` continues the run. A second Ctrl-C raises KeyboardInterrupt at once. A
run in another thread than the main one is not stopped, since Python delivers no signals there.

Ray is started for the call and ended after it, unless it is already running: then it is used, and left
running. Signal handlers, environment variables, warning filters and log levels are afterwards as they were
before. A terminal shows live progress, otherwise lines are printed; `progress=False` prints nothing.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, Unpack

from diffusion.config import (
    Config,
    MetricsConfig,
    NetworkConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from diffusion.errors import InputError
from workflows.cli.keyword_settings import Data, describe_settings, in_python, train_request, tune_request
from workflows.cli.request import RunRequest
from workflows.cli.run_options import TrainOptions
from workflows.cli.search_space import SearchSpace
from workflows.cli.tune_options import EarlyStopping, TuneOptions
from workflows.environment import temporary_defaults
from workflows.results import RunFailed, SweepResult, TrainingResult
from workflows.status import Outcome

__all__ = ["RunFailed", "SweepResult", "TrainingResult", "run_sweep", "run_training"]


class _Settings(TypedDict, total=False):
    labels: Sequence[int | str] | None
    image_size: int | None
    horizontal_flips: bool
    conditional: bool
    label_column: str | None
    split_column: str | None
    group_column: str | None
    skip_bad_images: bool
    memory_limit_gb: float
    name: str | None
    experiment: str | None
    output_dir: str | os.PathLike[str]
    storage_retry_minutes: float
    tracking_uri: str | None
    seed: int
    resume: bool
    start_or_resume: bool
    progress: bool
    verbose: bool
    schedule: Mapping[str, object] | ScheduleConfig
    network: Mapping[str, object] | NetworkConfig
    training: Mapping[str, object] | TrainingConfig
    sampler: Mapping[str, object] | SamplerConfig
    metrics: Mapping[str, object] | MetricsConfig


class SweepSettings(_Settings, total=False):
    """Settings of `run_sweep`, which describes them."""

    num_trials: int
    time_budget: str | float | None
    workers_per_trial: int
    gpus_per_worker: float
    objective: str | None
    start_from: Sequence[str | os.PathLike[str]]
    final_epochs: float | None
    final_workers: int
    training_seed_error: float | None
    early_stopping: EarlyStopping
    search: Mapping[str, object] | SearchSpace


class TrainingSettings(_Settings, total=False):
    """Settings of `run_training`, which describes them."""

    config: Config | None
    num_workers: int | str
    init_from: str | os.PathLike[str] | None
    keep_checkpoints: int
    super_resolution: str | None


def run_sweep(data: Data, **settings: Unpack[SweepSettings]) -> SweepResult:
    """Search noise schedules, embedding sizes and learning rates; export the best model.

        result = run_sweep("digits", num_trials=6, training={"num_updates": 2000})
        result = run_sweep(points, search={"beta_end": (0.02, 0.2), "learning_rate": 1e-3})

    Args:
        data: name of a data set (digits, heart, mnist, fashion-mnist, cifar10); path of a folder of images or
            of a .csv, .parquet or .npy table; or examples in memory: a DataFrame, an array, a tensor, a
            PyTorch Dataset or a list, see `help(diffusion.dataset_from_memory)`. Examples in memory are sent
            to the workers by Ray and are stored nowhere: pass them again to resume.
        **settings: The flags of tune.py, with underscores, and these:
            labels: class of each example in memory, numbers or names, unless the data contain them. Models
                are conditional only with conditional=True or a label_column.
            time_budget may also be a number of seconds.

    Returns:
        The trials, and the champion with its metrics and sampler.

    Raises:
        InputError: a setting or the data cannot be used; one line that says what is allowed.
        RunFailed: no trial produced a model.
    """
    keywords: dict[str, Any] = dict(settings)
    with _errors_name_settings():
        request = tune_request(data, keywords.pop("labels", None), keywords)
        if request.is_finished:
            return SweepResult.load(_finished(request))
        request.options.run_directory()  # fail early if the name is taken
        with _session(request.options.verbose):
            source, options = request.open_data()
            from workflows.sweep.run_sweep import run_sweep as run  # takes seconds to import

            outcome = run(options, source, request.record)
        return SweepResult.load(_location(outcome))


def run_training(data: Data, **settings: Unpack[TrainingSettings]) -> TrainingResult:
    """Train one model, with checkpoints, and export it.

        result = run_training("heart", name="hearts", training={"num_updates": 5000})
        result = run_training(images, config=sweep.champion.config, training={"num_epochs": 100})

    Args:
        data: as for `run_sweep`.
        **settings: The flags of train.py, with underscores, and these:
            labels: class of each example in memory, numbers or names, unless the data contain them. Models
                are conditional only with conditional=True or a label_column.
            config: a whole `diffusion.Config`, such as a sweep's `champion.config`, in place of the defaults
                for the data. Its `data` are not used; other settings replace its values.

    Returns:
        The model with its metrics and sampler, and the history of the training.

    Raises:
        InputError: a setting or the data cannot be used; one line that says what is allowed.
        RunFailed: the training failed.
    """
    keywords: dict[str, Any] = dict(settings)
    with _errors_name_settings():
        request = train_request(data, keywords.pop("labels", None), keywords.pop("config", None), keywords)
        if request.is_finished:
            return TrainingResult.load(_finished(request))
        with _session(request.options.verbose):
            source, options = request.open_data()
            from workflows.training.run_training import run_training as run  # takes seconds to import

            outcome = run(options, source, request.record)
        return TrainingResult.load(_location(outcome))


def _finished(request: RunRequest[Any]) -> str:
    """Folder or bucket of a finished run that is resumed, which its first line says."""
    first_line, *_ = request.finished_lines()
    if request.options.progress:
        print(first_line)
    return request.finished_location


def _location(outcome: Outcome) -> str:
    """Folder or bucket of a run that has a model or was stopped.

    Raises:
        RunFailed: it has no model for another reason.
    """
    assert outcome.location is not None, "only a dry run has none"
    if not outcome.has_model and outcome.status != "stopped":
        raise RunFailed(outcome.reason, outcome.location)
    return outcome.location


@contextmanager
def _errors_name_settings() -> Iterator[None]:
    """Name settings rather than flags in errors about the user's input."""
    try:
        yield
    except InputError as error:
        raise InputError(in_python(str(error))) from None


@contextmanager
def _session(verbose: bool) -> Iterator[None]:
    """Leave the process as it was found."""
    with temporary_defaults(verbose):
        from workflows.ray_runtime.session import restored_signal_handlers, stop_ray  # imports Ray

        with restored_signal_handlers():
            try:
                yield
            finally:
                stop_ray()


_SETTINGS = """
    Settings, with their defaults. Those of network, training, sampler and metrics depend on the data: see
    `diffusion.preset`, and the config of a result.

"""
for _function, _options in ((run_sweep, TuneOptions), (run_training, TrainOptions)):
    if _function.__doc__:  # not with python -OO
        _function.__doc__ += _SETTINGS + describe_settings(_options) + "\n"
