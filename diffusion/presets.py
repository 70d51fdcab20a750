"""The configs that data sets start from."""

from diffusion.config import (
    Config,
    DataConfig,
    MetricsConfig,
    NetworkConfig,
    SamplerConfig,
    TrainingConfig,
)
from diffusion.sources import image_side, resolve

# A trial of a sweep shares its time with the others; what is trained alone gets more.
_UNET_UPDATES, _UNET_UPDATES_ALONE = 1800, 6000


def preset(data: str, image_size: int | None = None, *, alone: bool = False) -> Config:
    """The config that a data set starts from: an MLP for points and tiny images, else a U-Net.

    Args:
        data: a known name, or the path of a folder of images or of a table.
        image_size: side that a folder's images are resized to; None keeps their own.
        alone: for a single training, not for each trial of a sweep.

    Raises:
        InputError: no data set has that name or path.
    """
    source = DataConfig(name=resolve(data), image_size=image_size)
    side = image_side(source)
    if side is None:
        return Config(
            data=source,
            network=NetworkConfig(hidden_size=64, num_blocks=3),
            training=TrainingConfig(num_updates=10_000, batch_size=256),
            metrics=MetricsConfig(num_samples=4000),
        )
    if side <= 8:
        return Config(data=source, network=NetworkConfig(hidden_size=384, num_blocks=3, dropout=0.05))
    return Config(
        data=source,
        network=NetworkConfig(kind="unet", channel_multipliers=(1, 2, 2) if side >= 16 else (1, 2)),
        training=TrainingConfig(
            num_updates=_UNET_UPDATES_ALONE if alone else _UNET_UPDATES, batch_size=32, num_evaluations=4
        ),
        sampler=SamplerConfig(num_steps=50),
        metrics=MetricsConfig(num_samples=256, num_examples=64),
    )
