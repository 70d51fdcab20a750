"""What Ray's tasks do with the files of a folder of images. Loads neither torch nor Ray: each process would.

Nothing is raised here: what is wrong with a file is a column, so that one bad file does not lose its block
and the message need not be dug out of Ray's.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.image_reading import channels_of, read_square, to_array
from diffusion.moments import pixel_sums
from diffusion.splits import digests

Rows = dict[str, NDArray[Any]]


def inspect(rows: Rows, size: int) -> Rows:
    """What must be known of every image before training.

    Args:
        rows: "path", bytes.
        size: side that the images are given.

    Returns:
        "error", text, empty where the image can be read; "colour", whether it is not grey; "sums", int64
        [rows, 3, 2] of `pixel_sums` in colour; "grey" and "rgb", uint8 [rows, 32], the sha256 of the image
        in either form (of a colour image as grey: zeros).
    """
    count = len(rows["path"])
    found: Rows = {
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
            found["error"][row] = str(error)
            continue
        channels = channels_of(square)
        image = to_array(square, channels)[None]
        found["colour"][row] = channels == 3
        found["sums"][row] = pixel_sums(image)[0]  # grey as colour has three equal channels
        if channels == 1:
            found["grey"][row] = _digest(image)
        found["rgb"][row] = _digest(np.repeat(image, 3, axis=1) if channels == 1 else image)
    return found


def decode(rows: Rows, size: int, channels: int) -> Rows:
    """Images as they were when they were inspected.

    Args:
        rows: "path", bytes, and "digest", the sha256 of what must be found there.
        size: side that the images are given.
        channels: 1 or 3.

    Returns:
        "image", uint8 [rows, channels, size, size], and "error", text, empty where all is well.
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
