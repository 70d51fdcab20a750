"""Lines that train.py and tune.py both print at the end: the model's quality, its files, what to run next."""

import math
from collections.abc import Mapping

from diffusion.config import Config
from diffusion.data.dataset import DataSpec
from diffusion.metrics import AUC, DISTANCE, FLOOR, NUM_SAMPLES, TEST_ELBO_WINDOW, TEST_SAMPLE_PREFIX
from diffusion.process.schedule_checks import prior_mismatch
from workflows.publishing.model_card import copying_summary
from workflows.tracking.tracker import Tracker


def quality_lines(metrics: Mapping[str, float]) -> list[str]:
    """What the `test/...` metrics of a model say."""
    # Models of earlier versions have no AUC.
    auc = metrics.get(TEST_SAMPLE_PREFIX + AUC)
    told_apart = (
        []
        if auc is None
        else [f"  a classifier tells samples from the data with AUC {auc:.3f} (0.5: not at all)"]
    )
    distance = TEST_SAMPLE_PREFIX + DISTANCE
    return [
        f"  test split: ELBO window {metrics[TEST_ELBO_WINDOW]:.4f} nats/dim, sample distance "
        f"{metrics[distance]:.4g} with {metrics[TEST_SAMPLE_PREFIX + NUM_SAMPLES]:.0f} samples "
        f"({metrics[distance + FLOOR]:.4g} with as many training examples instead)",
        *told_apart,
        f"  {copying_summary(metrics)}",
    ]


def schedule_lines(config: Config, data: DataSpec) -> list[str]:
    """A warning if the schedule of a config leaves so much signal in x_T that samples start wrong."""
    mismatch = prior_mismatch(config.schedule.build(), data.log_snr_window, math.prod(data.shape))
    return [] if mismatch is None else [f"  WARNING: {mismatch}"]


def weights_line(best_update: int, num_updates: int, objective: float) -> str:
    """Which weights of a training its model has.

    Args:
        best_update: number of updates at the best evaluation.
        num_updates: number of updates at the last evaluation.
        objective: objective of the model.
    """
    if best_update == num_updates:
        return f"model: the weights of the last update, {num_updates}, objective {objective:.4f}"
    return (
        f"model: the weights of update {best_update} of {num_updates}, objective {objective:.4f}: the "
        "objective is worse after it, by more than its error"
    )


def file_lines(folder: str) -> list[str]:
    """What the most important files of a published model are.

    Args:
        folder: folder of the model, as it is shown to the user.
    """
    return [
        f"{folder}/samples.png    drawn by PyTorch (samples_onnx.png: the same by ONNX Runtime)",
        f"{folder}/animation.gif    noise becoming samples",
        f"{folder}/sampler.onnx    the file to ship, checked against PyTorch (parity.json)",
    ]


def next_lines(
    folder: str, tracker: Tracker, *, is_local: bool, low_resolution: int | None = None
) -> list[str]:
    """Commands to run next: to see the runs in the tracker, and to sample from the model.

    Args:
        folder: folder of the model, as it is shown to the user.
        tracker: tracker of the run.
        is_local: whether the folder is on this machine, so that its sampler.onnx can be opened.
        low_resolution: side of the images that a super-resolution model receives; None for other models.
    """
    lines = [f"next: {tracker.location_hint()}"]
    if is_local:
        file = f"{folder}/sampler.onnx"
        files = file if low_resolution is None else f"MODEL_OF_{low_resolution}_PIXELS.onnx --then {file}"
        lines.append(f"      python -m export.sampler {files} --num-samples 64 --output samples.png")
    return lines
