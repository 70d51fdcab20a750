"""What a run is about, in lines; --dry-run adds the schedule and an estimate of the time."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from diffusion.config import Config
from diffusion.data.dataset import Dataset
from diffusion.devices import default_device
from diffusion.evaluation.evaluator import Evaluator
from diffusion.metrics import ALPHAS_CUMPROD_T, PRIOR_KL
from diffusion.networks.build import build_network
from diffusion.process.schedule_checks import schedule_metrics, schedule_warnings
from diffusion.process.schedules import NoiseSchedule
from diffusion.training.distributed import DistributedContext
from diffusion.training.train_step import TrainStep
from workflows.cli.search_space import format_values
from workflows.cli.tune_options import UNLIMITED
from workflows.data.load import LoadedData
from workflows.training.worker_group import WorkerResources

SECONDS_OF_STEPS = 3.0
_SECONDS_TO_START_WORKERS = 10.0
_CHART_WIDTH, _CHART_HEIGHT = 60, 8


def describe_training(config: Config, data: LoadedData, resources: WorkerResources) -> None:
    """Print what train.py would run, on what, and for how long; measures a few steps on this machine."""
    seconds = _SECONDS_TO_START_WORKERS + _seconds_of_training(config, data, resources)
    _print(
        [
            *_description(config, data.dataset, resources),
            f"time      about {_duration(seconds)}, {_basis(resources)}",
        ]
    )


def describe_sweep(
    config: Config,
    data: LoadedData,
    resources: WorkerResources,
    searched: Mapping[str, tuple[Any, ...]],
    num_trials: int,
    max_concurrent: int,
    seconds: float | None = None,
) -> None:
    """Print what tune.py would run, on what, and for how long; measures a few steps on this machine.

    Args:
        config: config of every trial, apart from the values that are searched.
        data: data of the sweep.
        resources: workers of each trial.
        searched: choices, or both ends of a range, by dotted name.
        num_trials: number of trials; `UNLIMITED` if only the time is limited.
        max_concurrent: number of trials that run at a time.
        seconds: time budget, or None.
    """
    seconds_per_trial = _seconds_of_training(config, data, resources)
    if resources.num_workers > 1:
        seconds_per_trial += _SECONDS_TO_START_WORKERS
    trials = f"{num_trials} trials" if num_trials < UNLIMITED else "as many trials as the time allows"
    rounds = math.ceil(num_trials / max_concurrent)
    max_seconds = min(seconds_per_trial * rounds, math.inf if seconds is None else seconds)
    space = [f"search    {name}: {format_values(values)}" for name, values in searched.items()]
    _print(
        [
            *_description(config, data.dataset, resources),
            f"sweep     {trials}, {max_concurrent} at a time",
            *space,
            f"time      at most about {_duration(max_seconds)}, less because trials are stopped early; a "
            f"full trial takes about {_duration(seconds_per_trial)}, {_basis(resources)}",
        ]
    )


def schedule_chart(schedule: NoiseSchedule) -> list[str]:
    """Chart of alphas_cumprod, the fraction of signal left, over the timesteps, as lines of text."""
    num_train_timesteps = schedule.num_train_timesteps
    width = min(_CHART_WIDTH, num_train_timesteps)
    timesteps = np.linspace(0, num_train_timesteps - 1, width).round().astype(int)
    eighths = np.round(schedule.alphas_cumprod[timesteps] * _CHART_HEIGHT * 8).astype(int)
    lines = []
    for row in range(_CHART_HEIGHT - 1, -1, -1):
        label = {_CHART_HEIGHT - 1: "1", 0: "0"}.get(row, "")
        blocks = "".join(" ▁▂▃▄▅▆▇█"[level] for level in (eighths - 8 * row).clip(0, 8))
        lines.append(f"{label:>9} |{blocks}")
    lines.append(f"{'':>9} +{'-' * width}")
    last = num_train_timesteps - 1
    lines.append(f"{'':>11}t = 0{f't = {last}':>{max(1, width - 5)}}   alphas_cumprod")
    quarters = {part * num_train_timesteps // 4 for part in range(4)}
    values = "   ".join(f"{schedule.log_snr[t]:.2f} at {t}" for t in sorted(quarters | {last}))
    return [*lines, f"log-SNR   {values}"]


def run_lines(config: Config, dataset: Dataset, resources: WorkerResources) -> list[str]:
    """Lines with the data, the network, the budget and the workers of a training, or of each trial."""
    training, spec = config.training, dataset.spec
    network = build_network(config, spec.shape, spec.num_classes)
    num_parameters = sum(weight.numel() for weight in network.parameters())
    cpus = "1 CPU thread" if resources.threads == 1 else f"{resources.threads} CPU threads"
    num_workers = str(resources.num_workers)
    if resources.max_workers:
        num_workers += f" to {resources.max_workers}"
    low, receives = config.data.low_resolution, ""
    if low is not None:
        receives = f", which receives images of {low}x{low} pixels: the second of a cascade"
    epochs = training.num_updates * training.batch_size / len(dataset.train)
    return [
        f"data      {spec.name}: {len(dataset.train)} examples of shape {list(spec.shape)} for training, "
        f"{len(dataset.val)} for validation, {len(dataset.test)} for testing",
        f"network   {config.network.kind}, {num_parameters:,} parameters{receives}",
        f"training  {training.num_updates} updates of {training.batch_size} examples ({epochs:.3g} epochs), "
        f"{training.precision}, {training.num_evaluations} evaluations",
        f"workers   {num_workers}, each with {'a GPU' if resources.uses_gpus else cpus}",
    ]


def _description(config: Config, dataset: Dataset, resources: WorkerResources) -> list[str]:
    schedule, spec = config.schedule.build(), dataset.spec
    metrics = schedule_metrics(schedule, math.prod(spec.shape))
    warnings = schedule_warnings(
        schedule,
        spec.log_snr_window,
        math.prod(spec.shape),
        prediction_type=config.prediction_type,
        clipped=config.sampler.clip,
    )
    return [
        *run_lines(config, dataset, resources),
        f"schedule  {config.schedule.kind}, {schedule.num_train_timesteps} timesteps; alphas_cumprod_T "
        f"{metrics[ALPHAS_CUMPROD_T]:.2g}, mismatch with the prior "
        f"{metrics[PRIOR_KL]:.2g} nats/dim",
        *schedule_chart(schedule),
        *(f"warning   {line}" for line in warnings),
    ]


def _seconds_of_training(config: Config, data: LoadedData, resources: WorkerResources) -> float:
    """Estimated time of a training, from a few steps with one worker's part of a batch and one evaluation."""
    torch.set_num_threads(resources.threads)
    training = config.training
    device = default_device(use_cuda=resources.uses_gpus, num_workers=resources.num_workers)
    batch_size = math.ceil(training.batch_size / resources.num_workers)
    # A single worker with the largest part of the batch takes the same steps as each of several workers.
    config = replace(config, training=replace(training, batch_size=batch_size))
    dataset = data.dataset
    num_classes = dataset.spec.num_classes
    train_step = TrainStep(config, dataset.spec.shape, DistributedContext(0, 1, device), num_classes)
    x_0 = dataset.train[:batch_size].to(device)
    timesteps = torch.randint(config.schedule.num_train_timesteps, (len(x_0),), device=device)
    noise = torch.randn_like(x_0)
    low_resolution = Evaluator(config, dataset).low_resolution(len(x_0))
    inputs = [torch.zeros_like(timesteps)] if num_classes else []
    inputs += [each.to(device) for each in low_resolution]
    float(train_step.run(0, x_0, timesteps, noise, inputs))  # warm-up: the first step is slow
    started, steps = time.monotonic(), 0
    while time.monotonic() - started < SECONDS_OF_STEPS:
        steps += 1
        float(train_step.run(steps, x_0, timesteps, noise, inputs))
    seconds_per_step = (time.monotonic() - started) / steps
    data = data.to(device)
    evaluator = Evaluator(config, data.dataset, data.features)
    network = train_step.averaged_network
    started = time.monotonic()
    evaluator.held_out_losses(network)
    seconds_per_evaluation = time.monotonic() - started
    num_samples = min(32, config.metrics.num_samples)
    started = time.monotonic()
    evaluator.sample_metrics(network, data.dataset.val[:], num_samples=num_samples, seed=0)
    sampling_seconds = (time.monotonic() - started) / num_samples * config.metrics.num_samples
    return (
        training.num_updates * seconds_per_step
        + training.num_evaluations * seconds_per_evaluation
        + sampling_seconds
    )


def _basis(resources: WorkerResources) -> str:
    """What an estimated time is based on."""
    excluded = ", without the communication between workers" if resources.num_workers > 1 else ""
    return f"estimated from a few steps measured on this machine{excluded}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print(lines: list[str]) -> None:
    print("\n".join(lines))
    print("Nothing was run or written. To run it, leave out --dry-run.")
