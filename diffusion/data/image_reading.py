"""Reads image files as squares with 8 bits per channel, and reduces images. Needs only numpy and Pillow."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffusion.errors import InputError

# No camera takes larger images: a larger file is probably made to exhaust memory.
_MAX_PIXELS = 150_000_000
_REMEDY = "fix or remove it, or skip such images with --skip-bad-images"
_DEEP_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N", "F"}
_GREY_MODES = {"1", "L", "LA", "La"} | _DEEP_MODES


@contextmanager
def open_image(path: Path, min_side: int | None = None, remedy: str = _REMEDY) -> Iterator[Image.Image]:
    """Open an image file and load its first frame.

    Args:
        path: path of the file.
        min_side: decode formats that allow it (JPEG) at a reduced size, with sides of at least this many
            pixels; by default images are decoded at full size.
        remedy: end of the message if the image cannot be read.

    Raises:
        InputError: the image cannot be read or is too large, or the `with` block raised any error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and odd metadata, which are harmless here
            with Image.open(path) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise InputError(
                        f"{path} has {image.width} x {image.height} pixels: remove it or make it smaller"
                    )
                if min_side is not None:
                    image.draft(None, (min_side, min_side))
                image.load()
                yield image
    except InputError:
        raise
    except Exception as error:  # Pillow's parsers raise all kinds of exceptions on damaged files
        raise InputError(f"{path} cannot be read as an image ({_reason(error)}): {remedy}") from error


def read_square(path: Path, size: int) -> Image.Image:
    """Read an image as a square: the shorter side is resized, the longer one centre-cropped.

    Args:
        path: path of the file.
        size: side of the square in pixels.

    Returns:
        size x size pixels, in mode "L" if the file is grey, else "RGB".

    Raises:
        InputError: the image cannot be read or is too large.
    """
    with open_image(path, 2 * size) as image:
        return ImageOps.fit(upright(image), (size, size), Image.Resampling.LANCZOS)


def read_pixels(path: Path) -> Image.Image:
    """Read an image at its own size, otherwise as `read_square` does.

    Raises:
        InputError: the image cannot be read or is too large.
    """
    with open_image(path, remedy="give another image") as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """Convert an image to mode "L" if it is grey, else to "RGB".

    Images are turned upright by their EXIF orientation, transparent pixels become white, and of an
    animation only the first frame is read. Grey images of more than 8 bits are scaled to 8 bits: 16-bit
    modes are divided by 257, 32-bit modes only if they have values above 255, and floats of at most 1 are
    multiplied by 255.

    Raises:
        ValueError: a pixel is not a finite number; Pillow raises other exceptions if it cannot decode them.
    """
    image = ImageOps.exif_transpose(image)
    grey = image.mode in _GREY_MODES
    if image.mode in _DEEP_MODES:
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def channels_of(square: Image.Image) -> int:
    """Number of channels of an image from `read_square`: 1 for grey, 3 for colour."""
    return 3 if square.mode == "RGB" else 1


def to_array(square: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Convert an image from `read_square` to an array.

    Args:
        square: the image, in mode "L" or "RGB".
        channels: 1, or 3; a grey image then gets three equal channels.

    Returns:
        uint8 [channels, size, size].
    """
    if channels == 1:
        return np.asarray(square.convert("L"))[None]
    return np.ascontiguousarray(np.asarray(square.convert("RGB")).transpose(2, 0, 1))


def reduced(images: NDArray[Any], side: int, value_range: Sequence[float]) -> NDArray[Any]:
    """Images with a side of fewer pixels, as Pillow's Lanczos filter makes them.

    Args:
        images: [examples, C, H, W], in data units.
        side: side of the result.
        value_range: smallest and largest value, to which the result is clipped.

    Returns:
        [examples, C, side, side]; if all images are whole numbers, so is the result.
    """
    down, across = (reduction_matrix(size, side) for size in images.shape[-2:])
    values = np.empty((*images.shape[:2], side, side), dtype=images.dtype)
    is_whole = images.dtype.kind in "iu" or bool((np.rint(images) == images).all())
    for index, image in enumerate(images):  # all at a time would need the memory of float64
        result = (down @ image @ across.T).clip(*value_range)
        values[index] = np.rint(result) if is_whole else result
    return values


def reduction_matrix(size: int, side: int) -> NDArray[np.float64]:
    """Weights [side, size] of the old pixels of a line in the new ones, by Pillow's Lanczos filter."""
    identity = Image.fromarray(np.eye(size, dtype=np.float32))
    return np.asarray(identity.resize((size, side), Image.Resampling.LANCZOS), dtype=np.float64)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers")
    if image.mode == "F" and values.max() <= 1.0:
        values = values * 255.0
    elif image.mode.startswith("I;16") or values.max() > 255.0:
        values = values / 257.0
    return Image.fromarray(values.clip(0.0, 255.0).round().astype(np.uint8))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
