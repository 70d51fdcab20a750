"""A folder of images of any kind: its files, their classes, all of them as one array."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import InputError
from diffusion.image_reading import channels_of, opened, read_square, to_array

_LARGEST_DEFAULT_SIZE = 64


@dataclass(frozen=True, eq=False)
class FolderImages:
    """A folder's images.

    Attributes:
        pixels: uint8 [images, 1 or 3, size, size].
        class_names: of each image, or None; see `class_names`.
    """

    pixels: NDArray[np.uint8]
    class_names: list[str] | None


def image_files(folder: Path) -> list[Path]:
    """Every image file below a folder, by the suffixes that Pillow reads, in the order of their paths.

    Hidden files and folders are passed over.

    Raises:
        InputError: none is there, a subfolder cannot be read, a symbolic link leads out of the folder,
            or is one to a folder, wherever that is.
    """
    suffixes = {
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
    }  # registering loads Pillow's plugins, so before OPEN is looked at
    root = folder.resolve()
    found = []
    for entry in _entries(folder):
        if os.path.splitext(entry.name)[1].lower() not in suffixes:
            continue
        if entry.is_symlink():
            if not Path(entry.path).resolve().is_relative_to(root):
                raise InputError(
                    f"{entry.path} is a link out of {folder}: copy the image into the folder, "
                    "or remove the link"
                )
        elif not entry.is_file():
            continue  # a pipe or a device, whose opening could wait for ever
        found.append(entry.path)
    if not found:
        raise InputError(f"{folder} holds no images: give a folder with files such as .png or .jpg")
    return [Path(path) for path in sorted(found, key=lambda path: path.split(os.sep))]


def class_names(folder: Path, files: Sequence[Path]) -> list[str] | None:
    """The class of each file: its first folder below `folder`; None where any file lies directly in it."""
    parts = [path.relative_to(folder).parts for path in files]
    return None if any(len(part) == 1 for part in parts) else [part[0] for part in parts]


def default_image_size(folder: Path) -> int:
    """The shorter side of the folder's first image that can be read, at most 64.

    Raises:
        InputError: there is none.
    """
    return _first(folder, image_files(folder))[0]


def folder_bytes(folder: Path, image_size: int | None) -> int:
    """What the folder's images take up as uint8, judged by their number and the first that can be read.

    Raises:
        InputError: none can be read.
    """
    files = image_files(folder)
    default_size, channels = _first(folder, files)
    return len(files) * channels * (image_size or default_size) ** 2


def load_image_folder(folder: Path, image_size: int | None, skip_bad: bool) -> FolderImages:
    """Load a folder's images, resized by the shorter side and cropped in the middle.

    Transparent pixels become white. The result is grey where every image is.

    Args:
        folder: images at any depth.
        image_size: side in pixels, at least 8; by default `default_image_size`.
        skip_bad: leave out what cannot be read instead of refusing the folder.

    Raises:
        InputError: no images, one that cannot be read, is too large or lies outside the folder.
    """
    size = checked_size(folder, image_size)
    files = image_files(folder)
    pixels = np.empty((len(files), 1, size, size), dtype=np.uint8)
    kept: list[Path] = []
    for path in files:
        try:
            square = read_square(path, size)
        except InputError:
            if not skip_bad:
                raise
            continue
        if channels_of(square) > pixels.shape[1]:
            pixels = np.repeat(pixels, 3, axis=1)  # grey until now: grey as colour has equal channels
        pixels[len(kept)] = to_array(square, pixels.shape[1])
        kept.append(path)
    if not kept:
        raise InputError(f"{folder}: not one of its images can be read")
    return FolderImages(pixels[: len(kept)], class_names(folder, kept))


def checked_size(folder: Path, image_size: int | None) -> int:
    """The side that images are given: the one asked for, else the folder's default.

    Raises:
        InputError: below 8, or no image can be read.
    """
    size = image_size or default_image_size(folder)
    if size < 8:
        raise InputError(f"--image-size {size}: give 8 or more")
    return size


def _first(folder: Path, files: Sequence[Path]) -> tuple[int, int]:
    """Default size and channels, by the first image that can be read."""
    for path in files:
        with suppress(InputError):
            channels = channels_of(read_square(path, 8))
            with opened(path) as image:
                return min(*image.size, _LARGEST_DEFAULT_SIZE), channels
    raise InputError(f"{folder}: not one of its images can be read")


def _entries(folder: Path) -> "Iterator[os.DirEntry[str]]":
    """What lies below a folder and is no folder."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): change its permissions") from error
    for entry in found:
        if not entry.is_dir():
            yield entry
        elif entry.is_symlink():
            # Passed over in silence, a class would be missing; followed, one could lead anywhere.
            raise InputError(
                f"{entry.path} is a link to a folder: such links are not followed, "
                "so put the folder itself there, or remove the link"
            )
        else:
            yield from _entries(Path(entry.path))
