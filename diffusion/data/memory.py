"""Data that a program already has: a DataFrame, an array or tensor, or a PyTorch Dataset.

Neither pandas nor PyTorch is imported here: whoever passes their objects has imported them.
"""

import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.config import IN_MEMORY, DataConfig
from diffusion.data.image_reading import upright
from diffusion.data.sources import PIXEL_RANGE, DataSource, RawData, encode_labels
from diffusion.data.tables import table_from_frame
from diffusion.errors import InputError
from diffusion.json_values import short_repr

if TYPE_CHECKING:
    import pandas as pd

    from diffusion.data.dataset import Dataset

_CHANNELS = (1, 3)


class Examples(Protocol):
    """Examples in memory: a DataFrame, an array, a tensor, a map-style PyTorch Dataset, or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> object: ...


def dataset_from_memory(
    data: Examples, config: DataConfig | None = None, labels: Sequence[int | str] | None = None
) -> "Dataset":
    """Split and normalise data that are in memory.

    Accepted are

    - a pandas DataFrame of numbers, one point per row;
    - a numpy array or tensor of points, [examples, D];
    - one of images, [examples, H, W], [examples, H, W, C] or [examples, C, H, W] with C = 1 or 3. Integers
      are pixels from 0 to 255. Floats are from 0 to 1, or from -1 to 1 if any is negative, and samples have
      the same range;
    - a map-style PyTorch Dataset, or a list, whose items are points or images (arrays, tensors or Pillow's
      images, all of one shape), or pairs (example, label). Every item is read once. Pillow's images become
      grey or RGB with 8 bits as those of a folder do, see `ImageFolder`.

    Args:
        data: the examples.
        config: how to split them, whether models are conditional, and a DataFrame's `label_column`,
            `split_column` and `group_column`; its `name` is not used.
        labels: class of each example, numbers or names, unless the data contain them.

    Raises:
        InputError: the data have another type, shape or range, or are too few.
    """
    from diffusion.data.dataset import load_source

    return load_source(memory_source(data, config or DataConfig(), labels))


def memory_source(
    data: Examples, config: DataConfig, labels: Sequence[int | str] | None = None
) -> DataSource:
    """Open data that are in memory; arguments and errors as for `dataset_from_memory`."""
    if config.image_size is not None:
        raise InputError(
            f"--image-size {config.image_size}: only images of a folder are resized; resize these beforehand"
        )
    if _is_frame(data):
        config = replace(config, name=memory_name(data))
        return _TableInMemory(config, _from_frame(data, config, labels))
    class_names: Sequence[str] | None = None
    if isinstance(data, np.ndarray) or _is_tensor(data):
        values = _to_array(data, "the data")
    else:
        values, own_labels = _from_items(data)
        names = getattr(data, "classes", None)
        class_names = names if hasattr(names, "__len__") else None
        labels = own_labels if labels is None else labels
    config = replace(config, name=memory_name(data))
    raw = raw_from_array(values)
    classes, numbers = _encode(labels, len(values), class_names)
    raw = replace(raw, classes=classes, labels=numbers)
    return (_PointsInMemory if raw.kind == "points" else _ImagesInMemory)(config, raw)


def memory_name(data: Examples) -> str:
    """Name of data in memory: memory:// and "dataframe", "array", "tensor", or the name of their class."""
    if _is_frame(data):
        return f"{IN_MEMORY}dataframe"
    if _is_tensor(data):
        return f"{IN_MEMORY}tensor"
    return IN_MEMORY + ("array" if isinstance(data, np.ndarray) else type(data).__name__)


class _InMemory(DataSource):
    def __init__(self, config: DataConfig, raw: RawData) -> None:
        self._raw = raw
        super().__init__(config)

    def load(self) -> RawData:
        """Return the data."""
        return self._raw


class _PointsInMemory(_InMemory):
    kind = "points"


class _TableInMemory(_PointsInMemory):
    has_columns = True


class _ImagesInMemory(_InMemory):
    kind = "image"

    @property
    def image_side(self) -> int:
        """The shorter side of the images in pixels."""
        return min(self._raw.values.shape[2:])


def _is_frame(data: object) -> "TypeGuard[pd.DataFrame]":
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(data, pandas.DataFrame)


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _from_frame(frame: "pd.DataFrame", config: DataConfig, labels: Sequence[int | str] | None) -> RawData:
    raw = table_from_frame(frame, "the DataFrame", config).to_raw()
    if labels is None:
        return raw
    if config.label_column is not None:
        raise InputError("labels: the label_column has them already; give one of the two")
    classes, numbers = _encode(labels, len(raw.values), None)
    return replace(raw, classes=classes, labels=numbers)


def raw_from_array(values: NDArray[Any], float_range: tuple[float, float] | None = None) -> RawData:
    """Interpret an array as points, [examples, D], or as images, see `dataset_from_memory`.

    Args:
        values: the array.
        float_range: range of images of floats that are not all from -1 to 1; None allows no others.

    Raises:
        InputError: the array has another type or shape, or values that are out of range or not finite.
    """
    shape = values.shape
    if values.dtype.kind not in "iuf":
        raise InputError(f"data of dtype {values.dtype}: give integers or floats")
    if values.ndim not in (2, 3, 4) or 0 in shape:
        raise InputError(
            f"data of shape {shape}: give points [examples, D], or images [examples, H, W], "
            "[examples, H, W, C] or [examples, C, H, W]"
        )
    if not np.isfinite(values).all():
        first = tuple(int(index) for index in np.argwhere(~np.isfinite(values))[0])
        raise InputError(
            f"data: element {first} is {values[first]}, not a finite number; fix or leave it out"
        )
    if values.ndim == 2:
        return RawData(
            values=values.astype(np.float64), columns=tuple(f"x{index}" for index in range(shape[1]))
        )
    images = _channels_first(values)
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        value_range = (-1.0, 1.0) if low < 0.0 else (0.0, 1.0)
        if float_range is not None and (low < -1.0 or high > 1.0):
            value_range = float_range
        if low < value_range[0] or high > value_range[1]:
            raise InputError(
                f"images of floats from {low:g} to {high:g}: scale them to 0..1 or -1..1, or give integers "
                "from 0 to 255"
            )
        return RawData(values=images, value_range=value_range)
    if low < 0 or high > 255:
        raise InputError(f"images of integers from {low:g} to {high:g}: give 0 to 255")
    return RawData(values=images.astype(np.uint8), value_range=PIXEL_RANGE)


def _channels_first(values: NDArray[Any]) -> NDArray[Any]:
    """Images as [examples, C, H, W]."""
    if values.ndim == 3:
        return values[:, None]
    first, last = values.shape[1] in _CHANNELS, values.shape[3] in _CHANNELS
    if first == last:
        raise InputError(
            f"images of shape {values.shape}: give [examples, H, W, C] or [examples, C, H, W] with C = 1 or 3"
            + ("; here it could be either" if first else "")
        )
    return values if first else values.transpose(0, 3, 1, 2)


def _from_items(data: Examples) -> tuple[NDArray[Any], list[Any] | None]:
    """Read every item of a Dataset or list: the examples in one array, and their labels, if they have any."""
    if hasattr(data, "to_pandas"):  # the items of other libraries' tables are columns, or tables of one row
        raise InputError(f"data of type {type(data).__name__}: give its to_pandas()")
    try:
        count = len(data)
        getitem = data.__getitem__
    except (TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"data of type {type(data).__name__}: give a name, a path, a DataFrame, an array, or a Dataset "
            "with __len__ and __getitem__"
        ) from error
    examples: list[NDArray[Any]] = []
    labels: list[Any] = []
    for index in range(count):
        try:
            item = getitem(index)
        except LookupError as error:
            raise InputError(
                f"item {index} of the data, which have {count}, cannot be read "
                f"({type(error).__name__}: {error}): give a list, an array or a Dataset whose items are "
                "numbered from 0"
            ) from error
        if isinstance(item, tuple):
            if len(item) not in (1, 2):
                raise InputError(
                    f"item {index} of the data has {len(item)} parts: give the example, or (example, label)"
                )
            labels.extend(item[1:])
            item = item[0]
        example = _to_array(item, f"item {index} of the data")
        if example.dtype.kind not in "iuf" or example.ndim not in (1, 2, 3):
            raise InputError(
                f"item {index} of the data is {type(item).__name__}: give a point or an image, as an array, "
                "a tensor or one of Pillow's images, or a pair (example, label)"
            )
        if examples and example.shape != examples[0].shape:
            raise InputError(
                f"item {index} of the data has shape {example.shape}, item 0 has {examples[0].shape}: "
                "give all of them one shape"
            )
        examples.append(example)
    if not examples:
        raise InputError("the data are empty: give some examples")
    if labels and len(labels) != count:
        raise InputError(f"{len(labels)} of {count} items of the data have a label: give all or none")
    return np.stack(examples), labels or None


def _to_array(value: Any, what: str) -> NDArray[Any]:
    """The array of an array, tensor, image or list; `what` begins the message if there is none."""
    if isinstance(value, Image.Image):
        try:
            value = upright(value)
        except Exception as error:  # Pillow's parsers raise all kinds of exceptions on damaged files
            raise InputError(f"{what} is an image that cannot be read ({error}): leave it out") from error
    elif _is_tensor(value):
        try:
            value = value.detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:
            raise InputError(
                f"{what}: numpy has no arrays such as this tensor of {value.dtype}; give a dense tensor of "
                "integers or of float32"
            ) from error
    if np.ma.is_masked(value):  # the numbers under a mask mean nothing
        raise InputError(f"{what}: a masked array lacks elements; fill them in or leave their examples out")
    try:
        return np.asarray(value)
    except ValueError:  # a list of unequal lists
        return np.asarray(value, dtype=object)


def _encode(
    labels: Sequence[Any] | None, count: int, class_names: Sequence[str] | None
) -> tuple[tuple[str, ...] | None, NDArray[np.int64] | None]:
    """Names of the classes, and each example's class as int64 [examples]; numbers are ordered as numbers."""
    if labels is None:
        return None, None
    if not hasattr(labels, "__len__") or getattr(labels, "shape", None) == () or _has_no_order(labels):
        raise InputError(
            f"labels of type {type(labels).__name__}: give a list, an array or a Series with the class of "
            "each example"
        )
    if len(labels) != count:
        raise InputError(f"{len(labels)} labels for {count} examples: give one for each")
    plain = [_plain(label) for label in labels]
    if all(isinstance(label, str) for label in plain):
        return encode_labels(plain)
    if not all(isinstance(label, int) for label in plain):
        odd = next(label for label in plain if not isinstance(label, int))
        raise InputError(f"label {short_repr(odd)}: give numbers or names of classes, all of one kind")
    present = sorted(set(plain))
    if class_names is not None and 0 <= present[0] and present[-1] < len(class_names):
        return tuple(map(str, class_names)), np.array(plain, dtype=np.int64)
    index = {number: position for position, number in enumerate(present)}
    return tuple(map(str, present)), np.array([index[number] for number in plain], dtype=np.int64)


def _has_no_order(labels: object) -> bool:
    """Whether going through labels does not give one for each example, in the order of the examples."""
    return _is_frame(labels) or isinstance(labels, (str, bytes, Set, Mapping))


def _plain(label: Any) -> Any:
    """A numpy or tensor scalar as a plain Python value; anything else, such as a one-hot vector, as it is."""
    try:
        return label.item() if hasattr(label, "item") else label
    except (ValueError, RuntimeError):  # it has several elements
        return label
