"""What a training and a sweep do first: the data, and what the config owes to them."""

from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.feature_fitting import with_features
from diffusion.sources import needs_streaming
from workflows.ray_session import start_ray
from workflows.streaming import load_dataset


def prepare(config: Config, *, verbose: bool) -> tuple[Config, Dataset]:
    """The data with the features that their images are compared by, and the config that names them.

    Epochs have become updates in it. Ray is started where the data are streamed.

    Raises:
        InputError: the data cannot be read, are too few, or do not allow the features asked for.
    """
    if needs_streaming(config.data):
        start_ray(verbose)
    dataset = with_features(load_dataset(config.data), config.metrics.features)
    if dataset.features is not None:
        config = config.with_values({"metrics.features": dataset.features.name})
    return config.for_examples(len(dataset.train)), dataset
