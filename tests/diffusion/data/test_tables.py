"""Tables of points: formats, label columns, and invalid cells."""

import io
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import memory_limit
from diffusion.config import DataConfig
from diffusion.data.tables import TableFile, read_frame, table_from_frame
from diffusion.errors import InputError

SUFFIXES = (".csv", ".parquet", ".npy")


def load_table(path, label_column=None, **columns):
    config = DataConfig(label_column=label_column, **columns)
    return table_from_frame(read_frame(path, [label_column or ""]), str(path), config)


def write(table: pd.DataFrame, path):
    if path.suffix == ".npy":
        np.save(path, table.to_numpy())
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("width", [1, 3, 40])
def test_a_table_is_read_whatever_its_format(tmp_path, suffix, width):
    values = np.random.default_rng(0).normal(size=(30, width))
    names = tuple(f"x{column}" for column in range(width))
    path = write(pd.DataFrame(values, columns=names), tmp_path / f"points{suffix}")
    table = load_table(path)
    np.testing.assert_allclose(table.values, values, rtol=1e-12)
    assert table.columns == names and table.labels is None and table.values.dtype == np.float64


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_label_column_is_removed_from_the_coordinates(tmp_path, suffix):
    values = np.column_stack([np.arange(6.0), np.arange(6) % 3, -np.arange(6.0)])
    path = write(pd.DataFrame(values, columns=["x0", "x1", "x2"]), tmp_path / f"points{suffix}")
    table = load_table(path, "x1")
    assert table.columns == ("x0", "x2") and table.labels == ["0", "1", "2", "0", "1", "2"]
    np.testing.assert_array_equal(table.values, values[:, [0, 2]])


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["b", "a"], ["b", "a"]),
        ([10, 9], ["10", "9"]),
        ([True, False], ["True", "False"]),
        ([0.5, 1.0], ["0.5", "1.0"]),
        ([3.0, 1.0], ["3", "1"]),
        (pd.Categorical(["x", "y"]), ["x", "y"]),
        (pd.to_datetime(["2026-01-01", "2026-01-02"]), ["2026-01-01 00:00:00", "2026-01-02 00:00:00"]),
    ],
)
def test_labels_are_the_text_of_their_cells_whatever_their_type(tmp_path, cells, labels):
    path = write(pd.DataFrame({"x": [1.0, 2.0], "kind": cells}), tmp_path / "points.parquet")
    assert load_table(path, "kind").labels == labels


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["01", "1", "2"], ["01", "1", "2"]),
        (["9007199254740993.0", "9007199254740992.0", "1"], None),
        (["1" + "0" * 400, "2", "3"], None),
        (["2", "10", "3"], None),
        (["2.0", "1", "3.00"], ["2", "1", "3"]),
        (["0.50", "1.5", "0.5"], ["0.5", "1.5", "0.5"]),
        (["True", "False", "True"], None),
        (["1", "b", "01"], None),
    ],
)
def test_labels_of_a_csv_file_lose_no_digits(tmp_path, cells, labels):
    path = tmp_path / "points.csv"
    path.write_text("x,kind\n" + "".join(f"{index},{cell}\n" for index, cell in enumerate(cells)))
    assert load_table(path, "kind").labels == (labels or cells)


def test_a_named_index_that_is_left_out_is_said(tmp_path):
    frame = pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 5.0]})
    path = tmp_path / "points.parquet"
    frame.to_parquet(path)
    assert load_table(path).notes == ()
    frame.set_index("x").to_parquet(path)
    assert load_table(path).columns == ("y",) and "the index x is left out" in load_table(path).notes[0]


def test_a_missing_label_column_is_refused_with_the_existing_columns(tmp_path):
    path = write(pd.DataFrame({"a": [1.0], "b": [2.0]}), tmp_path / "points.csv")
    with pytest.raises(InputError, match="--label-column kind: .*; give one of a, b$"):
        load_table(path, "kind")
    path = write(pd.DataFrame({"a": [1.0], "b": [2.0]}), tmp_path / "points.npy")
    with pytest.raises(InputError, match="; give one of x0, x1$"):
        load_table(path, "a")


def test_an_empty_label_is_named_by_its_row(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("x,kind\n1,a\n2,\n3,b\n")
    with pytest.raises(InputError, match="row 2, label column kind is empty"):
        load_table(path, "kind")


def test_a_table_with_only_a_label_column_is_refused(tmp_path):
    path = write(pd.DataFrame({"kind": ["a", "b"]}), tmp_path / "points.csv")
    with pytest.raises(InputError, match="no columns of coordinates"):
        load_table(path, "kind")


@pytest.mark.parametrize("cell", ["nan", "", "many", "inf", "1e999", "2026-01-01"])
def test_a_cell_that_is_not_a_number_is_named_by_row_and_column(tmp_path, cell):
    path = tmp_path / "points.csv"
    path.write_text(f"a,b\n1,2\n3,{cell}\n5,6\n")
    with pytest.raises(InputError, match=r"row 2, column b") as caught:
        load_table(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cells",
    [
        pd.to_datetime(["2026-01-01", "2026-01-02"]),
        pd.to_timedelta(["1 day", "2 days"]),
        [[1.0], [2.0]],
        pd.Categorical(["low", "high"]),
        pd.period_range("2026-01", periods=2, freq="M"),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path, cells):
    """Times are stored as numbers, but those are not meant as coordinates."""
    path = write(pd.DataFrame({"x": [1.0, 2.0], "odd": cells}), tmp_path / "points.parquet")
    with pytest.raises(InputError, match="row 1, column odd holds"):
        load_table(path)


def test_complex_numbers_in_a_column_of_objects_are_refused():
    frame = pd.DataFrame({"x": pd.Series([3, 1 + 2j], dtype=object)})
    with pytest.raises(InputError, match="row 2, column x holds"):
        table_from_frame(frame, "the DataFrame")


def test_missing_integers_in_parquet_are_named(tmp_path):
    cells = pd.array([1, None, 3], dtype="Int64")
    path = write(pd.DataFrame({"x": cells}), tmp_path / "points.parquet")
    with pytest.raises(InputError, match="row 2, column x"):
        load_table(path)


@pytest.mark.parametrize("array", [np.ones((3, 2), dtype=complex), np.array([["1", "b"]])])
def test_arrays_of_other_than_real_numbers_are_refused(tmp_path, array):
    np.save(tmp_path / "points.npy", array)
    with pytest.raises(InputError, match="row 1, column x"):
        load_table(tmp_path / "points.npy")


@pytest.mark.parametrize("dtype", ["float32", "int16", "uint8", "bool", ">f8"])
def test_arrays_of_any_real_dtype_are_read(tmp_path, dtype):
    array = np.array([[0, 1], [1, 0]]).astype(dtype)
    np.save(tmp_path / "points.npy", array)
    np.testing.assert_array_equal(load_table(tmp_path / "points.npy").values, [[0.0, 1.0], [1.0, 0.0]])


def test_rows_longer_than_the_header_are_refused(tmp_path):
    """pandas would use their first cells as row names, and a coordinate would be lost."""
    (tmp_path / "points.csv").write_text("a,b\n1,2,3\n4,5,6\n")
    with pytest.raises(InputError, match="more cells than its header"):
        load_table(tmp_path / "points.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", b""),
        ("ragged.csv", b"a,b\n1,2\n3,4,5,6\n"),
        ("binary.csv", bytes(range(256))),
        ("not.parquet", b"PAR1 not at all"),
        ("empty.parquet", b""),
        ("not.npy", b"\x93NUMPY broken"),
        ("empty.npy", b""),
        ("cut.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order'"),
        ("flat.npy", np.arange(5.0)),
        ("solid.npy", np.zeros((2, 2, 2))),
        ("pickle.npy", np.array([{"run": "this"}], dtype=object)),
        ("fields.npy", np.zeros((9, 1), dtype=[("a", "f8"), ("b", "f8")])),
    ],
)
def test_a_file_that_is_not_a_table_is_refused_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(InputError) as caught:
        load_table(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x;y\n1,5;2,5\n", "has ';' and no comma: separate the columns by commas"),
        ("x\ty\n1\t2\n", "has '\\\\t' and no comma"),
        ("x,y\n1,2\n".encode("utf-16"), "is not text in UTF-8: save it as CSV"),
        ("x,größe\n1,2\n".encode("latin-1"), "is not text in UTF-8"),
        ("x,kind\n1,a\n2,NA\n", "row 2, label column kind is empty, or holds a word for that such as NA"),
    ],
)
def test_what_other_programs_call_csv_is_refused_with_what_to_change(tmp_path, content, message):
    path = tmp_path / "points.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        load_table(path, "kind")


def test_a_pickle_in_an_array_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    np.save(tmp_path / "points.npy", np.array([[Payload()]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="points.npy cannot be read"):
        load_table(tmp_path / "points.npy")
    assert not (tmp_path / "ran").exists()


def test_a_trailing_comma_in_every_row_is_not_a_column(tmp_path):
    (tmp_path / "points.csv").write_text("a,b\n1,2,\n4,5,\n")
    np.testing.assert_array_equal(load_table(tmp_path / "points.csv").values, [[1.0, 2.0], [4.0, 5.0]])


def test_split_and_group_columns_are_removed_from_the_coordinates(tmp_path):
    table = pd.DataFrame(
        {
            "who": ["b", "a", "a", "c", "b"],
            "x": np.arange(5.0),
            "part": ["train", "Test", "test ", "validation", "train"],
            "kind": list("uvuvu"),
        }
    )
    path = write(table, tmp_path / "points.csv")
    loaded = load_table(path, "kind", split_column="part", group_column="who")
    assert loaded.columns == ("x",) and loaded.labels == list("uvuvu")
    np.testing.assert_array_equal(loaded.sides, [0, 2, 2, 1, 0])
    np.testing.assert_array_equal(loaded.groups, [1, 0, 0, 2, 1])
    assert load_table(path.with_name(write(table[["x"]], tmp_path / "x.csv").name)).groups is None


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["train", "dev", "test"], "row 2, split column part holds 'dev': give train, val or test"),
        (["train", "train", "train"], "--split-column part: .* has train only; give train, and val or test"),
        (["val", "test", "val"], "has test and val only; give train"),
        (["train", None, "test"], "row 2, split column part is empty"),
    ],
)
def test_a_split_column_that_is_no_split_is_refused(tmp_path, cells, message):
    path = write(pd.DataFrame({"x": [1.0, 2.0, 3.0], "part": cells}), tmp_path / "points.csv")
    with pytest.raises(InputError, match=message):
        load_table(path, split_column="part")


def test_one_column_cannot_have_two_roles():
    with pytest.raises(InputError, match="name part, part: give different columns"):
        DataConfig(split_column="part", group_column="part")


def test_the_index_that_pandas_writes_is_no_coordinate(tmp_path):
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 2)), columns=["x", "y"])
    table.to_csv(tmp_path / "points.csv")
    with pytest.raises(InputError, match=r"column 1 has no name.*index=False"):
        load_table(tmp_path / "points.csv")
    read_back = pd.read_csv(tmp_path / "points.csv")  # its index is now the column "Unnamed: 0"
    for frame in (read_back, read_back.sample(frac=0.5, random_state=0)):
        with pytest.raises(InputError, match="column 1 has no name"):
            table_from_frame(frame, "the DataFrame")
    table.to_parquet(tmp_path / "points.parquet")
    assert load_table(tmp_path / "points.parquet").columns == ("x", "y")


@pytest.mark.parametrize("start", [0, 1, 500])
def test_a_column_that_counts_the_rows_is_said(tmp_path, start):
    table = pd.DataFrame({"id": np.arange(start, start + 30), "x": np.random.default_rng(0).normal(size=30)})
    (note,) = load_table(write(table, tmp_path / "points.csv")).notes
    assert "column id counts the rows" in note
    assert not load_table(write(table[::-1], tmp_path / "points.csv")).notes
    assert not load_table(write(table, tmp_path / "points.csv"), group_column="id").notes


@pytest.mark.parametrize("first", ["1.5,2", "0,-1", "1,2", "nan,0", "1e3,4"])
def test_a_first_line_of_numbers_is_not_lost(tmp_path, first):
    (tmp_path / "points.csv").write_text(first + "\n" + "3,4\n5,6\n" * 10)
    with pytest.raises(InputError, match="first line holds numbers, .* would be lost"):
        load_table(tmp_path / "points.csv")


def test_the_names_that_pandas_gives_an_array_are_taken_and_said(tmp_path):
    pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3))).to_csv(tmp_path / "points.csv", index=False)
    raw = TableFile(DataConfig(name=str(tmp_path / "points.csv"))).load()
    assert raw.columns == ("0", "1", "2") and raw.values.shape == (30, 3)
    assert "if that is the first point" in raw.notes[0]


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "points.csv").write_text("a,a\n1,2\n")
    with pytest.raises(InputError, match="two columns called a"):
        load_table(tmp_path / "points.csv")


def test_a_label_column_of_many_fractions_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.normal(size=200), "size": rng.normal(size=200)})
    with pytest.raises(InputError, match="--label-column size: .* 200 different numbers"):
        load_table(write(table, tmp_path / "points.csv"), "size")
    table["size"] = table["size"].round(0) / 2  # a few sizes are classes
    assert len(set(load_table(write(table, tmp_path / "points.csv"), "size").labels)) < 20


def test_more_classes_than_anyone_wants_are_said(tmp_path):
    table = pd.DataFrame({"x": np.random.default_rng(0).normal(size=60), "who": [f"p{i}" for i in range(60)]})
    (note,) = load_table(write(table, tmp_path / "points.csv"), "who").notes
    assert note.startswith("--label-column who makes 60 classes of 60 rows")


def header(shape, descr="<f8"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("shape", [(200_000_000_000, 1), (2**62, 4), (-5, 2)])
def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path, shape):
    (tmp_path / "points.npy").write_bytes(header(shape))
    with pytest.raises(InputError, match=r"points.npy cannot be read as an array"):
        read_frame(tmp_path / "points.npy")


@pytest.mark.parametrize("name", ["points.csv", "points.npy"])
def test_a_file_larger_than_memory_is_not_read(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.write(header((2**39, 1)) if name.endswith("npy") else b"a,b\n")
        file.truncate(2**43)  # sparse
    with pytest.raises(InputError, match="of memory, and there are"):
        read_frame(tmp_path / name)


def test_a_small_file_with_many_equal_values_is_not_unpacked(tmp_path, monkeypatch):
    table = pd.DataFrame({"a": np.zeros(1_000_000)})
    table.to_parquet(tmp_path / "points.parquet")
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: 1_000_000)
    with pytest.raises(InputError, match="points.parquet needs .* of memory"):
        read_frame(tmp_path / "points.parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_devices_and_pipes_are_refused(tmp_path, suffix):
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / f"pipe{suffix}")
    for name in ("zero", "pipe", "missing"):
        with pytest.raises(InputError, match="give "):
            read_frame(tmp_path / (name + suffix))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_a_damaged_table_is_read_or_refused_in_one_line(data, tables):
    path, content = data.draw(st.sampled_from(tables))
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["byte", "cut", "insert"])):
            case "byte":
                damaged[place] = data.draw(st.integers(0, 255))
            case "cut":
                del damaged[place : place + data.draw(st.integers(1, 30))]
                damaged = damaged or bytearray(b"0")
            case "insert":
                damaged[place:place] = data.draw(st.binary(max_size=10))
    path.write_bytes(damaged)
    try:
        table = load_table(path, "kind" if path.suffix != ".npy" else None)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 700
    else:
        assert np.isfinite(table.values).all()


@pytest.fixture(name="tables", scope="module")
def _tables(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("damaged"), np.random.default_rng(0)
    table = pd.DataFrame({"a": rng.normal(size=30), "b": rng.normal(size=30), "kind": list("uvw") * 10})
    paths = [write(table, folder / f"points{suffix}") for suffix in (".csv", ".parquet")]
    paths.append(write(table[["a", "b"]], folder / "points.npy"))
    return [(path, path.read_bytes()) for path in paths]
