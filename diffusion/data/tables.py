"""Tables of points, one point per row."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffusion.data.sources import DataSource, RawData, encode_labels
from diffusion.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


class TableFile(DataSource):
    """A .csv, .parquet or .npy table of points."""

    kind = "points"
    has_label_column = True

    def load(self) -> RawData:
        """Read the table.

        Raises:
            InputError: see `load_table`.
        """
        table = load_table(Path(self.config.name), self.config.label_column)
        classes, labels = encode_labels(table.labels)
        return RawData(values=table.values, columns=table.columns, classes=classes, labels=labels)


@dataclass(frozen=True, eq=False)
class Table:
    """A table of points.

    Attributes:
        values: coordinates, float64 [rows, columns], finite.
        columns: names of the coordinates.
        labels: label of each row, or None.
    """

    values: NDArray[np.float64]
    columns: tuple[str, ...]
    labels: list[str] | None


def load_table(path: Path, label_column: str | None = None) -> Table:
    """Read a .csv, .parquet or .npy table of numbers.

    Args:
        path: path of the file. The columns of an .npy array are named x0, x1, ...
        label_column: name of a column that holds the label of each row instead of a coordinate. Labels
            are read as text; if all are whole numbers stored as floats, they lose their ".0".

    Raises:
        InputError: the file cannot be read or is not two-dimensional, there is no such label column, or a
            cell is an empty label or not a finite number. The message names the cell's column and row,
            counted from 1 without the header.
    """
    return table_from_frame(_read(path), str(path), label_column)


def table_from_frame(frame: "pd.DataFrame", where: str, label_column: str | None = None) -> Table:
    """Convert a DataFrame to points.

    Args:
        frame: columns of numbers, one point per row.
        where: what holds the cells, for error messages.
        label_column: as for `load_table`.

    Raises:
        InputError: as for `load_table`.
    """
    table, names = frame, tuple(str(name) for name in frame.columns)
    labels = None
    if label_column is not None:
        if label_column not in names:
            raise InputError(
                f"--label-column {label_column}: {where} has no such column; give one of {', '.join(names)}"
            )
        index = names.index(label_column)
        labels = _labels(where, label_column, table.iloc[:, index])
        names = names[:index] + names[index + 1 :]
        table = table.iloc[:, [column for column in range(table.shape[1]) if column != index]]
    if not names:
        raise InputError(f"{where} has no columns of coordinates: give one or more")
    columns = [_numbers(where, name, table.iloc[:, index]) for index, name in enumerate(names)]
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
            # With too few column names, pandas would use the first cells as row names, with a warning only.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(path, index_col=False)
    except pd.errors.ParserWarning as error:
        raise InputError(f"{path}: its rows have more cells than its header; name every column") from error
    except InputError:
        raise
    # pandas and Arrow raise ValueError and OSError; a damaged .npy header can raise SyntaxError and others.
    except (ValueError, OSError, ImportError, SyntaxError, EOFError, TypeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a {path.suffix} table ({reason})") from error


def _numbers(where: str, name: str, column: "pd.Series[Any]") -> NDArray[np.float64]:
    import pandas as pd

    # Times, complex numbers and categories would also convert, but not to numbers that anyone meant.
    not_numeric = column.dtype.kind in "mMc" or isinstance(column.dtype, pd.CategoricalDtype)
    numbers = pd.to_numeric(column.astype(str) if not_numeric else column, errors="coerce")
    values = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise InputError(
            f"{where}: row {bad[0] + 1}, column {name} holds {_short_repr(column.iloc[bad[0]])}, "
            "not a finite number: fix the cell, or leave the row or the column out"
        )
    return values


def _labels(where: str, name: str, column: "pd.Series[Any]") -> list[str]:
    missing = np.flatnonzero(column.isna().to_numpy())
    if missing.size:
        raise InputError(
            f"{where}: row {missing[0] + 1}, label column {name} is empty: give every row a label, "
            "or leave the row out"
        )
    cells = column.tolist()
    if all(isinstance(cell, float) and cell.is_integer() for cell in cells):
        cells = [int(cell) for cell in cells]
    return [str(cell) for cell in cells]


def _short_repr(cell: Any) -> str:
    """A cell on one short line, as a plain Python value rather than a numpy scalar."""
    return repr(cell.item() if isinstance(cell, np.generic) else cell)[:80]
