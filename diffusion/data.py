"""Data sets: loaded, split, and normalised when they are taken."""

import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.config import DataConfig
from diffusion.errors import InputError
from diffusion.features import Features
from diffusion.likelihood import log_snr_window
from diffusion.moments import clip_interval, pixel_moments, pixel_sums, smallest_step, value_moments
from diffusion.normalisation import denormalise
from diffusion.sources import Source, load_raw, short_name
from diffusion.splits import Splits, digests, fingerprint, split

_TUPLES = ("shape", "range", "columns", "clip", "log_snr_window", "classes")
# What the window of log-SNR is fitted to; so many values take a GiB as float32.
_MOST_FIRST, _MOST_FIRST_VALUES = 10_000, 2**28


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What must travel with a model to understand its numbers.

    Attributes:
        name: the data set's name.
        kind: "image" or "points".
        shape: of one example: (C, H, W) or (D,).
        mean, std: nested lists that broadcast against `shape`; data = x * std + mean.
        range: smallest and largest possible value in data units, or None (points).
        columns: the coordinates' names (points), else None.
        clip: interval that holds every clean example, in normalised units.
        log_snr_window: the window of log-SNR that models of these data are judged in.
        fingerprint: sha256 over the data, their labels and their split.
        classes: names by label number, where models of these data are conditional, else None.
    """

    name: str
    kind: Literal["image", "points"]
    shape: tuple[int, ...]
    mean: list[Any]
    std: list[Any]
    range: tuple[float, float] | None
    columns: tuple[str, ...] | None
    clip: tuple[float, float]
    log_snr_window: tuple[float, float]
    fingerprint: str
    classes: tuple[str, ...] | None = None

    @property
    def num_classes(self) -> int:
        """Of conditional models, whose null label it is; 0 for others."""
        return len(self.classes or ())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "DataSpec":
        """Read what `to_dict` wrote, through JSON or not; older files know no classes."""
        tree = {"classes": None, **tree}
        tuples = {name: None if tree[name] is None else tuple(tree[name]) for name in _TUPLES}
        return cls(**{**tree, **tuples})

    def denormalise(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """Normalised [batch, *shape] to data units, images clipped to their range."""
        return denormalise(x, self.mean, self.std, self.range)


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples in memory as they are stored, normalised when they are taken.

    Attributes:
        values: [N, *shape]: uint8, or float32 and normalised already.
        mean, std: float32 that broadcast against `values`, or None where those are normalised already.
        labels: int64 [N], or None.
    """

    values: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def device(self) -> torch.device:
        """Where the examples are, and what is taken of them."""
        return self.values.device

    def to(self, device: str | torch.device) -> "Examples":
        """The same on another device."""
        rest = (part if part is None else part.to(device) for part in (self.mean, self.std, self.labels))
        return Examples(self.values.to(device), *rest)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Some examples, float32 and normalised; an index tensor may be on any device."""
        return self.normalised(
            self.values[index if isinstance(index, slice) else index.to(self.values.device)]
        )

    def normalised(self, values: Tensor) -> Tensor:
        """Values that are stored like these, and lie where they do, as float32 and normalised."""
        return values if self.mean is None or self.std is None else (values - self.mean) / self.std

    def batches(self, indices: Iterator[Tensor]) -> Generator[Tensor, None, None]:
        """`self[index]` for each of the index tensors."""
        for index in indices:
            yield self[index]

    def __reduce__(self) -> Any:
        """As arrays, which Ray keeps once a machine for all processes; on the CPU."""
        parts = (self.values, self.mean, self.std, self.labels)
        return _examples_of_arrays, tuple(part if part is None else part.cpu().numpy() for part in parts)


class TrainingExamples(Protocol):
    """What training asks of its examples, whether they are in memory or streamed from disk."""

    @property
    def labels(self) -> Tensor | None:
        """int64 [N], or None."""

    @property
    def device(self) -> torch.device:
        """Where what is taken lies."""

    def __len__(self) -> int: ...

    def to(self, device: str | torch.device) -> Self:
        """The same on another device."""

    def __getitem__(self, index: slice) -> Tensor:
        """Examples from the front, float32 and normalised: the slice starts at 0 with step 1."""

    def batches(self, indices: Iterator[Tensor]) -> Generator[Tensor, None, None]:
        """The examples of each index tensor, float32 and normalised.

        Args:
            indices: int64, on any device; endless or not. They may be read far ahead of what is
                yielded, so they must not share a random generator with their consumer.
        """


@dataclass(frozen=True)
class Dataset:
    """Three splits, what describes them, and what images are compared by."""

    spec: DataSpec
    train: TrainingExamples
    val: Examples
    test: Examples
    features: Features | None = None

    def to(self, device: str | torch.device) -> "Dataset":
        """The same on another device."""
        splits = (self.train.to(device), self.val.to(device), self.test.to(device))
        return Dataset(self.spec, *splits, self.features and self.features.to(device))

    def raw(self, examples: Tensor) -> NDArray[np.float64]:
        """Normalised examples in data units."""
        return self.spec.denormalise(examples.cpu().numpy())


def load_dataset(config: DataConfig) -> Dataset:
    """Load all the data into memory, split by a fixed seed, and fit the normalisation to the training split.

    Images are normalised per channel, points per column. `config.memory_limit_gb` is not looked at:
    `workflows.streaming.load_dataset` does that.

    Raises:
        InputError: the data cannot be read, are too few for three splits, or a column is constant.
    """
    raw = load_raw(config)
    values = raw.values
    splits = split(len(values), math.prod(values.shape[1:]), config)
    train = values[splits.train]
    if values.dtype == np.uint8:
        mean, std = pixel_moments(pixel_sums(train), math.prod(values.shape[2:]))
    else:
        mean, std = value_moments(train)
    check_spread(config, raw.columns, std)

    def stored(part: NDArray[Any], places: NDArray[np.int64]) -> Examples:
        return stored_examples(part, mean, std, None if raw.labels is None else raw.labels[places])

    training = stored(train, splits.train)
    spec = describe(
        config,
        raw,
        values.shape,
        splits,
        digests(values),
        (mean, std),
        clip_interval(training.values.numpy(), raw.value_range, mean, std),
        train[: num_first(values.shape[1:])],
    )
    val, test = (stored(values[places], places) for places in (splits.val, splits.test))
    return Dataset(spec, training, val, test)


def num_first(shape: Sequence[int]) -> int:
    """How many training examples of a shape the window of log-SNR is fitted to."""
    return max(1, min(_MOST_FIRST, _MOST_FIRST_VALUES // math.prod(shape)))


def stored_examples(
    values: NDArray[Any],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    labels: NDArray[np.int64] | None,
) -> Examples:
    """Examples in data units as they are kept: uint8 as it is, all else normalised as float32."""
    numbers = None if labels is None else torch.from_numpy(labels)
    if values.dtype == np.uint8:
        centre, spread = (torch.from_numpy(moment.astype(np.float32)) for moment in (mean, std))
        return Examples(torch.from_numpy(values), centre, spread, numbers)
    return Examples(torch.from_numpy(((values - mean) / std).astype(np.float32)), labels=numbers)


def check_spread(config: DataConfig, columns: Sequence[str] | None, std: NDArray[np.float64]) -> None:
    """Refuse what cannot be normalised.

    Raises:
        InputError: a column or channel has one value only, or values too large for their deviation.
    """
    for place, deviation in enumerate(std.ravel()):
        name = f"column {columns[place]}" if columns else f"channel {place} of the images"
        if deviation == 0.0:
            raise InputError(f"--data {config.name}: {name} has one value only; leave it out")
        if not math.isfinite(deviation):
            raise InputError(
                f"--data {config.name}: {name} has values too large to work with; scale them down"
            )


def describe(
    config: DataConfig,
    source: Source,
    shape: Sequence[int],
    splits: Splits,
    example_digests: Iterable[bytes],
    moments: tuple[NDArray[np.float64], NDArray[np.float64]],
    clip: tuple[float, float],
    first: NDArray[Any],
) -> DataSpec:
    """What describes data so split, whether they are in memory or streamed from disk.

    Args:
        config: names the data.
        source: what is known of them.
        shape: of all examples, [examples, ...].
        splits: of the examples.
        example_digests: of each example's values, see `splits.digests`.
        moments: mean and deviation of the training split.
        clip: interval that holds every clean example, normalised.
        first: the training split's first examples in data units, see `num_first`.

    Raises:
        InputError: classes are asked for, and there are none.
    """
    if config.uses_labels and source.classes is None:
        raise InputError(
            f"--conditional: --data {config.name} has no classes; give a folder whose subfolders are the "
            "classes, or a table and --label-column, or leave it out"
        )
    mean, std = moments
    return DataSpec(
        name=short_name(config),
        kind=source.kind,
        shape=tuple(shape[1:]),
        mean=mean.tolist(),
        std=std.tolist(),
        range=source.value_range,
        columns=source.columns,
        clip=clip,
        log_snr_window=log_snr_window(stored_examples(first, mean, std, None)[:], smallest_step(first, std)),
        fingerprint=fingerprint(shape, first.dtype, splits, example_digests, source.classes, source.labels),
        classes=source.classes if config.uses_labels else None,
    )


def _examples_of_arrays(values: NDArray[Any], *rest: NDArray[Any] | None) -> Examples:
    with warnings.catch_warnings():
        # Ray's memory is read-only, and so are examples.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        others = (part if part is None else torch.from_numpy(part) for part in rest)
        return Examples(torch.from_numpy(values), *others)
