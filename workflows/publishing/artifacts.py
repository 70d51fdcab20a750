"""All files of a trained model that is published, of a training or of a sweep's champion."""

from collections.abc import Callable
from pathlib import Path

from diffusion.data.dataset import Dataset
from diffusion.evaluation.features import Features
from diffusion.plots import samples_per_picture
from diffusion.training.checkpoints import TrainedModel
from export.parity import num_compared_samples
from export.torch_sampler import TorchSampler
from workflows.publishing.export import write_export
from workflows.publishing.model_card import write_model_card
from workflows.publishing.pictures import write_pictures


def write_model_artifacts(
    model: TrainedModel,
    dataset: Dataset,
    features: Features | None,
    directory: Path,
    notify: Callable[[str], None],
) -> None:
    """Export a model to ONNX, check the file against PyTorch, draw its samples and write its model card.

    Args:
        model: model to publish; its provenance holds the `metrics` that the model card lists.
        dataset: data that it was trained on.
        features: features by which images are compared; None for points.
        directory: folder for the files; created if missing.
        notify: receives a line before each step that takes seconds.

    Raises:
        ParityError: the ONNX file does not compute what PyTorch computes; nothing is written.
    """
    notify("exporting it to ONNX and comparing its trajectories with PyTorch's")
    num_shown = samples_per_picture(model.data.kind, model.data.num_classes)
    sampler = TorchSampler.of(model, dataset)
    drawn = sampler.draw(max(num_compared_samples(sampler.spec), num_shown), num_shown)
    samples = write_export(model, drawn, dataset, features, directory)
    notify("drawing samples and the animation")
    write_pictures(model, drawn, samples, dataset, directory)
    write_model_card(model, directory)
