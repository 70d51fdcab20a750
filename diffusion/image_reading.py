"""One image file as a square of 8 bits a channel. Needs numpy and Pillow alone."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffusion.errors import InputError

# More than any camera's; what claims to be larger is more likely to be made to exhaust memory.
_MOST_PIXELS = 150_000_000
_DEEP_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N", "F"}
_GREY_MODES = {"1", "L", "LA", "La"} | _DEEP_MODES


@contextmanager
def opened(path: Path, smallest: int | None = None) -> Iterator[Image.Image]:
    """The first frame of an image, loaded.

    Args:
        path: of the file.
        smallest: where the format can be decoded at a fraction of its size (JPEG), use one whose
            sides are still at least this long; by default the whole image.

    Raises:
        InputError: it cannot be read or is too large; also for what goes wrong in the `with` block.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd metadata, which need not stop anyone
            with Image.open(path) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise InputError(
                        f"{path} has {image.width} x {image.height} pixels: remove it or make it smaller"
                    )
                if smallest is not None:
                    image.draft(None, (smallest, smallest))
                image.load()
                yield image
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise whatever their parsing stumbles over
        raise InputError(
            f"{path} cannot be read as an image ({_reason(error)}): mend or remove it, or go on without such "
            "images by --skip-bad-images"
        ) from error


def read_square(path: Path, size: int) -> Image.Image:
    """An image upright, on white, resized by the shorter side and cropped in the middle.

    Of an animation it is the first frame. Grey of more than 8 bits keeps its shades: 16-bit modes are
    divided by 257, wider ones where they reach beyond 255, and floats of at most 1 are taken for shares
    of white.

    Returns:
        size x size pixels, in mode "L" where the file is grey, else "RGB".

    Raises:
        InputError: it cannot be read or is too large.
    """
    with opened(path, 2 * size) as image:
        image = ImageOps.exif_transpose(image)
        grey = image.mode in _GREY_MODES
        if image.mode in _DEEP_MODES:
            image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return ImageOps.fit(image.convert("L" if grey else "RGB"), (size, size), Image.Resampling.LANCZOS)


def channels_of(square: Image.Image) -> int:
    """1 for what `read_square` gives of a grey image, 3 for colour."""
    return 3 if square.mode == "RGB" else 1


def to_array(square: Image.Image, channels: int) -> NDArray[np.uint8]:
    """What `read_square` gives, as uint8 [channels, size, size]; grey as colour has three equal channels."""
    if channels == 1:
        return np.asarray(square.convert("L"))[None]
    return np.ascontiguousarray(np.asarray(square.convert("RGB")).transpose(2, 0, 1))


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are no finite numbers")
    if image.mode == "F" and values.max() <= 1.0:
        values = values * 255.0
    elif image.mode.startswith("I;16") or values.max() > 255.0:
        values = values / 257.0
    return Image.fromarray(values.clip(0.0, 255.0).round().astype(np.uint8))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
