"""Data sets: loaded, split and normalised, each split one tensor in memory."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.config import DataConfig
from diffusion.normalisation import denormalise

# The splits must never move between runs, so their seed is not a choice.
_SPLIT_SEED = 20_26


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
        value_step: smallest distance between two data values, in normalised units.
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
    value_step: float
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "DataSpec":
        """Read what `to_dict` wrote, through JSON or not."""
        tuples = {
            name: None if tree[name] is None else tuple(tree[name])
            for name in ("shape", "range", "columns", "clip")
        }
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
    """
    values, kind, value_range, columns = _load_digits() if config.name == "digits" else _load_heart()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(values))
    num_test = round(len(values) * config.test_fraction)
    num_val = round(len(values) * config.val_fraction)
    test, val, train = np.split(values[order], [num_test, num_test + num_val])

    axes = (0, 2, 3) if kind == "image" else (0,)
    mean = train.mean(axis=axes, keepdims=True)[0]
    std = train.std(axis=axes, keepdims=True)[0]
    normalised = [((split - mean) / std).astype(np.float32) for split in (train, val, test)]
    spec = DataSpec(
        name=config.name,
        kind=kind,
        shape=values.shape[1:],
        mean=mean.tolist(),
        std=std.tolist(),
        range=value_range,
        columns=columns,
        clip=_clip_interval(normalised[0], value_range, mean, std),
        value_step=_smallest_step(values, std),
        fingerprint=_fingerprint(values, num_val, num_test),
    )
    return Dataset(spec, *(torch.from_numpy(split) for split in normalised))


_Loaded = tuple[
    NDArray[np.float64], Literal["image", "points"], tuple[float, float] | None, tuple[str, ...] | None
]


def _load_digits() -> _Loaded:
    from sklearn.datasets import load_digits

    return load_digits().images[:, None], "image", (0.0, 16.0), None


def _load_heart() -> _Loaded:
    u = np.random.default_rng(42).uniform(0.0, 2.0 * np.pi, 8000)
    x = 16.0 * np.sin(u) ** 3
    y = 13.0 * np.cos(u) - 5.0 * np.cos(2.0 * u) - 2.0 * np.cos(3.0 * u) - np.cos(4.0 * u)
    return np.stack([x, y], axis=1) / 5.0, "points", None, ("x", "y")


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


def _smallest_step(values: NDArray[np.float64], std: NDArray[np.float64]) -> float:
    """Over all channels or columns; numbers closer than float32 can tell apart count as equal."""
    steps = []
    for channel, scale in zip(np.moveaxis(values, 1, 0), std.ravel(), strict=True):
        gaps = np.diff(np.unique(channel)) / scale
        steps.append(gaps[gaps > 1e-7].min())
    return float(min(steps))


def _fingerprint(values: NDArray[np.float64], num_val: int, num_test: int) -> str:
    digest = hashlib.sha256(repr((values.shape, num_val, num_test, _SPLIT_SEED)).encode())
    digest.update(np.ascontiguousarray(values, dtype="<f8").tobytes())
    return digest.hexdigest()
