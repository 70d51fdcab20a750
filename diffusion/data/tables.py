"""Tables of points, one point per row."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffusion.config import DataConfig
from diffusion.data.sources import DataSource, RawData, encode_labels
from diffusion.data.splits import SPLIT_NAMES
from diffusion.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

# Roles of columns that hold no coordinate, named by DataConfig.
_ROLES = ("label", "split", "group")


class TableFile(DataSource):
    """A .csv, .parquet or .npy table of points."""

    kind = "points"
    has_columns = True

    def load(self) -> RawData:
        """Read the table.

        Raises:
            InputError: see `read_frame` and `table_from_frame`.
        """
        return table_from_frame(read_frame(Path(self.config.name)), self.config.name, self.config).to_raw()


@dataclass(frozen=True, eq=False)
class Table:
    """A table of points.

    Attributes:
        values: coordinates, float64 [rows, columns], finite.
        columns: names of the coordinates.
        labels: label of each row, or None.
        sides: the user's split, see `RawData`, or None.
        groups: group of each row, see `RawData`, or None.
    """

    values: NDArray[np.float64]
    columns: tuple[str, ...]
    labels: list[str] | None = None
    sides: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None

    def to_raw(self) -> RawData:
        """The table as a data set."""
        classes, labels = encode_labels(self.labels)
        return RawData(
            values=self.values,
            columns=self.columns,
            classes=classes,
            labels=labels,
            sides=self.sides,
            groups=self.groups,
        )


def table_from_frame(frame: "pd.DataFrame", where: str, config: DataConfig | None = None) -> Table:
    """Convert a DataFrame to points.

    Args:
        frame: columns of numbers, one point per row.
        where: what holds the cells, for error messages.
        config: names columns that hold no coordinate: the label of each row, its split or its group. Labels
            are read as text; if all are whole numbers stored as floats, they lose their ".0".

    Raises:
        InputError: there is no such column, or a cell is empty, is no split or is not a finite number. The
            message names the cell's column and row, counted from 1 without the header.
    """
    names = [str(name) for name in frame.columns]
    found: dict[str, list[str]] = {}
    for role in _ROLES if config is not None else ():
        column = getattr(config, f"{role}_column")
        if column is None:
            continue
        if column not in names:
            raise InputError(
                f"--{role}-column {column}: {where} has no such column; give one of {', '.join(names)}"
            )
        found[role] = _texts(where, role, column, frame.iloc[:, names.index(column)])
    special = {getattr(config, f"{role}_column") for role in found}
    indices = [index for index, name in enumerate(names) if name not in special]
    if not indices:
        raise InputError(f"{where} has no columns of coordinates: give one or more")
    columns = [_numbers(where, names[index], frame.iloc[:, index]) for index in indices]
    return Table(
        np.stack(columns, axis=1),
        tuple(names[index] for index in indices),
        found.get("label"),
        _sides(where, config.split_column or "", found["split"]) if config and "split" in found else None,
        encode_labels(found["group"])[1] if "group" in found else None,
    )


def _sides(where: str, name: str, cells: list[str]) -> NDArray[np.int64]:
    """Sides of a user's split, from a column of their names."""
    for row, cell in enumerate(cells, start=1):
        if cell.strip().lower() not in SPLIT_NAMES:
            raise InputError(
                f"{where}: row {row}, split column {name} holds {_short_repr(cell)}: give train, val or test"
            )
    sides = np.array([SPLIT_NAMES[cell.strip().lower()] for cell in cells], dtype=np.int64)
    if not {0} < set(sides.tolist()):
        raise InputError(
            f"--split-column {name}: {where} has {' and '.join(sorted(set(cells)))} only; give train, and "
            "val or test beside it"
        )
    return sides


def read_frame(path: Path) -> "pd.DataFrame":
    """Read a .csv, .parquet or .npy file; the columns of an .npy array are named x0, x1, ...

    Raises:
        InputError: the file cannot be read or is not two-dimensional.
    """
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


def _texts(where: str, role: str, name: str, column: "pd.Series[Any]") -> list[str]:
    """Cells of a column of labels, splits or groups."""
    missing = np.flatnonzero(column.isna().to_numpy())
    if missing.size:
        raise InputError(
            f"{where}: row {missing[0] + 1}, {role} column {name} is empty: give every row a {role}, "
            "or leave the row out"
        )
    cells = column.tolist()
    if all(isinstance(cell, float) and cell.is_integer() for cell in cells):
        cells = [int(cell) for cell in cells]
    return [str(cell) for cell in cells]


def _short_repr(cell: Any) -> str:
    """A cell on one short line, as a plain Python value rather than a numpy scalar."""
    return repr(cell.item() if isinstance(cell, np.generic) else cell)[:80]
