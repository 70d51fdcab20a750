"""First steps of a training run or a sweep: load the data, and complete the config from them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusion.config import Config
from diffusion.data.dataset import Dataset, load_source
from diffusion.data.image_folder import ImageFolder
from diffusion.data.sources import DataSource
from diffusion.errors import printable
from diffusion.evaluation.features import Features, fit_features
from diffusion.networks.build import check_network, check_training_memory
from workflows.data.streamed_dataset import stream_folder
from workflows.environment import ray_address


@dataclass(frozen=True, eq=False)
class LoadedData:
    """A dataset and the features by which its images are compared.

    Attributes:
        dataset: the dataset.
        features: fitted features, or None for points.
    """

    dataset: Dataset
    features: Features | None = None

    def to(self, device: str | torch.device) -> "LoadedData":
        """Copy on another device."""
        return LoadedData(self.dataset.to(device), self.features and self.features.to(device))


def load_or_stream(source: DataSource, *, start_ray: Callable[[], None]) -> Dataset:
    """Load data; images that are too large for memory are streamed.

    Args:
        source: the opened data.
        start_ray: function that starts Ray; called only if images are streamed, which Ray decodes.

    Raises:
        InputError: the data cannot be read, or are too few.
    """
    if isinstance(source, ImageFolder) and source.larger_than_memory:
        start_ray()
        return stream_folder(source)
    return load_source(source, lambda line: print(printable(line), flush=True))


def check_fits(config: Config, dataset: Dataset) -> None:
    """Check that a network fits the data, and into memory with its training as far as that is known here.

    Workers on other machines or on GPUs have memory of their own, and check for themselves.

    Raises:
        InputError: it does not.
    """
    spec = dataset.spec
    if ray_address() is None and not torch.cuda.is_available():
        check_training_memory(config, spec.shape, spec.num_classes)
    else:
        check_network(config, spec.shape, spec.num_classes)


def no_notice(line: str) -> None:
    """Take a line that a quiet run does not print."""


def prepare_data(
    config: Config, dataset: Dataset, *, notify: Callable[[str], None] = print
) -> tuple[Config, LoadedData]:
    """Fit the features by which images are compared, and complete the config.

    Args:
        config: config with the requested features.
        dataset: the data.
        notify: receives a line before something that takes seconds.

    Returns:
        The config with the name of the fitted features and with epochs converted to updates; the data.

    Raises:
        InputError: the data do not allow the requested features.
    """
    features = fit_features(dataset, config.metrics.features, notify)
    if features is not None:
        config = config.with_values({"metrics.features": features.name})
    return config.resolve_epochs(len(dataset.train)), LoadedData(dataset, features)
