"""Upload of a published model to its run in the tracker, where it becomes a model, registered or not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.metrics import DISTANCE, NUM_REFERENCE, NUM_SAMPLES, TEST_SAMPLE_PREFIX
from workflows.publishing.export import SAMPLER
from workflows.publishing.model_card import MODEL_CARD
from workflows.tracking.tracker import PublishedModel, RegistrationError, Tracker


def upload_model(tracker: Tracker, directory: Path, artifact_path: str) -> None:
    """Queue the upload of a published model, and its model card as the description of the run.

    Args:
        tracker: tracker of the run.
        directory: folder of the model, which must exist until the tracker is flushed or closed.
        artifact_path: name of the folder among the run's artifacts.
    """
    tracker.log_files(directory, artifact_path)
    tracker.describe((directory / MODEL_CARD).read_text())


def log_model(
    tracker: Tracker, directory: Path, params: Mapping[str, Any], metrics: Mapping[str, float]
) -> list[str]:
    """Log the published model of a training to the tracker, and return a warning if that failed.

    Args:
        tracker: tracker of the run that the model belongs to.
        directory: folder with sampler.onnx.
        params: parameters of the model by dotted name.
        metrics: metrics of the model, which have been logged.
    """
    try:
        tracker.log_model(PublishedModel(directory / SAMPLER, params, metrics))
    except RegistrationError as error:
        return [f"warning: {tracker.name} did not log the model ({error})"]
    return []


def register_model(
    tracker: Tracker,
    name: str,
    directory: Path,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    data_fingerprint: str,
    features: str,
    *,
    interrupted: bool,
) -> str:
    """Register a published model, and return a line that reports the outcome.

    Args:
        tracker: tracker of the run that the model belongs to.
        name: name of the registered model.
        directory: folder with sampler.onnx.
        params: parameters of the model by dotted name.
        metrics: metrics of the model, `test/...` among them.
        data_fingerprint: fingerprint of the data that it was tested on.
        features: name of the features by which images are compared; "none" for points.
        interrupted: whether the sweep was interrupted; the model does not become the champion then.
    """
    version_tags = {
        "data_fingerprint": data_fingerprint,
        "test_distance": metrics[TEST_SAMPLE_PREFIX + DISTANCE],
        "test_num_samples": int(metrics[TEST_SAMPLE_PREFIX + NUM_SAMPLES]),
        "test_num_reference": int(metrics[TEST_SAMPLE_PREFIX + NUM_REFERENCE]),
        "test_features": features,
        "test_metric": "kernel",  # versions whose distance is another metric cannot be compared with it
    }
    model = PublishedModel(directory / SAMPLER, params, metrics)
    try:
        registered = tracker.register(name, model, version_tags, may_promote=not interrupted)
    except RegistrationError as error:
        return f"warning: {tracker.name} did not register the model ({error})"
    if registered is None:
        return f"the model is not registered: {tracker.name} has no model registry"
    line = f"registered in {tracker.name} as {name} version {registered.version}"
    if registered.is_champion:
        return line
    reason = (
        "this sweep was interrupted"
        if interrupted
        else "its test distance is smaller or was measured differently"
    )
    return f"{line}; the alias champion stays with the earlier version: {reason}"
