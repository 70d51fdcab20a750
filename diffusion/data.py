"""Data sets: loaded, split and normalised, each split one tensor in memory."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.config import DataConfig
from diffusion.errors import InputError
from diffusion.likelihood import log_snr_window
from diffusion.normalisation import denormalise
from diffusion.sources import load_raw, short_name

# The splits must never move between runs, so their seed is not a choice.
_SPLIT_SEED = 20_26
_FEWEST = 4  # examples of a split: fewer have no covariance to speak of
_TUPLES = ("shape", "range", "columns", "clip", "log_snr_window")


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
        fingerprint: sha256 over the data and their split.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "DataSpec":
        """Read what `to_dict` wrote, through JSON or not."""
        tuples = {name: None if tree[name] is None else tuple(tree[name]) for name in _TUPLES}
        return cls(**{**tree, **tuples})

    def denormalise(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """Normalised [batch, *shape] to data units, images clipped to their range."""
        return denormalise(x, self.mean, self.std, self.range)


@dataclass(frozen=True)
class Dataset:
    """Three splits in normalised units, float32 [examples, *shape], and what describes them."""

    spec: DataSpec
    train: Tensor
    val: Tensor
    test: Tensor

    def to(self, device: str | torch.device) -> "Dataset":
        """The same on another device."""
        return Dataset(self.spec, *(split.to(device) for split in (self.train, self.val, self.test)))

    def raw(self, split: Tensor) -> NDArray[np.float64]:
        """A split in data units."""
        return self.spec.denormalise(split.cpu().numpy())


def load_dataset(config: DataConfig) -> Dataset:
    """Load, split by a fixed seed, and normalise by the training split's mean and deviation.

    Images are normalised per channel, points per column.

    Raises:
        InputError: the data cannot be read, are too few for three splits, or a column is constant.
    """
    raw = load_raw(config)
    values = raw.values
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(values))
    num_test = round(len(values) * config.test_fraction)
    num_val = round(len(values) * config.val_fraction)
    if min(num_test, num_val, len(values) - num_test - num_val) < _FEWEST:
        raise InputError(
            f"--data {config.name} has {len(values)} examples: too few for three splits of at least {_FEWEST}"
        )
    test, val, train = np.split(values[order], [num_test, num_test + num_val])

    axes = (0, 2, 3) if raw.kind == "image" else (0,)
    mean = train.mean(axis=axes, keepdims=True, dtype=np.float64)[0]
    std = train.std(axis=axes, keepdims=True, dtype=np.float64)[0]
    if not (std > 0.0).all():
        constant = int(np.flatnonzero(std.ravel() == 0.0)[0])
        name = raw.columns[constant] if raw.columns else f"channel {constant}"
        raise InputError(f"--data {config.name}: {name} has one value only; leave it out")
    normalised = [((split - mean) / std).astype(np.float32) for split in (train, val, test)]
    step = _smallest_step(values, std)
    spec = DataSpec(
        name=short_name(config),
        kind=raw.kind,
        shape=values.shape[1:],
        mean=mean.tolist(),
        std=std.tolist(),
        range=raw.value_range,
        columns=raw.columns,
        clip=_clip_interval(normalised[0], raw.value_range, mean, std),
        log_snr_window=log_snr_window(torch.from_numpy(normalised[0]), step),
        fingerprint=_fingerprint(values, num_val, num_test),
    )
    return Dataset(spec, *(torch.from_numpy(split) for split in normalised))


def _clip_interval(
    train: NDArray[np.float32],
    value_range: tuple[float, float] | None,
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
) -> tuple[float, float]:
    if value_range is not None:
        ends = (np.array(value_range)[:, None] - mean.ravel()) / std.ravel()
        return float(ends.min()), float(ends.max())
    low, high = float(train.min()), float(train.max())
    margin = 0.05 * (high - low) / 2.0
    return low - margin, high + margin


def _smallest_step(values: NDArray[Any], std: NDArray[np.float64]) -> float:
    """Over all channels or columns; numbers closer than float32 can tell apart count as equal."""
    steps = []
    for channel, scale in zip(np.moveaxis(values, 1, 0), std.ravel(), strict=True):
        gaps = np.diff(np.unique(channel).astype(np.float64)) / scale
        steps.append(gaps[gaps > 1e-7].min())
    return float(min(steps))


def _fingerprint(values: NDArray[Any], num_val: int, num_test: int) -> str:
    digest = hashlib.sha256(repr((values.shape, num_val, num_test, _SPLIT_SEED)).encode())
    for some in np.array_split(values, max(1, len(values) // 4096)):  # not all as float64 at once
        digest.update(np.ascontiguousarray(some, dtype="<f8").tobytes())
    return digest.hexdigest()
