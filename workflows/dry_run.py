"""What a command would do, without doing it: the data, the network, the schedule, and the time it takes."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.evaluation import Evaluator
from diffusion.learner import Learner
from diffusion.preflight import schedule_metrics, schedule_warnings
from diffusion.ranks import Ranks
from diffusion.schedules import NoiseSchedule
from workflows.group import Layout
from workflows.search_space import shown
from workflows.tune_options import UNLIMITED

_SECONDS_OF_STEPS = 3.0
_SECONDS_TO_START_WORKERS = 10.0
_CHART_WIDTH, _CHART_HEIGHT = 60, 8


def describe_training(config: Config, dataset: Dataset, layout: Layout) -> None:
    """Print what train.py would run, on what, and for how long; a few steps are measured here."""
    seconds = _SECONDS_TO_START_WORKERS + _seconds_of_training(config, dataset, layout)
    _print(
        [*_about(config, dataset, layout), f"time      about {_duration(seconds)}, {_how_measured(layout)}"]
    )


def describe_sweep(
    config: Config,
    dataset: Dataset,
    layout: Layout,
    searched: Mapping[str, tuple[Any, ...]],
    num_trials: int,
    at_once: int,
    seconds: float | None = None,
) -> None:
    """Print what tune.py would run: trials, so many `at_once`, for at most so many `seconds`."""
    one = _seconds_of_training(config, dataset, layout)
    if layout.num_workers > 1:
        one += _SECONDS_TO_START_WORKERS
    trials = f"{num_trials} trials" if num_trials < UNLIMITED else "as many trials as the time allows"
    longest = min(one * math.ceil(num_trials / at_once), math.inf if seconds is None else seconds)
    space = [f"search    {name}: {shown(values)}" for name, values in searched.items()]
    _print(
        [
            *_about(config, dataset, layout),
            f"sweep     {trials}, {at_once} at a time",
            *space,
            f"time      at most about {_duration(longest)}, less as trials are stopped early; a whole trial "
            f"takes about {_duration(one)}, {_how_measured(layout)}",
        ]
    )


def schedule_chart(schedule: NoiseSchedule) -> list[str]:
    """alphas_cumprod, the share of signal that is left, over the timesteps, as lines of text."""
    steps = schedule.num_train_timesteps
    width = min(_CHART_WIDTH, steps)
    at = np.linspace(0, steps - 1, width).round().astype(int)
    eighths = np.round(schedule.alphas_cumprod[at] * _CHART_HEIGHT * 8).astype(int)
    lines = []
    for row in range(_CHART_HEIGHT - 1, -1, -1):
        label = {_CHART_HEIGHT - 1: "1", 0: "0"}.get(row, "")
        blocks = "".join(" ▁▂▃▄▅▆▇█"[level] for level in (eighths - 8 * row).clip(0, 8))
        lines.append(f"{label:>9} |{blocks}")
    lines.append(f"{'':>9} +{'-' * width}")
    lines.append(f"{'':>11}t = 0{f't = {steps - 1}':>{max(1, width - 5)}}   alphas_cumprod")
    marks = sorted({0, steps // 4, steps // 2, 3 * steps // 4, steps - 1})
    values = "   ".join(f"{schedule.log_snr[t]:.2f} at {t}" for t in marks)
    return [*lines, f"log-SNR   {values}"]


def _about(config: Config, dataset: Dataset, layout: Layout) -> list[str]:
    training, schedule, spec = config.training, config.schedule.build(), dataset.spec
    network = Learner(config, spec.shape, Ranks(0, 1, torch.device("cpu")), spec.num_classes).network
    count = sum(weight.numel() for weight in network.parameters())
    where = "GPU" if layout.uses_gpus else f"{layout.threads} threads"
    to_most = f" to {layout.most_workers}" if layout.most_workers else ""
    epochs = training.num_updates * training.batch_size / len(dataset.train)
    figures = schedule_metrics(schedule, math.prod(spec.shape))
    warnings = schedule_warnings(
        schedule,
        spec.log_snr_window,
        math.prod(spec.shape),
        prediction_type=config.prediction_type,
        clipped=config.sampler.clip,
    )
    return [
        f"data      {spec.name}: {len(dataset.train)} examples of shape {list(spec.shape)} for training, "
        f"{len(dataset.val)} for validation, {len(dataset.test)} for the test",
        f"network   {config.network.kind}, {count:,} parameters",
        f"training  {training.num_updates} updates of {training.batch_size} examples ({epochs:.3g} epochs), "
        f"{training.precision}, {training.num_evaluations} evaluations",
        f"workers   {layout.num_workers}{to_most}, each on {where}",
        f"schedule  {config.schedule.kind}, {schedule.num_train_timesteps} steps; alphas_cumprod_T "
        f"{figures['schedule/alphas_cumprod_T']:.2g}, mismatch with the prior "
        f"{figures['schedule/prior_kl']:.2g} nats/dim",
        *schedule_chart(schedule),
        *(f"warning   {line}" for line in warnings),
    ]


def _seconds_of_training(config: Config, dataset: Dataset, layout: Layout) -> float:
    """From a few steps of one worker's share of a batch, and one evaluation, on this machine."""
    torch.set_num_threads(layout.threads)
    training = config.training
    device = torch.device("cuda" if layout.uses_gpus and torch.cuda.is_available() else "cpu")
    share = math.ceil(training.batch_size / layout.num_workers)
    # The learner is told of one worker and its share, so that it takes the steps that a worker takes.
    config = replace(config, training=replace(training, batch_size=share))
    num_classes = dataset.spec.num_classes
    learner = Learner(config, dataset.spec.shape, Ranks(0, 1, device), num_classes)
    x_0 = dataset.train[:share].to(device)
    timesteps = torch.randint(config.schedule.num_train_timesteps, (len(x_0),), device=device)
    noise = torch.randn_like(x_0)
    labels = torch.zeros_like(timesteps) if num_classes else None
    float(learner.step(0, x_0, timesteps, noise, labels))  # the first one prepares much
    started, steps = time.monotonic(), 0
    while time.monotonic() - started < _SECONDS_OF_STEPS:
        steps += 1
        float(learner.step(steps, x_0, timesteps, noise, labels))
    step = (time.monotonic() - started) / steps
    evaluator = Evaluator(config, dataset.to(device))
    network = learner.averaged_network
    started = time.monotonic()
    evaluator.held_out_losses(network)
    evaluation = time.monotonic() - started
    some = min(32, config.metrics.num_samples)
    started = time.monotonic()
    evaluator.samples(network, dataset.val[:].to(device), num_samples=some, seed=0)
    sampling = (time.monotonic() - started) / some * config.metrics.num_samples
    return training.num_updates * step + training.num_evaluations * evaluation + sampling


def _how_measured(layout: Layout) -> str:
    beside = "; the traffic between the workers comes on top" if layout.num_workers > 1 else ""
    return f"from a few steps measured on this machine{beside}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print(lines: list[str]) -> None:
    print("\n".join(lines))
    print("Nothing was run or written: leave out --dry-run to do it.")
