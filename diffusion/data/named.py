"""Data sets that are known by a name: digits, heart, and those of torchvision."""

import math
from typing import ClassVar

import numpy as np

from diffusion.data.sources import CACHE, PIXEL_RANGE, DataSource, RawData
from diffusion.errors import InputError
from diffusion.files import user_path


class Digits(DataSource):
    """1,797 handwritten digits of 8x8 pixels, which come with scikit-learn."""

    kind = "image"
    image_side = 8

    def load(self) -> RawData:
        """Load the digits and their classes."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        classes = tuple(str(name) for name in digits.target_names)
        labels = digits.target.astype(np.int64)
        return RawData(values=digits.images[:, None], value_range=(0.0, 16.0), classes=classes, labels=labels)


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


class _TorchvisionSource(DataSource):
    """A data set of torchvision, downloaded to a cache when it is first loaded.

    Attributes:
        dataset_class: name of its class in torchvision.datasets.
    """

    kind = "image"
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
        return RawData(values=images, value_range=PIXEL_RANGE, classes=tuple(dataset.classes), labels=labels)


class Mnist(_TorchvisionSource):
    """60,000 handwritten digits, 28x28 pixels, grey."""

    dataset_class = "MNIST"
    image_side = 28


class FashionMnist(_TorchvisionSource):
    """60,000 pictures of clothes, 28x28 pixels, grey."""

    dataset_class = "FashionMNIST"
    image_side = 28


class Cifar10(_TorchvisionSource):
    """50,000 photos of ten kinds of things, 32x32 pixels, in colour."""

    dataset_class = "CIFAR10"
    image_side = 32
    image_channels = 3
