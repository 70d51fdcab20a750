"""Functions that Ray Data tasks run on the files of an image folder.

This module imports neither torch nor Ray, since each task process would have to load them. The functions
report errors in a column instead of raising them: so one bad file does not lose the other results of its
block, and the message is not buried in one of Ray's.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.data.image_reading import channels_of, read_square, to_array
from diffusion.data.splits import digests
from diffusion.errors import InputError
from diffusion.normalisation import pixel_sums

Rows = dict[str, NDArray[Any]]


def inspect(rows: Rows, size: int) -> Rows:
    """Collect what must be known of every image before training.

    Args:
        rows: column "path", bytes.
        size: side in pixels to which the images are cropped and resized.

    Returns:
        Columns "error", text, empty if the image can be read; "colour", whether it is not grey; "sums",
        int64 [rows, 3, 2] of `pixel_sums` in colour; "grey" and "rgb", uint8 [rows, 32], the sha256 of the
        grey and of the colour version of the image ("grey" is zeros for a colour image).
    """
    count = len(rows["path"])
    columns: Rows = {
        "error": np.full(count, "", dtype=object),
        "colour": np.zeros(count, dtype=bool),
        "sums": np.zeros((count, 3, 2), dtype=np.int64),
        "grey": np.zeros((count, 32), dtype=np.uint8),
        "rgb": np.zeros((count, 32), dtype=np.uint8),
    }
    for row, path in enumerate(rows["path"]):
        try:
            square = read_square(Path(os.fsdecode(path)), size)
        except InputError as error:
            columns["error"][row] = str(error)
            continue
        channels = channels_of(square)
        image = to_array(square, channels)[None]
        columns["colour"][row] = channels == 3
        columns["sums"][row] = pixel_sums(image)[0]  # a grey image counts as three equal channels
        if channels == 1:
            columns["grey"][row] = _digest(image)
        columns["rgb"][row] = _digest(np.repeat(image, 3, axis=1) if channels == 1 else image)
    return columns


def decode(rows: Rows, size: int, channels: int) -> Rows:
    """Decode images, and check that they have not changed since they were inspected.

    Args:
        rows: columns "path", bytes, and "digest", the expected sha256 of the pixels.
        size: side in pixels to which the images are cropped and resized.
        channels: 1 or 3.

    Returns:
        Columns "image", uint8 [rows, channels, size, size], and "error", text, empty if there is none.
    """
    images = np.zeros((len(rows["path"]), channels, size, size), dtype=np.uint8)
    errors = np.full(len(images), "", dtype=object)
    for row, (name, digest) in enumerate(zip(rows["path"], rows["digest"], strict=True)):
        path = Path(os.fsdecode(name))
        try:
            image = to_array(read_square(path, size), channels)
        except InputError as error:
            errors[row] = str(error.__cause__ or error)
            continue
        if next(digests(image[None])) == bytes(digest):
            images[row] = image
        else:
            errors[row] = f"{path} holds another image"
    return {"image": images, "error": errors}


def _digest(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.frombuffer(next(digests(image)), dtype=np.uint8)
