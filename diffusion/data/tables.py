"""Tables of points, one point per row."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffusion.array_file import read_array
from diffusion.config import DataConfig
from diffusion.data.sources import DataSource, RawData, encode_labels
from diffusion.data.splits import SPLIT_NAMES
from diffusion.errors import InputError
from diffusion.files import path_kind
from diffusion.memory_limit import check_memory

if TYPE_CHECKING:
    import pandas as pd

# Roles of columns that hold no coordinate, named by DataConfig.
_ROLES = ("label", "split", "group")
_MAX_COLUMNS = 100_000
_UNNAMED = re.compile(r"Unnamed: \d+")  # what pandas calls a column without a name
_MAX_NUMBER_CLASSES = 20  # of a label column with fractions, which more probably holds a coordinate
_MAX_WHOLE_FLOAT = 2.0**53  # up to which floats hold every whole number
_MIN_RUNNING = 20  # rows from which on a running number is no chance


class TableFile(DataSource):
    """A .csv, .parquet or .npy table of points."""

    kind = "points"
    has_columns = True

    def load(self) -> RawData:
        """Read the table.

        Raises:
            InputError: see `read_frame` and `table_from_frame`.
        """
        path = Path(self.config.name)
        roles = (getattr(self.config, f"{role}_column") for role in _ROLES)
        frame = read_frame(path, [column for column in roles if column is not None])
        raw = table_from_frame(frame, self.config.name, self.config).to_raw()
        if path.suffix == ".csv" and list(frame.columns) == [str(index) for index in range(frame.shape[1])]:
            note = (
                f"the columns are called {', '.join(frame.columns)[:20]}, as pandas calls those of an array: "
                "if that is the first point, put a line with names before it"
            )
            raw = replace(raw, notes=(*raw.notes, note))
        return raw


@dataclass(frozen=True, eq=False)
class Table:
    """A table of points.

    Attributes:
        values: coordinates, float64 [rows, columns], finite.
        columns: names of the coordinates.
        labels: label of each row, or None.
        sides: the user's split, see `RawData`, or None.
        groups: group of each row, see `RawData`, or None.
        notes: lines about the table that the user should read.
    """

    values: NDArray[np.float64]
    columns: tuple[str, ...]
    labels: list[str] | None = None
    sides: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()

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
            notes=self.notes,
        )


def table_from_frame(frame: "pd.DataFrame", where: str, config: DataConfig | None = None) -> Table:
    """Convert a DataFrame to points.

    Args:
        frame: columns of numbers, one point per row.
        where: what holds the cells, for error messages.
        config: names columns that hold no coordinate: the label of each row, its split or its group. Labels
            are read as text; if all are whole numbers stored as floats, they lose their ".0".

    Raises:
        InputError: there is no such column, two have the same name, one has none, or a cell is empty, is no
            split or is not a finite number. The message names the cell's column and row, counted from 1
            without the header.
    """
    names = [str(name) for name in frame.columns]
    if len(names) > _MAX_COLUMNS:
        raise InputError(f"{where} has {len(names)} columns: give at most {_MAX_COLUMNS:,}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{where} has two columns called {twice}: give each a name of its own")
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
    for index in indices:
        if _UNNAMED.fullmatch(names[index]):
            raise InputError(
                f"{where}: column {index + 1} has no name, like the index that DataFrame.to_csv() writes: "
                "write the table with index=False, or give the column a name if it is a coordinate"
            )
    columns = [_numbers(where, names[index], frame.iloc[:, index]) for index in indices]
    coordinates = tuple(names[index] for index in indices)
    return Table(
        np.stack(columns, axis=1),
        coordinates,
        found.get("label"),
        _sides(where, config.split_column or "", found["split"]) if config and "split" in found else None,
        encode_labels(found["group"])[1] if "group" in found else None,
        (
            *_index_notes(frame),
            *_running_numbers(coordinates, columns),
            *_class_notes(config, found.get("label")),
        ),
    )


def _index_notes(frame: "pd.DataFrame") -> list[str]:
    """A note for each level of the index that has a name, as a column has that was made the index."""
    return [
        f"the index {name} is left out: make it a column, by DataFrame.reset_index(), if it is a coordinate"
        for name in frame.index.names
        if name is not None
    ]


def _running_numbers(names: Sequence[str], columns: Sequence[NDArray[np.float64]]) -> list[str]:
    """A note for each coordinate that only counts the rows."""
    return [
        f"the column {name} counts the rows and is learned as a coordinate: leave it out if it is an index"
        for name, values in zip(names, columns, strict=True)
        if len(values) >= _MIN_RUNNING and (np.diff(values) == 1.0).all()
    ]


def _class_notes(config: DataConfig | None, labels: list[str] | None) -> list[str]:
    """A note if labels make more classes than anyone wants."""
    count = len(set(labels or ()))
    if config is None or labels is None or count <= max(_MAX_NUMBER_CLASSES, len(labels) // 10):
        return []
    return [
        f"--label-column {config.label_column} makes {count} classes of {len(labels)} rows: give a column "
        "with few different values, unless that is meant"
    ]


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


def read_frame(path: Path, names: Sequence[str] = ()) -> "pd.DataFrame":
    """Read a .csv, .parquet or .npy file; the columns of an .npy array are named x0, x1, ...

    A .parquet table may also be a folder of files.

    Args:
        path: the path.
        names: columns that hold no coordinates. Those of a .csv file are numbers only if no two texts would
            become one number, as 01 and 1 would.

    Raises:
        InputError: the file cannot be read, is not two-dimensional, does not fit into memory, or is a .csv
            file without a line of names.
    """
    kind = path_kind(path)
    if kind is None:
        raise InputError(f"{path} does not exist: give the path of a table")
    if path.suffix == ".npy":
        return _from_npy(path)
    if kind != "file" and not (kind == "folder" and path.suffix == ".parquet"):
        raise InputError(f"{path} is not a file: give the path of a table")
    if path.suffix == ".parquet":
        return _read(path, _from_parquet)
    return _read(path, lambda path: _from_csv(path, names))


def _read(path: Path, read: "Callable[[Path], pd.DataFrame]") -> "pd.DataFrame":
    import pandas as pd

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # With too few column names, pandas would use the first cells as row names, with a warning only.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return read(path)
    except InputError:
        raise
    except pd.errors.ParserWarning as error:
        raise InputError(f"{path}: its rows have more cells than its header; name every column") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: save it as CSV in UTF-8") from error
    except Exception as error:  # the parsers of pandas and Arrow raise all kinds of exceptions
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a {path.suffix} table ({reason})") from error


def _from_npy(path: Path) -> "pd.DataFrame":
    import pandas as pd

    array = read_array(path, "a table that numpy.save has written")
    if array.ndim != 2:
        raise InputError(f"{path} has shape {array.shape}: give two dimensions, rows and columns")
    if array.dtype.names:
        raise InputError(f"{path} has fields, {', '.join(array.dtype.names)[:80]}: give an array of numbers")
    if array.shape[1] > _MAX_COLUMNS:
        raise InputError(f"{path} has {array.shape[1]} columns: give at most {_MAX_COLUMNS:,}")
    return pd.DataFrame(array, columns=[f"x{column}" for column in range(array.shape[1])])


def _from_parquet(path: Path) -> "pd.DataFrame":
    import pandas as pd
    import pyarrow.dataset

    dataset = pyarrow.dataset.dataset(path, format="parquet")
    # A file of a few kilobytes can hold any number of equal values.
    check_memory(dataset.count_rows() * len(dataset.schema) * 8, str(path), "give a part of it")
    return pd.read_parquet(path)


def _from_csv(path: Path, texts: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd

    check_memory(path.stat().st_size, str(path), "give a part of it")
    first = pd.read_csv(path, header=None, nrows=1, dtype=str, index_col=False, keep_default_na=False)
    names = [str(name) for name in first.iloc[0]]
    if len(names) > _MAX_COLUMNS:
        raise InputError(f"{path} has {len(names)} columns: give at most {_MAX_COLUMNS:,}")
    if len(names) == 1 and (separator := re.search(r"[;\t|]", names[0])):
        raise InputError(
            f"{path}: its first line, {names[0][:80]}, has {separator[0]!r} and no comma: separate the "
            "columns by commas, and write fractions with points"
        )
    given = [name for name in names if name]
    if len(set(given)) < len(given):
        twice = next(name for name in given if given.count(name) > 1)
        raise InputError(f"{path} has two columns called {twice}: give each a name of its own")
    # pandas writes the columns of an array as 0, 1, 2, ...
    if all(map(_is_number, names)) and names != [str(index) for index in range(len(names))]:
        raise InputError(
            f"{path}: its first line holds numbers, {', '.join(names)[:80]}, where the names of the columns "
            "belong, and would be lost: put a line such as x,y before it (or, if these are the names, put a "
            "letter before each)"
        )
    frame = pd.read_csv(path, index_col=False, dtype=dict.fromkeys(texts, str))
    for name in texts:
        if name in frame:
            frame[name] = _numbers_or_texts(frame[name])
    return frame


def _numbers_or_texts(cells: "pd.Series[Any]") -> "pd.Series[Any]":
    """Texts as the numbers that all of them are, or unchanged if numbers would lose digits of any."""
    import pandas as pd

    try:
        numbers = pd.to_numeric(cells, errors="coerce")
    except OverflowError:  # of a whole number with hundreds of digits
        return cells
    lost = cells.str.match(r"\s*[+-]?0\d", na=False) | (numbers.abs() >= _MAX_WHOLE_FLOAT)
    return cells if lost.any() or (numbers.isna() & cells.notna()).any() else numbers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(where: str, name: str, column: "pd.Series[Any]") -> NDArray[np.float64]:
    import pandas as pd

    # Times, complex numbers and categories would also convert, but not to numbers that anyone meant.
    not_numeric = column.dtype.kind in "mMc" or isinstance(
        column.dtype, (pd.CategoricalDtype, pd.PeriodDtype)
    )
    try:
        numbers = pd.to_numeric(column.astype(str) if not_numeric else column, errors="coerce")
    except OverflowError:  # of a whole number with hundreds of digits, which becomes infinite
        numbers = pd.to_numeric(column.astype(str), errors="coerce")
    if numbers.dtype.kind == "c":  # of a column of objects
        numbers = pd.to_numeric(column.astype(str), errors="coerce")
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
            f"{where}: row {missing[0] + 1}, {role} column {name} is empty, or holds a word for that such "
            f"as NA or None: give every row a {role}, or leave the row out"
        )
    cells = column.tolist()
    if all(isinstance(cell, float) and cell.is_integer() for cell in cells):
        cells = [int(cell) for cell in cells]
    fractions = {cell for cell in cells if isinstance(cell, float)}
    if role == "label" and len(fractions) > _MAX_NUMBER_CLASSES:
        raise InputError(
            f"--label-column {name}: {where} holds {len(fractions)} different numbers there, such as "
            f"{_short_repr(min(fractions))}, which are no classes: give a column of classes, or round them"
        )
    return [str(cell) for cell in cells]


def _short_repr(cell: Any) -> str:
    """A cell on one short line, as a plain Python value rather than a numpy scalar."""
    return repr(cell.item() if isinstance(cell, np.generic) else cell)[:80]
