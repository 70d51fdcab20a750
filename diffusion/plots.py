"""Pictures of samples. Needs only numpy and Pillow, so that the exported sampler can use it."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

# Colours and scale of an animation, in the order in which they are tried.
_GIF_SETTINGS = (
    (64, 1.0), (32, 1.0), (32, 0.8), (32, 0.65), (16, 0.65), (16, 0.6), (16, 0.5), (16, 0.35), (8, 0.25),
)  # fmt: skip
_LAST_COLOURS = 64
_NUM_PROBES = 6
_SAMPLES_PER_PICTURE = {"image": 64, "points": 2000}

_DOT_COLOUR = (31, 60, 136)
# The palette of Okabe and Ito, which colour-blind readers can tell apart; classes cycle through it.
_CLASS_COLOURS = [
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (90, 90, 90),
]
_FRAME_COLOUR = (200, 204, 212)
_TEXT_COLOUR = (90, 96, 110)


def samples_per_picture(kind: str, num_classes: int = 0, most: int | None = None) -> int:
    """Number of samples to draw in one picture.

    Args:
        kind: "image" or "points".
        num_classes: number of classes. Every class gets the same number of samples, unless there are more
            classes than samples.
        most: limit on the number; None for none but that of the kind.
    """
    count = min(_SAMPLES_PER_PICTURE[kind], most or _SAMPLES_PER_PICTURE[kind])
    return count // num_classes * num_classes if 0 < num_classes <= count else count


def draw_samples(
    samples: NDArray[np.floating],
    value_range: tuple[float, float] | None,
    limits: tuple[float, float, float, float] | None = None,
    title: str = "",
    num_classes: int = 0,
    columns: int | None = None,
) -> Image.Image:
    """Draw samples in one picture: images as a grid, points as a scatter plot.

    Args:
        samples: [batch, C, H, W] or [batch, D], in data units.
        value_range: smallest and largest possible value of images; None for points.
        limits: (x_min, x_max, y_min, y_max) of a scatter plot; see `scatter`.
        title: title of a scatter plot.
        num_classes: if not 0, sample i belongs to class i % num_classes. Each class has a column of the
            grid (up to 16 classes) or a colour.
        columns: columns of a grid; None: the classes, or as many as make it nearly square.
    """
    if value_range is not None:
        if columns is None and 0 < num_classes <= 16:
            columns = num_classes
        return image_grid(samples, value_range, columns=columns)
    return scatter(samples, limits, title=title, num_classes=num_classes)


# Modes of Pillow by the number of channels.
IMAGE_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


def image_grid(
    images: NDArray[np.floating],
    value_range: tuple[float, float],
    cell: int = 64,
    columns: int | None = None,
) -> Image.Image:
    """Arrange images in a grid, as close to square as possible.

    Args:
        images: [batch, C, H, W] in data units, C = 1 (grey), 3 (colour) or 4 (with alpha).
        value_range: the values drawn as black and as white.
        cell: target side in pixels of small images, which are enlarged by a whole factor with smooth
            interpolation, since an 8x8 digit in hard blocks is difficult to read.
        columns: number of columns; by default about as many as rows.
    """
    low, high = value_range
    pixels = ((images - low) / (high - low) * 255.0).round().clip(0, 255).astype(np.uint8)
    batch, channels, height, width = pixels.shape
    factor = max(1, cell // max(height, width))
    height, width = height * factor, width * factor
    columns = columns or int(np.ceil(np.sqrt(batch)))
    rows = int(np.ceil(batch / columns))
    gap = 4
    mode = IMAGE_CHANNELS[channels]
    canvas = Image.new(mode, (columns * (width + gap) + gap, rows * (height + gap) + gap))
    for index, image in enumerate(np.moveaxis(pixels, 1, -1)):
        tile = Image.fromarray(image[..., 0] if channels == 1 else image)
        corner = (gap + index % columns * (width + gap), gap + index // columns * (height + gap))
        canvas.paste(tile.resize((width, height), Image.Resampling.BICUBIC), corner)
    return canvas


def rows_of_images(
    images: Mapping[str, NDArray[np.floating]], value_range: tuple[float, float], columns: int
) -> Image.Image:
    """Arrange several sets of images in rows that take turns: a row of each set, then the next of each.

    Args:
        images: the sets by their titles, which stand above each row: as many images in each.
        value_range: as for `image_grid`.
        columns: images in a row.
    """
    num_images = len(next(iter(images.values())))
    rows = [
        _titled(image_grid(values[start : start + columns], value_range, columns=columns), title)
        for start in range(0, num_images, columns)
        for title, values in images.items()
    ]
    picture = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    return picture


def _titled(picture: Image.Image, title: str) -> Image.Image:
    """A picture below its title."""
    height = max(12, picture.width // 32)
    titled = Image.new("RGB", (picture.width, picture.height + 3 * height // 2), "white")
    ImageDraw.Draw(titled).text((4, height // 4), title, fill="black", font_size=height)
    titled.paste(picture, (0, 3 * height // 2))
    return titled


def scatter(
    points: NDArray[np.floating],
    limits: tuple[float, float, float, float] | None = None,
    size: int = 480,
    title: str = "",
    num_classes: int = 0,
) -> Image.Image:
    """Scatter plot of the first two columns of points, both axes to the same scale.

    Args:
        points: [batch, D] in data units, D at least 1 (one column is drawn along a line).
        limits: (x_min, x_max, y_min, y_max); by default `plane_limits` of the points.
        size: side of the picture in pixels.
        title: one line above the frame.
        num_classes: if not 0, point i belongs to class i % num_classes and is drawn in its colour.
    """
    plane, finite = _plane(points), np.flatnonzero(_finite(points))
    x_min, x_max, y_min, y_max = plane_limits(plane) if limits is None else limits
    oversampling = 2  # draw at twice the size and reduce, which smooths the dots
    margin, side = 34 * oversampling, size * oversampling
    scale = (side - 2 * margin) / max(x_max - x_min, y_max - y_min)
    canvas = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((margin, margin, side - margin, side - margin), outline=_FRAME_COLOUR, width=oversampling)
    centre = np.array([(x_min + x_max) / 2.0, (y_min + y_max) / 2.0])
    positions = (plane - centre) * [scale, -scale] + side / 2.0
    radius = 1.3 * oversampling
    for index, (x, y) in zip(finite, positions, strict=True):
        if margin <= x <= side - margin and margin <= y <= side - margin:
            colour = _DOT_COLOUR
            if num_classes:
                colour = _CLASS_COLOURS[index % num_classes % len(_CLASS_COLOURS)]
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    canvas = canvas.resize((size, size), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    edge = size - 34
    draw.text((34, 14), title, fill=_TEXT_COLOUR)
    half = (side / 2 - margin) / scale  # the frame is square, whichever axis has the larger range
    draw.text((34, edge + 6), f"{centre[0] - half:.3g}", fill=_TEXT_COLOUR)
    draw.text((edge - 24, edge + 6), f"{centre[0] + half:.3g}", fill=_TEXT_COLOUR)
    draw.text((4, edge - 12), f"{centre[1] - half:.3g}", fill=_TEXT_COLOUR)
    draw.text((4, 34), f"{centre[1] + half:.3g}", fill=_TEXT_COLOUR)
    return canvas


def plane_limits(points: NDArray[np.floating]) -> tuple[float, float, float, float]:
    """Limits (x_min, x_max, y_min, y_max) of points [batch, D] with a margin of 10% on every side.

    Without any finite point they are (-1, 1, -1, 1).
    """
    plane = _plane(points)
    if len(plane) == 0:
        return -1.0, 1.0, -1.0, 1.0
    low, high = plane.min(axis=0), plane.max(axis=0)
    margin = np.maximum((high - low) * 0.1, 1e-6)
    (x_min, y_min), (x_max, y_max) = low - margin, high + margin
    return float(x_min), float(x_max), float(y_min), float(y_max)


def _plane(points: NDArray[np.floating]) -> NDArray[np.floating]:
    """First two columns of the finite points; the second is 0 if points have only one."""
    plane = np.concatenate([points, np.zeros((len(points), 1))], axis=1)[:, :2]
    return plane[_finite(points)]


def _finite(points: NDArray[np.floating]) -> NDArray[np.bool_]:
    return np.isfinite(points[:, :2]).all(axis=1)


def save_animation(
    frames: Sequence[Image.Image],
    path: Path,
    *,
    duration_ms: int = 60,
    hold_ms: int = 1500,
    max_bytes: int = 1_000_000,
) -> None:
    """Write frames as a GIF that loops forever and holds its last frame longer.

    Frames of noise compress badly: colours, and then pixels, are reduced until the file is small enough, in
    steps that keep clean images smooth.

    Args:
        frames: the frames, all of one size.
        path: file to write.
        duration_ms: milliseconds for which each frame is shown.
        hold_ms: milliseconds for which the last frame is shown.
        max_bytes: size of the file that is aimed at; the smallest setting is written in any case.
    """
    durations = [duration_ms] * (len(frames) - 1) + [hold_ms]
    probes = frames[:: max(1, len(frames) // _NUM_PROBES)]
    for setting in _GIF_SETTINGS:
        # A few frames tell about how large all of them will be.
        estimate = len(_gif(probes, durations[: len(probes)], *setting)) * len(frames) / len(probes)
        if estimate > 1.15 * max_bytes and setting != _GIF_SETTINGS[-1]:
            continue
        content = _gif(frames, durations, *setting)
        if len(content) <= max_bytes:
            break
    path.write_bytes(content)


def _gif(frames: Sequence[Image.Image], durations: list[int], colours: int, scale: float) -> bytes:
    """Frames as a GIF, each with its own palette and without dithering, which compresses badly.

    The first half, which is mostly noise, has half the colours; the last frame, which is held, has many.
    """
    width, height = (max(1, round(side * scale)) for side in frames[0].size)
    small = [
        frame if scale == 1.0 else frame.resize((width, height), Image.Resampling.LANCZOS) for frame in frames
    ]
    first_half, rest = [colours // 2] * (len(frames) // 2), len(frames) - len(frames) // 2 - 1
    palette = [
        frame.convert("RGB" if frame.mode == "RGBA" else frame.mode).quantize(
            number, dither=Image.Dither.NONE
        )
        for frame, number in zip(small, [*first_half, *[colours] * rest, _LAST_COLOURS], strict=True)
    ]
    buffer = io.BytesIO()
    palette[0].save(buffer, "GIF", save_all=True, append_images=palette[1:], duration=durations, loop=0)
    return buffer.getvalue()
