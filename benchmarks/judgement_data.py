"""Data of `benchmarks.judgement`: what a sweep gets, and fresh examples from the same law for the truth."""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.data.named import heart_curve

# As many fresh rows that the truth's own error is small beside the differences between trained models.
NUM_ROWS, NUM_FRESH_ROWS = 8_000, 10_000
_SIDE = 14
_NUM_PICTURES, _NUM_FRESH_PICTURES = 3_500, 3_000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class JudgedData:
    """Data of one comparison.

    Attributes:
        path: what the sweep reads: a table, or a folder of images.
        fresh: [examples, ...] examples in data units that no sweep has seen.
        other: uint8 images and their labels for fitting a classifier; None for points.
    """

    path: Path
    fresh: NDArray[np.generic]
    other: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None


def heart(rng: np.random.Generator, count: int) -> Array:
    """A curve without thickness."""
    return np.array([heart_curve(u) for u in rng.uniform(0.0, 2.0 * np.pi, count).tolist()]) / 5.0


def rings(rng: np.random.Generator, count: int) -> Array:
    """Three thin rings of 60, 38 and 2% of the points, the last one small and apart."""
    which = rng.choice(3, count, p=[0.6, 0.38, 0.02])
    radius = np.array([3.0, 1.5, 0.3])[which] + 0.02 * rng.standard_normal(count)
    angle = rng.uniform(0.0, 2.0 * np.pi, count)
    return np.stack([radius * np.cos(angle) + 5.0 * (which == 2), radius * np.sin(angle)], axis=1)


def pinwheel(rng: np.random.Generator, count: int) -> Array:
    """Five bent blades with noise."""
    blade = rng.standard_normal((count, 2)) * [0.3, 0.05] + [1.0, 0.0]
    angle = rng.integers(0, 5, count) * 2.0 * np.pi / 5.0 + 0.25 * np.exp(blade[:, 0])
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([blade[:, 0] * cos - blade[:, 1] * sin, blade[:, 0] * sin + blade[:, 1] * cos], axis=1)


def checkerboard(rng: np.random.Generator, count: int) -> Array:
    """Eight squares with sharp edges."""
    x = rng.uniform(-2.0, 2.0, count)
    y = rng.random(count) - 2.0 * rng.integers(0, 2, count)
    return np.stack([x, y + np.floor(x) % 2], axis=1)


def student(rng: np.random.Generator, count: int) -> Array:
    """Heavy tails: Student's t with 2 degrees of freedom, in two correlated columns."""
    normal = rng.standard_normal((count, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    return normal / np.sqrt(rng.chisquare(2.0, (count, 1)) / 2.0)


def solid(rng: np.random.Generator, count: int) -> Array:
    """A thin ring, an arc and two blobs of 48, 30, 20 and 2% of the points in three dimensions."""
    which = rng.choice(4, count, p=[0.48, 0.30, 0.20, 0.02])
    u = rng.uniform(0.0, 2.0 * np.pi, count)
    parts = np.stack(
        [
            np.stack([2.0 * np.cos(u), 2.0 * np.sin(u), np.zeros(count)], axis=1),
            np.stack([np.zeros(count), np.cos(u / 2.0), 2.0 + np.sin(u / 2.0)], axis=1),
            np.tile([0.0, 0.0, -2.0], (count, 1)),
            np.tile([3.0, 3.0, 3.0], (count, 1)),
        ]
    )
    noise = np.array([0.02, 0.05, 0.4, 0.1])[which, None] * rng.standard_normal((count, 3))
    return parts[which, np.arange(count)] + noise


def table(rng: np.random.Generator, count: int) -> Array:
    """Seven correlated columns: normal, skewed and two-peaked ones, mixed by a fixed matrix."""
    normal = rng.standard_normal((count, 3))
    skewed = np.exp(0.7 * rng.standard_normal((count, 2)))
    peaks = np.where(rng.random((count, 2)) < 0.3, -1.5, 1.0) + 0.2 * rng.standard_normal((count, 2))
    mixing = np.random.default_rng(7).standard_normal((7, 7)) / 2.0 + np.eye(7)
    return np.concatenate([normal, skewed, peaks], axis=1) @ mixing


POINTS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "heart": heart,
    "rings": rings,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
    "student": student,
    "solid": solid,
    "table": table,
}
PICTURES = ("digits", "mnist", "colours")
NAMES = (*POINTS, *PICTURES)


def prepare(name: str, folder: Path, mnist: Path | None) -> JudgedData:
    """Make the data of one comparison, or find those made before.

    Args:
        name: one of `NAMES`.
        folder: where the sweep's part is written.
        mnist: folder of handwritten digits, one subfolder a class, for "mnist" and "colours".
    """
    if name in POINTS:
        path = folder / f"{name}.npy"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            np.save(path, POINTS[name](np.random.default_rng(1), NUM_ROWS))
        return JudgedData(path, POINTS[name](np.random.default_rng(2), NUM_FRESH_ROWS))
    images, labels = _eight_by_eight() if name == "digits" else _handwritten(mnist, folder)
    if name == "colours":
        images = coloured(images, np.random.default_rng(3))
    count = 1_200 if name == "digits" else _NUM_PICTURES
    path = folder / name
    if not path.exists():
        _write(images[:count], labels[:count], path)
    fresh = images[count : count + _NUM_FRESH_PICTURES]
    other = slice(None, count) if name == "digits" else slice(count + _NUM_FRESH_PICTURES, None)
    return JudgedData(path, fresh, (images[other], labels[other]))


def coloured(grey: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images in colour: strokes of a random hue on a darker ground of another.

    Args:
        grey: uint8 [images, 1, H, W].
        rng: draws the hues.

    Returns:
        uint8 [images, 3, H, W].
    """
    hues = rng.random((2, len(grey)))
    stroke, ground = (np.array([colorsys.hsv_to_rgb(hue, 1.0, 1.0) for hue in each]) for each in hues)
    ink = grey / 255.0
    mixed = ink * stroke[:, :, None, None] + (1.0 - ink) * 0.25 * ground[:, :, None, None]
    return (255.0 * mixed).round().astype(np.uint8)


def _eight_by_eight() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images = (digits.images[order, None] * (255.0 / 16.0)).round().astype(np.uint8)
    return images, digits.target[order].astype(np.int64)


def _handwritten(mnist: Path | None, folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Digits of 14x14 pixels in random order; kept as one file, since reading 10,000 takes a while."""
    cache = folder / "mnist.npz"
    if not cache.exists():
        if mnist is None:
            raise SystemExit("mnist and colours need --mnist FOLDER, with one subfolder a digit")
        files = sorted(mnist.glob("*/*"))
        order = np.random.default_rng(0).permutation(len(files))
        images, labels = [], []
        for index in order:
            with Image.open(files[index]) as image:
                images.append(np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)))
            labels.append(int(files[index].parent.name))
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(cache, images=np.stack(images)[:, None], labels=np.array(labels))
    with np.load(cache) as arrays:
        return arrays["images"], arrays["labels"]


def _write(images: NDArray[np.uint8], labels: NDArray[np.int64], path: Path) -> None:
    for label in np.unique(labels):
        (path / str(label)).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(pixels).save(path / str(label) / f"{index:05d}.png")
