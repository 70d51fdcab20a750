"""Pictures of samples with numpy and Pillow alone, so that the exported sampler can draw them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

# How many samples make a picture.
_PICTURED = {"image": 64, "points": 2000}

_INK = (31, 60, 136)
# Of the classes in turn: Okabe and Ito's colours, which most eyes tell apart.
_CLASS_INKS = [
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (90, 90, 90),
]
_FRAME = (200, 204, 212)
_TEXT = (90, 96, 110)


def num_pictured(kind: str, num_classes: int = 0) -> int:
    """How many samples of "image" or "points" make a picture; of each class as many, where there are few."""
    count = _PICTURED[kind]
    return count // num_classes * num_classes if 0 < num_classes <= count else count


def draw_samples(
    samples: NDArray[np.floating],
    value_range: tuple[float, float] | None,
    limits: tuple[float, float, float, float] | None = None,
    title: str = "",
    num_classes: int = 0,
) -> Image.Image:
    """One picture of samples in data units: a grid where they have a range (images), else a scatter.

    Where there are classes, sample i is of class i modulo their number: each class has a column of the
    grid, or a colour.
    """
    if value_range is not None:
        return image_grid(samples, value_range, columns=num_classes if 0 < num_classes <= 16 else None)
    return scatter(samples, limits, title=title, num_classes=num_classes)


def image_grid(
    images: NDArray[np.floating],
    value_range: tuple[float, float],
    cell: int = 64,
    columns: int | None = None,
) -> Image.Image:
    """Images side by side, about as wide as high.

    Args:
        images: [batch, C, H, W] in data units, C = 1 (grey), 3 (colour) or 4 (with alpha).
        value_range: the values shown as black and as white.
        cell: small images are enlarged to about this many pixels, by a whole number and smoothly:
            an eye reads the blocks of an 8x8 digit badly.
        columns: of the grid, if not as many as rows.
    """
    low, high = value_range
    pixels = ((images - low) / (high - low) * 255.0).round().clip(0, 255).astype(np.uint8)
    batch, channels, height, width = pixels.shape
    enlarge = max(1, cell // max(height, width))
    height, width = height * enlarge, width * enlarge
    columns = columns or int(np.ceil(np.sqrt(batch)))
    rows = int(np.ceil(batch / columns))
    gap = 4
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    canvas = Image.new(mode, (columns * (width + gap) + gap, rows * (height + gap) + gap))
    for index, image in enumerate(np.moveaxis(pixels, 1, -1)):
        tile = Image.fromarray(image[..., 0] if channels == 1 else image)
        place = (gap + index % columns * (width + gap), gap + index // columns * (height + gap))
        canvas.paste(tile.resize((width, height), Image.Resampling.BICUBIC), place)
    return canvas


def scatter(
    points: NDArray[np.floating],
    limits: tuple[float, float, float, float] | None = None,
    size: int = 480,
    title: str = "",
    num_classes: int = 0,
) -> Image.Image:
    """Points in the plane of their first two columns, both axes to the same scale.

    Args:
        points: [batch, D] in data units, D at least 1 (one column is drawn along a line).
        limits: (x_min, x_max, y_min, y_max); by default the points with a margin.
        size: side of the picture in pixels.
        title: one line above the frame.
        num_classes: where it is not 0, point i is of class i modulo this, and has its colour.
    """
    plane, finite = _plane(points), np.flatnonzero(_finite(points))
    x_min, x_max, y_min, y_max = plane_limits(plane) if limits is None else limits
    fine = 2  # drawn twice as large and reduced, for smooth dots
    margin, side = 34 * fine, size * fine
    scale = (side - 2 * margin) / max(x_max - x_min, y_max - y_min)
    canvas = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((margin, margin, side - margin, side - margin), outline=_FRAME, width=fine)
    middle = np.array([(x_min + x_max) / 2.0, (y_min + y_max) / 2.0])
    places = (plane - middle) * [scale, -scale] + side / 2.0
    radius = 1.3 * fine
    for index, (x, y) in zip(finite, places, strict=True):
        if margin <= x <= side - margin and margin <= y <= side - margin:
            ink = _CLASS_INKS[index % num_classes % len(_CLASS_INKS)] if num_classes else _INK
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    canvas = canvas.resize((size, size), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    edge = size - 34
    draw.text((34, 14), title, fill=_TEXT)
    half = (side / 2 - margin) / scale  # the frame is as wide as high, whichever axis has the larger range
    draw.text((34, edge + 6), f"{middle[0] - half:.3g}", fill=_TEXT)
    draw.text((edge - 24, edge + 6), f"{middle[0] + half:.3g}", fill=_TEXT)
    draw.text((4, edge - 12), f"{middle[1] - half:.3g}", fill=_TEXT)
    draw.text((4, 34), f"{middle[1] + half:.3g}", fill=_TEXT)
    return canvas


def plane_limits(points: NDArray[np.floating]) -> tuple[float, float, float, float]:
    """(x_min, x_max, y_min, y_max) around points [batch, D] with a margin; (-1, 1, -1, 1) around none."""
    plane = _plane(points)
    if len(plane) == 0:
        return -1.0, 1.0, -1.0, 1.0
    low, high = plane.min(axis=0), plane.max(axis=0)
    margin = np.maximum((high - low) * 0.1, 1e-6)
    (x_min, y_min), (x_max, y_max) = low - margin, high + margin
    return float(x_min), float(x_max), float(y_min), float(y_max)


def _plane(points: NDArray[np.floating]) -> NDArray[np.floating]:
    """The finite points' first two columns; the second is 0 where there is but one."""
    plane = np.concatenate([points, np.zeros((len(points), 1))], axis=1)[:, :2]
    return plane[_finite(points)]


def _finite(points: NDArray[np.floating]) -> NDArray[np.bool_]:
    return np.isfinite(points[:, :2]).all(axis=1)


def save_animation(
    frames: Sequence[Image.Image], path: Path, *, duration_ms: int = 60, hold_ms: int = 1500
) -> None:
    """Write frames as an endless GIF that rests on its last frame."""
    durations = [duration_ms] * (len(frames) - 1) + [hold_ms]
    palette = [frame.convert("P", palette=Image.Palette.ADAPTIVE, colors=64) for frame in frames]
    palette[0].save(path, save_all=True, append_images=palette[1:], duration=durations, loop=0)
