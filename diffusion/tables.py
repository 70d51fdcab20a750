"""A table of points, one row a point, as one array."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet", ".npy")


@dataclass(frozen=True, eq=False)
class Table:
    """A table of points.

    Attributes:
        values: float64 [rows, columns], finite.
        columns: the coordinates' names.
        labels: of each row, or None.
    """

    values: NDArray[np.float64]
    columns: tuple[str, ...]
    labels: list[str] | None


def load_table(path: Path, label_column: str | None = None) -> Table:
    """Read a .csv, .parquet or .npy table of numbers.

    Args:
        path: of the file; the columns of an .npy array are named x0, x1, ...
        label_column: a column that is no coordinate but the rows' label, as text; whole numbers that
            stand there as floats lose their ".0".

    Raises:
        InputError: unreadable, not two-dimensional, no such label column, or a cell that is no finite
            number or an empty label (row, counted from 1 without the heading, and column are named).
    """
    table = _read(path)
    names = tuple(str(name) for name in table.columns)
    labels = None
    if label_column is not None:
        if label_column not in names:
            raise InputError(
                f"--label-column {label_column}: {path} has no such column; give one of {', '.join(names)}"
            )
        place = names.index(label_column)
        labels = _labels(path, label_column, table.iloc[:, place])
        names = names[:place] + names[place + 1 :]
        table = table.iloc[:, [column for column in range(table.shape[1]) if column != place]]
    if not names:
        raise InputError(f"{path} has no columns of coordinates: give one or more")
    columns = [_numbers(path, name, table.iloc[:, place]) for place, name in enumerate(names)]
    return Table(np.stack(columns, axis=1), names, labels)


def _read(path: Path) -> "pd.DataFrame":
    import pandas as pd

    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.ndim != 2:
                raise InputError(f"{path} has shape {array.shape}: give two dimensions, rows and columns")
            return pd.DataFrame(array, columns=[f"x{column}" for column in range(array.shape[1])])
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        with warnings.catch_warnings():
            # With too few names pandas would take the first cells for the rows' names.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(path, index_col=False)
    except pd.errors.ParserWarning as error:
        raise InputError(f"{path}: its rows have more cells than its heading; name every column") from error
    except InputError:
        raise
    # pandas' and Arrow's parsers raise ValueErrors, a damaged heading of .npy SyntaxErrors and others.
    except (ValueError, OSError, ImportError, SyntaxError, EOFError, TypeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a {path.suffix} table ({reason})") from error


def _numbers(path: Path, name: str, column: "pd.Series[Any]") -> NDArray[np.float64]:
    import pandas as pd

    # Times and complex numbers would become numbers too, but none that anyone meant.
    odd = column.dtype.kind in "mMc" or isinstance(column.dtype, pd.CategoricalDtype)
    numbers = pd.to_numeric(column.astype(str) if odd else column, errors="coerce")
    values = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise InputError(
            f"{path}: row {bad[0] + 1}, column {name} holds {_shown(column.iloc[bad[0]])}, "
            "not a finite number: mend the cell, or leave the row or the column out"
        )
    return values


def _labels(path: Path, name: str, column: "pd.Series[Any]") -> list[str]:
    missing = np.flatnonzero(column.isna().to_numpy())
    if missing.size:
        raise InputError(
            f"{path}: row {missing[0] + 1}, label column {name} is empty: give every row a label, "
            "or leave the row out"
        )
    cells = column.tolist()
    if all(isinstance(cell, float) and cell.is_integer() for cell in cells):
        cells = [int(cell) for cell in cells]
    return [str(cell) for cell in cells]


def _shown(cell: Any) -> str:
    """A cell as one short line, without numpy's own wrapping."""
    return repr(cell.item() if isinstance(cell, np.generic) else cell)[:80]
