"""Where data come from: the named sets, a folder of images, a table of points."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.config import DataConfig, DataName
from diffusion.errors import InputError
from diffusion.image_folder import default_image_size, folder_bytes, load_image_folder
from diffusion.tables import SUFFIXES, load_table

_TORCHVISION = {"mnist": ("MNIST", 28), "fashion-mnist": ("FashionMNIST", 28), "cifar10": ("CIFAR10", 32)}
CACHE = Path("~/.cache/ray-ddpm")
PIXEL_RANGE = (0.0, 255.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """What is known of a data set besides its values.

    Attributes:
        value_range: smallest and largest possible value (images), or None.
        columns: names of the coordinates (points), or None.
        classes: names by label number, or None.
        labels: int64 [examples], or None.
    """

    value_range: tuple[float, float] | None = None
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    labels: NDArray[np.int64] | None = None

    @property
    def kind(self) -> Literal["image", "points"]:
        """What one example is."""
        return "points" if self.value_range is None else "image"


@dataclass(frozen=True, eq=False, kw_only=True)
class RawData(Source):
    """A data set as it was found.

    Attributes:
        values: [examples, C, H, W] (images) or [examples, D] (points), in data units.
    """

    values: NDArray[Any]


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


def source_kind(config: DataConfig) -> Literal["named", "folder", "table"]:
    """What the data are read from.

    Raises:
        InputError: a path that leads nowhere, or a choice that does not go with the data.
    """
    path = Path(config.name)
    if config.name in get_args(DataName):
        kind: Literal["named", "folder", "table"] = "named"
    elif path.suffix in SUFFIXES and path.is_file():
        kind = "table"
    elif path.is_dir():
        kind = "folder"
    else:
        raise InputError(f"--data {path}: there is no such folder or table")
    if config.label_column is not None and kind != "table":
        raise InputError(
            f"--label-column {config.label_column}: only tables have columns, and --data {config.name} "
            "is none; leave it out"
        )
    if config.horizontal_flips and (kind == "table" or config.name == "heart"):
        raise InputError(
            f"--horizontal-flips: --data {config.name} holds points, and only images can be flipped; "
            "leave it out"
        )
    return kind


def image_side(config: DataConfig) -> int | None:
    """The side of the images to come, without loading them all; None for points."""
    if config.name == "heart" or Path(config.name).suffix in SUFFIXES:
        return None
    if config.name in _TORCHVISION:
        return _TORCHVISION[config.name][1]
    if config.name == "digits":
        return 8
    return config.image_size or default_image_size(Path(config.name))


def needs_streaming(config: DataConfig) -> bool:
    """Whether the data are a folder whose images as uint8 need more than `config.memory_limit_gb`.

    It is judged by their number and by the first that can be read.

    Raises:
        InputError: the folder has no image that can be read, or see `source_kind`.
    """
    if source_kind(config) != "folder":
        return False
    return folder_bytes(Path(config.name), config.image_size) > config.memory_limit_gb * 1e9


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
        InputError: it cannot be found, read or downloaded, or a choice does not go with it.
    """
    kind, path = source_kind(config), Path(config.name)
    if kind == "table":
        table = load_table(path, config.label_column)
        classes, labels = number_labels(table.labels)
        return RawData(values=table.values, columns=table.columns, classes=classes, labels=labels)
    if kind == "folder":
        images = load_image_folder(path, config.image_size, config.skip_bad_images)
        classes, labels = number_labels(images.class_names)
        return RawData(values=images.pixels, value_range=PIXEL_RANGE, classes=classes, labels=labels)
    named: dict[str, Callable[[], RawData]] = {"digits": _load_digits, "heart": _load_heart}
    return named[config.name]() if config.name in named else _load_torchvision(config.name)


def number_labels(
    names: Sequence[str] | None,
) -> tuple[tuple[str, ...] | None, NDArray[np.int64] | None]:
    """The classes in sorted order, and the number in them of each example's; None of None."""
    if names is None:
        return None, None
    classes = tuple(sorted(set(names)))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers[name] for name in names], dtype=np.int64)


def _load_digits() -> RawData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    classes = tuple(str(name) for name in digits.target_names)
    labels = digits.target.astype(np.int64)
    return RawData(values=digits.images[:, None], value_range=(0.0, 16.0), classes=classes, labels=labels)


def _load_heart() -> RawData:
    u = np.random.default_rng(42).uniform(0.0, 2.0 * np.pi, 8000)
    x = 16.0 * np.sin(u) ** 3
    y = 13.0 * np.cos(u) - 5.0 * np.cos(2.0 * u) - 2.0 * np.cos(3.0 * u) - np.cos(4.0 * u)
    return RawData(values=np.stack([x, y], axis=1) / 5.0, columns=("x", "y"))


def _load_torchvision(name: str) -> RawData:
    """Read from the cache, into which torchvision downloads at first, showing its progress."""
    import torchvision

    root = CACHE.expanduser()
    kind = getattr(torchvision.datasets, _TORCHVISION[name][0])
    first = ""
    try:
        try:
            found = kind(root, train=True, download=False)
        except RuntimeError as error:
            first = str(error)
            print(f"Downloading {name} to {root} ...")
            found = kind(root, train=True, download=True)
    except Exception as error:  # of the network, the disk, or files that are there but not whole
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if not isinstance(error, (RuntimeError, OSError)) or reason == " ".join(first.split())[:200]:
            raise InputError(
                f"--data {name}: what was downloaded to {root} cannot be read ({reason}): remove that folder "
                "to download it anew, or give a folder of images"
            ) from error
        raise InputError(
            f"--data {name} could not be downloaded ({reason}): try again, or give a folder of images"
        ) from error
    pixels = np.asarray(found.data)
    images = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    labels = np.asarray(found.targets, dtype=np.int64)
    return RawData(values=images, value_range=PIXEL_RANGE, classes=tuple(found.classes), labels=labels)
