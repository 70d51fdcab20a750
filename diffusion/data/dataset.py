"""Data sets: loading, splitting, and normalisation on access."""

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, Protocol, Self, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.config import DataConfig
from diffusion.data.sources import DatasetInfo, DataSource, open_source
from diffusion.data.splits import SplitIndices, digests, fingerprint, split_indices
from diffusion.errors import InputError
from diffusion.json_values import check_types, fits, short_repr
from diffusion.normalisation import (
    check_description,
    clip_interval,
    denormalise,
    pixel_moments,
    pixel_sums,
    rounding,
    smallest_step,
    value_moments,
)
from diffusion.process.given import DataUnits

# Fields of DataSpec that JSON turns into lists.
_TUPLE_FIELDS = ("shape", "range", "columns", "clip", "log_snr_window", "classes")
# Limits of what the log-SNR window is fitted to: examples, and values (2**28 are 1 GiB as float32).
MAX_WINDOW_EXAMPLES, MAX_WINDOW_VALUES = 10_000, 2**28
_LATEST_END = 9.0  # of the window, in log-SNR
# Limits of the kernel density estimate: examples whose likelihood counts, and neighbours of each.
_MAX_DETAIL_QUERIES, _MAX_DETAIL_NEIGHBOURS = 512, 1000


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Description of a data set that is stored with a model, to interpret its inputs and outputs.

    Attributes:
        name: name of the data set.
        kind: "image" or "points".
        shape: shape of one example, (C, H, W) or (D,).
        mean, std: nested lists that broadcast against `shape`; data = x * std + mean.
        range: smallest and largest possible value in data units (images), or None (points).
        columns: names of the coordinates (points), or None (images).
        clip: interval that contains every clean example, in normalised units.
        log_snr_window: interval of log-SNR over which `val/elbo_window` is integrated.
        fingerprint: sha256 of the data, their labels and their split.
        classes: class names, indexed by label, if models of these data are conditional, else None.
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
        """Number of classes, which is also the null label; 0 if models are unconditional."""
        return len(self.classes or ())

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict of plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "DataSpec":
        """Read a dict that `to_dict` wrote, directly or from JSON; older files lack "classes".

        Raises:
            InputError: a value is missing, has another type, or contradicts another one.
        """
        tree = {"classes": None, **tree}
        check_types(tree, _hints(), "data.")
        if missing := set(_hints()) - set(tree):
            raise InputError(f"data.{min(missing)} is missing")
        try:
            check_description(tree)
        except ValueError as error:
            raise InputError(f"data: {error}") from error
        tuples = {name: None if tree[name] is None else tuple(tree[name]) for name in _TUPLE_FIELDS}
        return cls(**{**tree, **tuples})

    @property
    def units(self) -> DataUnits:
        """Units of the data."""
        return DataUnits(self.shape, self.mean, self.std, self.range)

    def denormalise(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """Convert normalised [batch, *shape] to data units; images are clipped to their range."""
        return denormalise(x, self.mean, self.std, self.range)


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(DataSpec)


@dataclass(frozen=True, eq=False)
class Split:
    """Examples of a split in memory; images stay uint8 and are normalised on access.

    Attributes:
        values: [N, *shape], either uint8 or float32 that is already normalised.
        mean, std: float32 that broadcast against `values`; None if `values` are already normalised.
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
        """Device that holds the examples."""
        return self.values.device

    def to(self, device: str | torch.device) -> "Split":
        """Copy the split to a device."""
        rest = (part if part is None else part.to(device) for part in (self.mean, self.std, self.labels))
        return Split(self.values.to(device), *rest)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The examples at an index, float32 and normalised; an index tensor may be on any device."""
        if isinstance(index, Tensor):  # the host does not wait for the copy to a GPU
            index = index.to(self.values.device, non_blocking=True)
        return self.normalised(self.values[index])

    def normalised(self, values: Tensor) -> Tensor:
        """Normalise values that have the dtype, shape and device of `self.values`, to float32."""
        return values if self.mean is None or self.std is None else (values - self.mean) / self.std

    def batches(self, indices: Iterator[Tensor]) -> Generator[Tensor, None, None]:
        """Yield `self[index]` for each index tensor."""
        for index in indices:
            yield self[index]

    def __reduce__(self) -> Any:
        """Pickle as numpy arrays on the CPU, which Ray stores once per machine, shared by all processes."""
        parts = (self.values, self.mean, self.std, self.labels)
        return _split_from_arrays, tuple(part if part is None else part.cpu().numpy() for part in parts)


class TrainingSplit(Protocol):
    """Interface of the training examples, whether they are in memory or streamed from disk."""

    @property
    def labels(self) -> Tensor | None:
        """int64 [N], or None."""

    @property
    def device(self) -> torch.device:
        """Device of the examples that indexing and `batches` return."""

    def __len__(self) -> int: ...

    def to(self, device: str | torch.device) -> Self:
        """A copy that returns examples on a device."""

    def __getitem__(self, index: slice) -> Tensor:
        """The first examples, float32 and normalised; the slice must start at 0 and have step 1."""

    def batches(self, indices: Iterator[Tensor]) -> Generator[Tensor, None, None]:
        """Yield the examples of each index tensor, float32 and normalised.

        Args:
            indices: int64 tensors on any device; may be infinite. They may be consumed far ahead of the
                batches, so they must not share a random generator with the code that uses the batches.
        """


@dataclass(frozen=True)
class Dataset:
    """The three splits of a data set and their description."""

    spec: DataSpec
    train: TrainingSplit
    val: Split
    test: Split

    def to(self, device: str | torch.device) -> "Dataset":
        """Copy all splits to a device."""
        splits = (self.train.to(device), self.val.to(device), self.test.to(device))
        return Dataset(self.spec, *splits)

    def raw(self, examples: Tensor) -> NDArray[np.float64]:
        """Convert normalised examples to data units."""
        return self.spec.denormalise(examples.cpu().numpy())


def load_dataset(config: DataConfig) -> Dataset:
    """Open the data that a config names and load them, see `load_source`."""
    return load_source(open_source(config))


def load_source(source: DataSource, notify: Callable[[str], None] = lambda line: None) -> Dataset:
    """Load data into memory, split them, and fit the normalisation to the training split.

    The split is drawn by a fixed seed, unless the data have one of their own, see `splits.split_indices`.

    Images are normalised per channel, points per column. `memory_limit_gb` is ignored here; see
    `workflows.data.streamed_dataset.load_dataset`.

    Args:
        source: the opened data.
        notify: receives lines about the split that the user should read.

    Raises:
        InputError: the data cannot be read, there are too few examples for three splits, or a column is
            constant.
        ValueError: the source gives another kind of data than it says.
    """
    config, raw = source.config, source.load()
    if raw.kind != source.kind:
        raise ValueError(
            f"{type(source).__name__} has kind {source.kind} but loads {raw.kind}: "
            "images have a value_range, points have none"
        )
    if config.super_resolution is not None and raw.values.shape[2:] != (config.image_side, config.image_side):
        height, width = raw.values.shape[2:]
        raise InputError(
            f"--super-resolution {config.super_resolution}: --data {config.name} has images of "
            f"{height}x{width} pixels; give images of the second size, and square"
        )
    values = raw.values
    example_digests = list(digests(values))
    splits = split_indices(
        len(values),
        math.prod(values.shape[1:]),
        config,
        sides=raw.sides,
        groups=raw.groups,
        example_digests=example_digests,
    )
    for note in (*raw.notes, *splits.notes):
        notify(f"--data {config.name}: {note}")
    train = values[splits.train]
    if values.dtype == np.uint8:
        mean, std = pixel_moments(pixel_sums(train), math.prod(values.shape[2:]))
    else:
        mean, std = value_moments(train)
    check_std(config, raw.columns, std, rounding(train))

    def split_of(examples: NDArray[Any], indices: NDArray[np.int64]) -> Split:
        return make_split(examples, mean, std, None if raw.labels is None else raw.labels[indices])

    train_split = split_of(train, splits.train)
    spec = make_spec(
        source,
        raw,
        values.shape,
        splits,
        example_digests,
        (mean, std),
        clip_interval(train_split.values.numpy(), raw.value_range, mean, std),
        train[: num_window_examples(values.shape[1:])],
    )
    val, test = (split_of(values[indices], indices) for indices in (splits.val, splits.test))
    return Dataset(spec, train_split, val, test)


def num_window_examples(shape: Sequence[int]) -> int:
    """Number of training examples, of a given shape, that the log-SNR window is fitted to."""
    return max(1, min(MAX_WINDOW_EXAMPLES, MAX_WINDOW_VALUES // math.prod(shape)))


def make_split(
    values: NDArray[Any],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    labels: NDArray[np.int64] | None,
) -> Split:
    """Make a split of examples in data units: uint8 is stored unchanged, all else as normalised float32."""
    label_tensor = None if labels is None else torch.from_numpy(labels)
    if values.dtype == np.uint8:
        mean_tensor, std_tensor = (torch.from_numpy(each.astype(np.float32)) for each in (mean, std))
        return Split(torch.from_numpy(values), mean_tensor, std_tensor, label_tensor)
    with np.errstate(over="ignore"):
        normalised = ((values - mean) / std).astype(np.float32)
    if np.isinf(normalised).any():
        example = np.argwhere(np.isinf(normalised))[0]
        raise InputError(
            f"the data hold the value {values[tuple(example)]:g}, far larger than others, and cannot be "
            "normalised with it: leave its example out"
        )
    return Split(torch.from_numpy(normalised), labels=label_tensor)


def check_std(
    config: DataConfig,
    columns: Sequence[str] | None,
    std: NDArray[np.float64],
    rounding: NDArray[np.float64] | float = 0.0,
) -> None:
    """Check that the data can be normalised.

    Args:
        config: name of the data, for the message.
        columns: names of the columns of points, or None.
        std: standard deviation of each column or channel.
        rounding: the largest difference between values of each that rounding can make.

    Raises:
        InputError: a column or channel is constant, or its values overflow in the standard deviation.
    """
    for index, (value, limit) in enumerate(np.broadcast(std.ravel(), np.ravel(rounding))):
        name = f"column {columns[index]}" if columns else f"channel {index} of the images"
        if value <= limit:
            only = "" if value == 0.0 else ", apart from rounding"
            raise InputError(f"--data {config.name}: {name} has one value only{only}; leave it out")
        if not value <= np.finfo(np.float32).max:
            raise InputError(
                f"--data {config.name}: {name} has values too large to work with; scale them down"
            )


def make_spec(
    source: DataSource,
    info: DatasetInfo,
    shape: Sequence[int],
    splits: SplitIndices,
    example_digests: Iterable[bytes],
    moments: tuple[NDArray[np.float64], NDArray[np.float64]],
    clip: tuple[float, float],
    window_examples: NDArray[Any],
) -> DataSpec:
    """Build the description of a data set, whether it is in memory or streamed from disk.

    Args:
        source: name of the data, and whether models are conditional.
        info: value range, columns and classes of the data.
        shape: shape of the array of all examples, (examples, ...).
        splits: the indices of each split.
        example_digests: digest of each example's values, see `splits.digests`.
        moments: mean and standard deviation of the training split.
        clip: interval that contains every clean example, in normalised units.
        window_examples: the first `num_window_examples` examples of the training split, in data units.

    Raises:
        InputError: the config asks for a conditional model, and the data have no classes; or a model with
            this description could not be read again, see `DataSpec.from_dict`.
    """
    config = source.config
    if config.uses_labels and info.classes is None:
        raise InputError(
            f"--conditional: --data {config.name} has no classes; give a folder whose subfolders are the "
            "classes, or a table and --label-column, or leave it out"
        )
    classes = info.classes if config.uses_labels else None
    for kind, names in (("class", classes), ("column", info.columns)):
        if odd := [name for name in names or () if not fits(name, str)]:
            raise InputError(
                f"--data {config.name}: the name of the {kind} {short_repr(odd[0])} is not text in UTF-8: "
                "rename it"
            )
    mean, std = moments
    spec = DataSpec(
        name=source.name,
        kind=info.kind,
        shape=tuple(shape[1:]),
        mean=mean.tolist(),
        std=std.tolist(),
        range=info.value_range,
        columns=info.columns,
        clip=clip,
        log_snr_window=log_snr_window(
            make_split(window_examples, mean, std, None)[:], smallest_step(window_examples, std)
        ),
        fingerprint=fingerprint(
            shape, window_examples.dtype, splits, example_digests, info.classes, info.labels
        ),
        classes=classes,
    )
    try:
        DataSpec.from_dict(spec.to_dict())
    except InputError as error:
        raise InputError(
            f"--data {config.name}: no model could be stored with these data ({error}): scale them, or leave "
            "out what is odd"
        ) from error
    return spec


def _split_from_arrays(values: NDArray[Any], *rest: NDArray[Any] | None) -> Split:
    with warnings.catch_warnings():
        # Arrays in Ray's object store are read-only, and examples are never written to.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        others = (part if part is None else torch.from_numpy(part) for part in rest)
        return Split(torch.from_numpy(values), *others)


def log_snr_window(x_0: Tensor, value_step: float) -> tuple[float, float]:
    """Interval of log-SNR over which `val/elbo_window` is integrated; both ends follow from the data alone.

    The lower end is min(-8, ln(0.05 / largest eigenvalue of E[x_0 x_0^T])): there, noise dominates even the
    direction of largest variance. The upper end is the log-SNR whose noise is as fine as the detail that
    the examples determine, see `detail_log_snr`, or as the rounding of the data, -ln(value_step^2 / 12), or
    9, whichever is smallest: no later end has been shown to rank models well.

    Errors at less noise hardly change samples, but would dominate the differences between models; a window
    that ends at more noise is blind to detail that samples show. No constant does for all data: thin rings
    need 9, and images of digits 1 to 3. `benchmarks/judgement.py` compares ends.

    Args:
        x_0: training data in normalised units, [examples, ...].
        value_step: smallest distance between data values, in normalised units.

    Returns:
        Lower and upper end of the interval.
    """
    flat = x_0.flatten(1)
    largest = _largest_singular_value(flat) ** 2 / len(flat)
    rounding = float(-np.log(value_step**2 / 12.0))
    return min(-8.0, float(np.log(0.05 / largest))), min(detail_log_snr(flat), rounding, _LATEST_END)


@torch.no_grad()
def detail_log_snr(examples: Tensor) -> float:
    """The log-SNR at which examples say most about others: that of the best Gaussian kernel density estimate.

    With noise of variance exp(-log_snr), relative to the signal, the examples' own density is a kernel
    density estimate of that bandwidth. By the I-MMSE relation its log likelihood for other examples rises
    with the log-SNR for as long as the denoiser that knows just these examples is better than none, and
    falls beyond: there, examples no longer tell how to denoise others. The likelihood is that of each
    example without itself. Examples that equal it, and the twentieth of all that lie farthest from their
    neighbours, are left out: a single outlier would otherwise demand a wide kernel.

    Args:
        examples: [examples, dimensions], normalised.

    Returns:
        The log-SNR, in steps of a quarter; infinity if no two examples differ.

    Source: leave-one-out likelihood of kernel density estimates (Duin, IEEE Trans. Computers C-25, 1976);
    I-MMSE relation, arXiv:cs/0412108, Theorem 1.
    """
    queries, dim = examples[:_MAX_DETAIL_QUERIES], examples.shape[1]
    # The faster formula of cdist loses the distances of close points, of which images have none.
    mode = "donot_use_mm_for_euclid_dist" if dim <= 64 else "use_mm_for_euclid_dist"
    squared = torch.cdist(queries, examples, compute_mode=mode).double().square()
    squared.fill_diagonal_(math.inf)
    squared[squared == 0.0] = math.inf
    nearest = squared.topk(min(_MAX_DETAIL_NEIGHBOURS, len(examples)), largest=False).values
    nearest = nearest[nearest[:, 0].isfinite()]
    if not len(nearest):
        return math.inf
    nearest = nearest[nearest[:, 0] <= nearest[:, 0].quantile(0.95)]
    finest = -math.log(float(nearest[:, 0].median()) / dim)
    # From kernels far wider than the distance between neighbours to ones finer than it.
    log_snr = np.arange(math.floor(finest) - 16.0, math.ceil(finest) + 4.0, 0.25)
    first, beyond = float(nearest[:, 0].mean()), nearest - nearest[:, :1]
    likelihood = []
    for value in log_snr:
        exponents = (beyond * (-0.5 * math.exp(value))).clamp_(min=-80.0)  # exp is slow where it underflows
        kernels = exponents.exp_().sum(dim=1)
        likelihood.append(float(kernels.log().mean()) - 0.5 * math.exp(value) * first + 0.5 * dim * value)
    return float(log_snr[np.argmax(likelihood)])


def _largest_singular_value(matrix: Tensor) -> float:
    if matrix.shape[1] <= 1024:
        return float(torch.linalg.eigvalsh(matrix.T.double() @ matrix.double())[-1].sqrt())
    # A full decomposition would be too large. The random start must not advance the caller's generator.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float(torch.svd_lowrank(matrix, q=8, niter=8)[1][0])
