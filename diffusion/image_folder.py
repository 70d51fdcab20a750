"""A folder of images of any kind as one array. Needs numpy and Pillow alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffusion.errors import InputError

# More than any camera's; what claims to be larger is more likely to be made to exhaust memory.
_MOST_PIXELS = 150_000_000
_GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"}
_LARGEST_DEFAULT_SIZE = 64


def image_files(folder: Path) -> list[Path]:
    """Every image file below a folder, by Pillow's suffixes, in the order of their paths.

    Raises:
        InputError: none is there, or a symbolic link leads out of the folder.
    """
    suffixes = set(Image.registered_extensions())
    root = folder.resolve()
    found = []
    for path in _walk(folder):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if not path.resolve().is_relative_to(root):
            raise InputError(
                f"{path} is a link out of {folder}: copy the image into the folder, or remove the link"
            )
        found.append(path)
    if not found:
        raise InputError(f"{folder} holds no images: give a folder with files such as .png or .jpg")
    return sorted(found)


def default_image_size(folder: Path) -> int:
    """The shorter side of the folder's first image that can be read, at most 64.

    Raises:
        InputError: there is none.
    """
    for path in image_files(folder):
        with suppress(InputError), _opened(path) as image:
            return min(*image.size, _LARGEST_DEFAULT_SIZE)
    raise InputError(f"{folder}: not one of its images can be read")


def load_image_folder(folder: Path, image_size: int | None, skip_bad: bool) -> NDArray[np.uint8]:
    """Load a folder's images, resized by the shorter side and cropped in the middle.

    Transparent pixels become white. The result is grey where every image is.

    Args:
        folder: images at any depth.
        image_size: side in pixels, at least 8; by default `default_image_size`.
        skip_bad: leave out what cannot be read instead of refusing the folder.

    Returns:
        uint8 [images, 1 or 3, image_size, image_size].

    Raises:
        InputError: no images, one that cannot be read, is too large or lies outside the folder.
    """
    size = image_size or default_image_size(folder)
    if size < 8:
        raise InputError(f"--image-size {size}: give 8 or more")
    squares = []
    for path in image_files(folder):
        try:
            with _opened(path) as image:
                squares.append(_square(image, size))
        except InputError:
            if not skip_bad:
                raise
    if not squares:
        raise InputError(f"{folder}: not one of its images can be read")
    colour = any(square.mode == "RGB" for square in squares)
    pixels = np.stack([np.asarray(square.convert("RGB" if colour else "L")) for square in squares])
    return pixels.transpose(0, 3, 1, 2) if colour else pixels[:, None]


def _walk(folder: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(folder):
        yield from (Path(directory) / name for name in names)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise InputError(
                    f"{path} has {image.width} x {image.height} pixels: remove it or make it smaller"
                )
            image.load()
            yield image
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as an image ({reason}): mend or remove it, or go on without such images "
            "by --skip-bad-images"
        ) from error


def _square(image: Image.Image, size: int) -> Image.Image:
    """Upright, on white, size x size; grey stays grey."""
    image = ImageOps.exif_transpose(image)
    grey = image.mode in _GREY_MODES
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        # 16-bit grey is kept in wider modes; what reaches beyond 8 bits is scaled down by 257.
        values = values / 257.0 if values.max() > 255.0 else values
        image = Image.fromarray(values.clip(0.0, 255.0).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return ImageOps.fit(image.convert("L" if grey else "RGB"), (size, size), Image.Resampling.LANCZOS)
