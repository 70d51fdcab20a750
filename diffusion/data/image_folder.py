"""Image folders: finding the files, their classes, and loading them into one array."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.config import DataConfig
from diffusion.data.image_reading import channels_of, open_image, read_square, to_array
from diffusion.data.sources import PIXEL_RANGE, DataSource, RawData, encode_labels
from diffusion.data.splits import SPLIT_NAMES
from diffusion.errors import InputError
from diffusion.files import os_reason, path_kind
from diffusion.memory_limit import check_memory

_MAX_DEFAULT_SIDE = 64


class ImageFolder(DataSource):
    """A folder of images, listed once.

    Images become squares: the shorter side is resized, the longer one centre-cropped. Transparent pixels
    become white.

    Args:
        config: config with the path of the folder.

    Attributes:
        folder: path of the folder.
    """

    kind = "image"

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.folder = Path(config.name)

    @cached_property
    def files(self) -> list[Path]:
        """Paths of all images, see `image_files`."""
        return image_files(self.folder)

    @cached_property
    def image_side(self) -> int:
        """Side of the images in pixels: the shorter side of the first readable image, if none is given.

        Raises:
            InputError: the side is below 4, or no image can be read.
        """
        size = self.config.image_side or self._first_image[0]
        if size < 4:
            raise InputError(f"--image-size {size}: give 4 or more")
        return size

    @property
    def image_channels(self) -> int:
        """Number of channels of the first readable image, 1 or 3.

        Raises:
            InputError: no image can be read.
        """
        return self._first_image[1]

    @property
    def larger_than_memory(self) -> bool:
        """Whether the images, as uint8, exceed `config.memory_limit_gb`; see `estimated_bytes`."""
        return self.estimated_bytes > self.config.memory_limit_gb * 1e9

    @property
    def estimated_bytes(self) -> int:
        """Estimated size of the images as uint8: their number times the size of the first readable one.

        Raises:
            InputError: no image can be read.
        """
        return len(self.files) * self._first_image[1] * self.image_side**2

    def load(self) -> RawData:
        """Load all images. They have one channel if all of them are grey, else three.

        Raises:
            InputError: there are no images, or an image cannot be read, is too large or is outside the
                folder.
        """
        size = self.image_side
        check_memory(self.estimated_bytes, f"--data {self.folder}", "lower --memory-limit-gb to stream it")
        pixels = np.empty((len(self.files), 1, size, size), dtype=np.uint8)
        kept: list[Path] = []
        for path in self.files:
            try:
                square = read_square(path, size)
            except InputError:
                if not self.config.skip_bad_images:
                    raise
                continue
            if channels_of(square) > pixels.shape[1]:
                # The first colour image: turn the grey ones into three equal channels.
                pixels = np.repeat(pixels, 3, axis=1)
            pixels[len(kept)] = to_array(square, pixels.shape[1])
            kept.append(path)
        if not kept:
            raise self.no_readable_image()
        classes, labels = encode_labels(class_names(self.folder, kept))
        return RawData(
            values=pixels[: len(kept)],
            value_range=PIXEL_RANGE,
            classes=classes,
            labels=labels,
            sides=folder_sides(self.folder, kept),
        )

    def no_readable_image(self) -> InputError:
        """Make the error that says that no image of the folder can be read."""
        return InputError(f"{self.folder}: none of its images can be read")

    @cached_property
    def _first_image(self) -> tuple[int, int]:
        """Default side and number of channels, taken from the first readable image."""
        for path in self.files:
            with suppress(InputError):
                channels = channels_of(read_square(path, 8))
                with open_image(path) as image:
                    return min(*image.size, _MAX_DEFAULT_SIDE), channels
        raise self.no_readable_image()


def image_files(folder: Path) -> list[Path]:
    """List all image files below a folder, sorted by path.

    Images are files with a suffix that Pillow can read. Hidden files and folders are ignored.

    Raises:
        InputError: there are no images, a subfolder cannot be read, a symbolic link points outside the
            folder, or a symbolic link points to a folder.
    """
    suffixes = {
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
    }  # registered_extensions() loads Pillow's plugins, which fill Image.OPEN
    root = Path(os.path.realpath(folder))
    paths = []
    for entry in _entries(folder):
        if os.path.splitext(entry.name)[1].lower() not in suffixes:
            continue
        if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root):
            raise InputError(
                f"{entry.path} is a link to a file outside {folder}: copy the image into the folder, "
                "or remove the link"
            )
        if path_kind(Path(entry.path)) == "other":
            continue  # opening a pipe or a device could block forever
        paths.append(entry.path)
    if not paths:
        raise InputError(f"{folder} holds no images: give a folder with files such as .png or .jpg")
    return [Path(path) for path in sorted(paths, key=lambda path: path.split(os.sep))]


def class_names(folder: Path, files: Sequence[Path]) -> list[str] | None:
    """Class of each file: its top-level subfolder of `folder`, or of the folder of its split.

    None if any file is directly in that folder.
    """
    first = 0 if folder_sides(folder, files) is None else 1
    parts = [path.relative_to(folder).parts[first:] for path in files]
    return None if any(len(part) == 1 for part in parts) else [part[0] for part in parts]


def folder_sides(folder: Path, files: Sequence[Path]) -> NDArray[np.int64] | None:
    """The split that subfolders train, val and test make: the side of each file, see `RawData`.

    None unless all files are in such subfolders, some of them in train and some in another one.
    """
    names = [path.relative_to(folder).parts[0].lower() for path in files]
    if not set(names) <= SPLIT_NAMES.keys():
        return None
    sides = np.array([SPLIT_NAMES[name] for name in names], dtype=np.int64)
    return sides if {0} < set(sides.tolist()) else None


def _entries(folder: Path) -> "Iterator[os.DirEntry[str]]":
    """All entries below a folder, recursively, except hidden ones and the folders themselves."""
    folders = [str(folder)]
    while folders:
        path = folders.pop()
        try:
            with os.scandir(path) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
            are_folders = [entry.is_dir() for entry in visible]
        except OSError as error:
            raise InputError(f"{path} cannot be read ({os_reason(error)}): change or remove it") from error
        for entry, is_folder in zip(visible, are_folders, strict=True):
            if not is_folder:
                yield entry
            elif entry.is_symlink():
                # Ignoring the link could drop a whole class; following it could lead anywhere.
                raise InputError(
                    f"{entry.path} is a link to a folder, and such links are not followed: "
                    "put the folder itself there, or remove the link"
                )
            else:
                folders.append(entry.path)
