"""Data sources: what a run reads its examples from, opened once and handed on.

`DATA_SOURCES` in diffusion/registry.py lists the sources; docs/extending.md shows how to add one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from diffusion.config import IN_MEMORY, DataConfig, allowed_data, data_names, is_data_name
from diffusion.errors import InputError
from diffusion.files import path_kind, user_path
from diffusion.registry import DATA_SOURCES

CACHE = Path("~/.cache/ray-ddpm")
PIXEL_RANGE = (0.0, 255.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class DatasetInfo:
    """Metadata of a data set: everything except its values.

    Attributes:
        value_range: smallest and largest possible value in data units (images), or None (points).
        columns: names of the coordinates (points), or None.
        classes: class names, indexed by label, or None.
        labels: int64 [examples], indices into `classes`, or None.
        sides: the user's split: int64 [examples], indices into `splits.SIDES`, or None.
        groups: int64 [examples], groups whose examples stay in one split, or None.
    """

    value_range: tuple[float, float] | None = None
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    labels: NDArray[np.int64] | None = None
    sides: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None

    @property
    def kind(self) -> Literal["image", "points"]:
        """Whether an example is an image or a point."""
        return "points" if self.value_range is None else "image"


@dataclass(frozen=True, eq=False, kw_only=True)
class RawData(DatasetInfo):
    """A data set as it was read, before it is split and normalised.

    Attributes:
        values: [examples, C, H, W] (images) or [examples, D] (points), in data units.
        notes: lines about the data that the user should read.
    """

    values: NDArray[Any]
    notes: tuple[str, ...] = ()


class DataSource(ABC):
    """The data of a run, opened but not loaded.

    A run opens its source once and hands it on, so a source keeps what it finds out, such as the files of
    a folder. Opening reads nothing: what costs time is read when it is first asked for.

    Subclasses set `kind` and implement `load`; those with images also set `image_side`.

    Args:
        config: config that names the data.

    Attributes:
        config: config that names the data.
        kind: "image" or "points".
        has_columns: whether `config.label_column` and the other columns apply.

    Raises:
        InputError: a setting does not apply to these data.
    """

    kind: ClassVar[Literal["image", "points"]]
    has_columns: ClassVar[bool] = False

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        for role in ("label", "split", "group"):
            column = getattr(config, f"{role}_column")
            if column is not None and not self.has_columns:
                raise InputError(
                    f"--{role}-column {column}: only tables have columns, and --data {config.name} is not a "
                    "table; leave it out"
                )
        if config.horizontal_flips and self.kind != "image":
            raise InputError(
                f"--horizontal-flips: --data {config.name} holds points, and only images can be flipped; "
                "leave it out"
            )
        if config.super_resolution is not None and self.kind != "image":
            raise InputError(
                f"--super-resolution {config.super_resolution}: --data {config.name} holds points, and only "
                "images have a resolution; leave it out"
            )

    @property
    def name(self) -> str:
        """Short name of the data, see `short_name`."""
        return short_name(self.config)

    @property
    def image_side(self) -> int | None:
        """Side of the images in pixels; None for points."""
        return None

    @property
    def image_channels(self) -> int | None:
        """Number of channels of the images, 1 if they are grey; None if it is not known before loading."""
        return None

    @property
    def larger_than_memory(self) -> bool:
        """Whether the examples stay on disk during a training; only those of an `ImageFolder` can."""
        return False

    @abstractmethod
    def load(self) -> RawData:
        """Load all examples into memory.

        Raises:
            InputError: the data cannot be found, read or downloaded.
        """


def open_source(config: DataConfig) -> DataSource:
    """Open the data that a config names.

    Raises:
        InputError: the path does not exist, the data were passed from Python, or a setting does not apply to
            these data.
    """
    if config.name.startswith(IN_MEMORY):
        raise InputError(
            f"--data {config.name}: these data were passed from Python and are stored nowhere; pass them "
            "again to run_sweep or run_training"
        )
    path = Path(config.name)
    kind = None if is_data_name(config.name) else path_kind(path)
    if is_data_name(config.name):
        key = config.name
    elif kind == "file" and path.suffix in DATA_SOURCES:
        key = path.suffix
    elif kind == "folder":
        key = "/"
    else:
        raise InputError(f"--data {path}: there is no such folder or table")
    source: DataSource = DATA_SOURCES[key](config)
    return source


def resolve(name: str) -> str:
    """Check the value of --data; return a name unchanged (also of data in memory), a path made absolute.

    Raises:
        InputError: it is neither the name of a data set nor the path of a folder or table.
    """
    if is_data_name(name) or name.startswith(IN_MEMORY):
        return name
    if not name.strip():
        raise InputError(f"--data is empty: give one of {', '.join(data_names())}, or a path")
    path = user_path(name)
    kind = path_kind(path)
    if kind == "folder" or (kind == "file" and path.suffix in DATA_SOURCES):
        return str(path)
    problem = {
        None: "there is no such data set, folder or file",
        "file": "this file is not a table",
        "other": "this is neither a folder nor a file",
    }[kind]
    raise InputError(f"--data {name}: {problem}; give {allowed_data()}")


def short_name(config: DataConfig) -> str:
    """A name for folders and experiments: at most 40 ASCII letters, digits, ".", "_" and "-"."""
    stem = Path(config.name).stem
    safe = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in stem)
    return safe.lstrip("._-")[:40] or "data"


def encode_labels(
    names: Sequence[str] | None,
) -> tuple[tuple[str, ...] | None, NDArray[np.int64] | None]:
    """Encode class names as integer labels.

    Args:
        names: class name of each example, or None.

    Returns:
        The class names in sorted order, and the index of each example's class among them, int64
        [examples]; (None, None) if `names` is None.
    """
    if names is None:
        return None, None
    classes = tuple(sorted(set(names)))
    indices = {name: index for index, name in enumerate(classes)}
    return classes, np.array([indices[name] for name in names], dtype=np.int64)
