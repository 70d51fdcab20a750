"""A table of points, one row a point, as one array."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError

SUFFIXES = (".csv", ".parquet", ".npy")


def load_table(path: Path) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Read a .csv, .parquet or .npy table of numbers.

    Returns:
        float64 [rows, columns], and the columns' names.

    Raises:
        InputError: unreadable, not two-dimensional, or a cell that is no finite number (row, counted
            from 1 without the heading, and column are named).
    """
    import pandas as pd

    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.ndim != 2:
                raise InputError(f"{path} has shape {array.shape}: give two dimensions, rows and columns")
            table = pd.DataFrame(array, columns=[f"x{column}" for column in range(array.shape[1])])
        elif path.suffix == ".csv":
            table = pd.read_csv(path)
        else:
            table = pd.read_parquet(path)
    except InputError:
        raise
    except (
        ValueError,
        OSError,
        UnicodeError,
        ImportError,
    ) as error:  # pandas' and Arrow's parsers raise ValueErrors
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a {path.suffix} table ({reason})") from error

    for name in table.columns:
        numbers = pd.to_numeric(table[name], errors="coerce")
        bad = np.flatnonzero(~np.isfinite(numbers.to_numpy(dtype=np.float64)))
        if bad.size:
            cell = table[name].iloc[bad[0]]
            raise InputError(
                f"{path}: row {bad[0] + 1}, column {name} holds {cell!r}, not a finite number: "
                "mend the cell, or leave the row or the column out"
            )
    if table.shape[1] == 0:
        raise InputError(f"{path} has no columns")
    return table.apply(pd.to_numeric).to_numpy(dtype=np.float64), tuple(str(name) for name in table.columns)
