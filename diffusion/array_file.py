"""Reads .npy files that may be damaged or made to fill the memory. Needs only numpy."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.files import path_kind
from diffusion.memory_limit import check_memory


def read_array(path: Path, wanted: str) -> NDArray[Any]:
    """Read a .npy file. Pickled objects are refused, since reading them could run any program.

    Args:
        path: the path.
        wanted: what to give instead, for the message.

    Raises:
        InputError: it is missing or no such file, its header claims more than the file holds, or it does not
            fit into memory.
    """
    if (kind := path_kind(path)) != "file":
        reason = "No such file or directory" if kind is None else "it is no file"
        raise InputError(f"{path} cannot be read ({reason}): give {wanted}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old headers
            # A mapped file allocates nothing, and must be as long as its header claims.
            mapped = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy parses the header as Python's literals, which can raise anything
        reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        raise InputError(f"{path} cannot be read as an array ({reason}): give {wanted}") from error
    check_memory(mapped.nbytes, str(path), "give a part of it")
    return np.array(mapped)
