"""Where data come from: the named sets, a folder of images, a table of points."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.config import DataConfig, DataName
from diffusion.errors import InputError
from diffusion.image_folder import default_image_size, load_image_folder
from diffusion.tables import SUFFIXES, load_table

_TORCHVISION = {"mnist": ("MNIST", 28), "fashion-mnist": ("FashionMNIST", 28), "cifar10": ("CIFAR10", 32)}
_CACHE = Path("~/.cache/ray-ddpm")


@dataclass(frozen=True)
class RawData:
    """A data set as it was found.

    Attributes:
        values: [examples, C, H, W] (images) or [examples, D] (points), in data units.
        value_range: smallest and largest possible value (images), or None.
        columns: names of the coordinates (points), or None.
    """

    values: NDArray[Any]
    value_range: tuple[float, float] | None
    columns: tuple[str, ...] | None

    @property
    def kind(self) -> Literal["image", "points"]:
        """What one example is."""
        return "points" if self.value_range is None else "image"


def resolve(name: str) -> str:
    """A data set's name as it is, a path made absolute.

    Raises:
        InputError: neither a known name nor an existing folder or table.
    """
    if name in get_args(DataName):
        return name
    if not name.strip():
        raise InputError(f"--data is empty: give one of {', '.join(get_args(DataName))}, or a path")
    path = Path(name).expanduser().absolute()
    if path.is_dir() or (path.is_file() and path.suffix in SUFFIXES):
        return str(path)
    known = ", ".join(get_args(DataName))
    found = "is no table that can be read" if path.is_file() else "is no name, folder or file"
    raise InputError(
        f"--data {name}: {found}; give one of {known}, or the path of a folder of images or of a "
        ".csv, .parquet or .npy table"
    )


def image_side(config: DataConfig) -> int | None:
    """The side of the images to come, without loading them all; None for points."""
    if config.name == "heart" or Path(config.name).suffix in SUFFIXES:
        return None
    if config.name in _TORCHVISION:
        return _TORCHVISION[config.name][1]
    if config.name == "digits":
        return 8
    return config.image_size or default_image_size(Path(config.name))


def short_name(config: DataConfig) -> str:
    """A name fit for folders and experiments."""
    stem = Path(config.name).stem
    safe = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem
    )
    return safe.lstrip("._-")[:40] or "data"


def load_raw(config: DataConfig) -> RawData:
    """Load a data set.

    Raises:
        InputError: it cannot be found, read or downloaded.
    """
    named: dict[str, Callable[[], RawData]] = {"digits": _load_digits, "heart": _load_heart}
    if config.name in named:
        return named[config.name]()
    if config.name in _TORCHVISION:
        return _load_torchvision(config.name)
    path = Path(config.name)
    if path.suffix in SUFFIXES and path.is_file():
        values, columns = load_table(path)
        return RawData(values, None, columns)
    if not path.is_dir():
        raise InputError(f"--data {path}: there is no such folder or table")
    return RawData(load_image_folder(path, config.image_size, config.skip_bad_images), (0.0, 255.0), None)


def _load_digits() -> RawData:
    from sklearn.datasets import load_digits

    return RawData(load_digits().images[:, None], (0.0, 16.0), None)


def _load_heart() -> RawData:
    u = np.random.default_rng(42).uniform(0.0, 2.0 * np.pi, 8000)
    x = 16.0 * np.sin(u) ** 3
    y = 13.0 * np.cos(u) - 5.0 * np.cos(2.0 * u) - 2.0 * np.cos(3.0 * u) - np.cos(4.0 * u)
    return RawData(np.stack([x, y], axis=1) / 5.0, None, ("x", "y"))


def _load_torchvision(name: str) -> RawData:
    import torchvision

    root = _CACHE.expanduser()
    kind = getattr(torchvision.datasets, _TORCHVISION[name][0])
    try:
        try:
            found = kind(root, train=True, download=False)
        except RuntimeError:
            print(f"Downloading {name} to {root} ...")
            found = kind(root, train=True, download=True)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"--data {name} could not be downloaded ({reason}): try again, or give a folder of images"
        ) from error
    pixels = np.asarray(found.data)
    return RawData(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2), (0.0, 255.0), None)
