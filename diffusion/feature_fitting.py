"""Which features a data set's images are compared by, and their fit to its training split."""

import math
from dataclasses import replace

import torch
from torch import nn

from diffusion.data import Dataset
from diffusion.errors import InputError
from diffusion.feature_networks import Inception, classifier, random_network
from diffusion.features import Features, prepared
from diffusion.run_config import FeatureNetwork
from diffusion.sources import CACHE

# That a classifier is trained on, and features are standardised over; in memory as float64.
_MOST_IMAGES, _MOST_VALUES = 20_000, 2**26
_RECIPE = 1  # of the classifier; another one must not read this one's files
_FEWEST_OF_A_CLASS = 20


def with_features(dataset: Dataset, wanted: FeatureNetwork) -> Dataset:
    """The data with the features that its images are compared by, see `fit_features`."""
    return replace(dataset, features=fit_features(dataset, wanted))


def fit_features(dataset: Dataset, wanted: FeatureNetwork) -> Features | None:
    """The features that a data set's images are compared by; None of points.

    Args:
        dataset: on the CPU.
        wanted: "auto" is a classifier where the data have classes of 20 training images or more, else a
            random network.

    Raises:
        InputError: a classifier is asked for and there are no such classes, or Inception's weights are
            not there.
    """
    spec, value_range = dataset.spec, dataset.spec.range
    if value_range is None:
        return None
    name: FeatureNetwork = wanted
    if wanted in ("auto", "classifier"):
        name = "classifier" if _can_be_classified(dataset) else "random"
        if name != wanted == "classifier":
            raise InputError(
                f"--metrics.features classifier: {spec.name} needs two classes or more, each of "
                f"{_FEWEST_OF_A_CLASS} training images or more; give random, or auto"
            )
    accuracy = None
    network: nn.Module
    count = max(1, min(_MOST_IMAGES, _MOST_VALUES // math.prod(spec.shape)))
    images = torch.from_numpy(dataset.raw(dataset.train[:count]))
    if name == "classifier":
        held_out, labels = torch.from_numpy(dataset.raw(dataset.val[:count])), dataset.train.labels
        assert labels is not None and dataset.val.labels is not None
        network, accuracy = classifier(
            prepared(images, value_range, name),
            labels[:count],
            (prepared(held_out, value_range, name), dataset.val.labels[:count]),
            int(labels.max()) + 1,
            CACHE.expanduser() / "features" / f"{spec.fingerprint}-{_RECIPE}.safetensors",
        )
    else:
        network = Inception() if name == "inception" else random_network(spec.shape[0])
    nothing = torch.zeros((), dtype=torch.float64)
    bare = Features(name, network.eval().requires_grad_(False), value_range, nothing, nothing + 1.0, accuracy)
    found = bare(images)
    # What never varies says nothing, and must not be divided by 0.
    std = found.std(dim=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)
    return Features(name, bare.network, value_range, found.mean(dim=0), std, accuracy)


def _can_be_classified(dataset: Dataset) -> bool:
    labels = dataset.train.labels
    if labels is None or dataset.val.labels is None:
        return False
    sizes = torch.bincount(labels[:_MOST_IMAGES])
    return len(sizes) > 1 and int(sizes.min()) >= _FEWEST_OF_A_CLASS
