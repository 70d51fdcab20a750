"""Metrics of a finished model: more samples than during training, and the test split."""

import dataclasses

import torch

from diffusion.data.dataset import Dataset
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features import Features
from diffusion.metrics import SAMPLE_PREFIX, TEST_PREFIX, TEST_SAMPLE_PREFIX, VAL_PREFIX, with_prefix
from diffusion.training.checkpoints import TrainedModel

_TEST_SEED = 2_000_003  # used by no training


def sample_metrics(
    model: TrainedModel,
    dataset: Dataset,
    features: Features | None,
    held_out: torch.Tensor,
    seed: int,
    *,
    add_training: bool = True,
) -> dict[str, float]:
    """`sample/...` metrics of a model, from twice as many samples as during training.

    Args:
        model: model to evaluate.
        dataset: data that it was trained on.
        features: features by which images are compared; None for points.
        held_out: held-out examples to compare the samples with.
        seed: seed of the samples' noise.
        add_training: whether the samples are compared with training examples as well.
    """
    num_samples = 2 * model.config.metrics.num_samples
    evaluator = Evaluator(model.config, dataset, features)
    return evaluator.sample_metrics(
        model.network, held_out, num_samples=num_samples, seed=seed, add_training=add_training
    )


def metrics_on_test_split(
    model: TrainedModel, dataset: Dataset, features: Features | None
) -> dict[str, float]:
    """`test/...` metrics on the test split, to be computed only once, for the final choice of model.

    The model is evaluated on the device of the data.
    """
    model = model.to(dataset.train.device)
    on_test = dataclasses.replace(dataset, val=dataset.test)
    losses, _ = Evaluator(model.config, on_test).held_out_losses(model.network)
    samples = sample_metrics(model, dataset, features, dataset.test[:], _TEST_SEED, add_training=False)
    return {
        **with_prefix(losses, VAL_PREFIX, TEST_PREFIX),
        **with_prefix(samples, SAMPLE_PREFIX, TEST_SAMPLE_PREFIX),
    }
