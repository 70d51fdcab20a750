"""Data sets that are known by a name: digits, heart, and those of torchvision."""

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from diffusion.config import DataConfig
from diffusion.data.image_reading import reduced
from diffusion.data.sources import CACHE, PIXEL_RANGE, DataSource, RawData
from diffusion.errors import InputError
from diffusion.files import user_path


class _NamedImages(DataSource):
    """Images of one size, which are reduced to a smaller one on request.

    Attributes:
        own_side: side of the images in pixels.
    """

    kind = "image"
    own_side: ClassVar[int]

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        side = config.image_side
        if side is not None and side > self.own_side:
            flag = "super-resolution" if config.super_resolution else "image-size"
            raise InputError(
                f"--{flag} {config.super_resolution or side}: --data {config.name} has images of "
                f"{self.own_side} pixels; give at most as many"
            )

    @property
    def image_side(self) -> int:
        """Side of the images in pixels."""
        return self.config.image_side or self.own_side

    def _sized(self, images: NDArray[Any], value_range: tuple[float, float]) -> NDArray[Any]:
        """The images [examples, C, H, W] with sides of `image_side`."""
        side = self.image_side
        return images if side == self.own_side else reduced(images, side, value_range)


class Digits(_NamedImages):
    """1,797 handwritten digits of 8x8 pixels, which come with scikit-learn."""

    own_side = 8

    def load(self) -> RawData:
        """Load the digits and their classes."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        classes = tuple(str(name) for name in digits.target_names)
        labels = digits.target.astype(np.int64)
        value_range = (0.0, 16.0)
        values = self._sized(digits.images[:, None], value_range)
        return RawData(values=values, value_range=value_range, classes=classes, labels=labels)


class Heart(DataSource):
    """8,000 points on the outline of a heart, always the same."""

    kind = "points"

    def load(self) -> RawData:
        """Compute the points."""
        angles = np.random.default_rng(42).uniform(0.0, 2.0 * np.pi, 8000)
        points = [heart_curve(angle) for angle in angles.tolist()]
        return RawData(values=np.array(points) / 5.0, columns=("x", "y"))


def heart_curve(u: float) -> tuple[float, float]:
    """Point (x, y) of the heart at angle u, by the C library: NumPy's last bit depends on the processor."""
    cos = math.cos
    return 16.0 * math.sin(u) ** 3, 13.0 * cos(u) - 5.0 * cos(2.0 * u) - 2.0 * cos(3.0 * u) - cos(4.0 * u)


class _TorchvisionSource(_NamedImages):
    """A data set of torchvision, downloaded to a cache when it is first loaded.

    Attributes:
        dataset_class: name of its class in torchvision.datasets.
    """

    dataset_class: ClassVar[str]

    def load(self) -> RawData:
        """Read the data from the cache; the first time, download them, which shows a progress bar.

        Raises:
            InputError: the data cannot be downloaded or read.
        """
        import torchvision

        name = self.config.name
        root = user_path(CACHE)
        dataset_class = getattr(torchvision.datasets, self.dataset_class)
        read_error = ""
        try:
            try:
                dataset = dataset_class(root, train=True, download=False)
            except RuntimeError as error:
                read_error = str(error)
                print(f"Downloading {name} to {root} ...")
                dataset = dataset_class(root, train=True, download=True)
        except Exception as error:  # from the network, the disk or incomplete files
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if not isinstance(error, (RuntimeError, OSError)) or reason == " ".join(read_error.split())[:200]:
                raise InputError(
                    f"--data {name}: the files downloaded to {root} cannot be read ({reason}): remove that "
                    "folder to download them again, or give a folder of images"
                ) from error
            raise InputError(
                f"--data {name} could not be downloaded ({reason}): try again, or give a folder of images"
            ) from error
        pixels = np.asarray(dataset.data)
        images = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        labels = np.asarray(dataset.targets, dtype=np.int64)
        images = self._sized(images, PIXEL_RANGE)
        return RawData(values=images, value_range=PIXEL_RANGE, classes=tuple(dataset.classes), labels=labels)


class Mnist(_TorchvisionSource):
    """60,000 handwritten digits, 28x28 pixels, grey."""

    dataset_class = "MNIST"
    own_side = 28


class FashionMnist(_TorchvisionSource):
    """60,000 pictures of clothes, 28x28 pixels, grey."""

    dataset_class = "FashionMNIST"
    own_side = 28


class Cifar10(_TorchvisionSource):
    """50,000 photos of ten kinds of things, 32x32 pixels, in colour."""

    dataset_class = "CIFAR10"
    own_side = 32
    image_channels = 3
