"""Records come back from JSON as they were, and nothing else becomes one."""

import json
from dataclasses import dataclass
from typing import Any, get_args

import pytest

from workflows.storage.tagged_records import TaggedRecords
from workflows.tracking import entries
from workflows.tracking.entries import ENTRIES


@dataclass(frozen=True)
class First:
    """One kind of record."""

    number: int
    tags: dict[str, str]
    note: str = ""


@dataclass(frozen=True)
class Second:
    """Another kind."""

    value: Any


RECORDS = TaggedRecords[First | Second]("is", {"first": First, "second": Second})


@pytest.mark.parametrize(
    ("record", "tree"),
    [
        (First(3, {"a": "b"}), {"is": "first", "number": 3, "tags": {"a": "b"}, "note": ""}),
        (Second([1, None]), {"is": "second", "value": [1, None]}),
    ],
)
def test_a_record_comes_back_from_json(record, tree):
    assert RECORDS.to_tree(record) == tree
    assert RECORDS.from_tree(json.loads(json.dumps(tree))) == record
    assert RECORDS.name(record) == tree["is"]


def test_what_an_earlier_version_left_out_has_its_default_and_what_a_later_one_adds_is_left_out():
    assert RECORDS.from_tree({"is": "first", "number": 3, "tags": {}, "more": 1}) == First(3, {})


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"is": "third"},
        {"is": ["first"]},
        {"is": "first", "number": 3},
        {"is": "first", "number": "3", "tags": {}},
        {"is": "first", "number": 3, "tags": {"a": 1}},
        {"is": "first", "number": 3, "tags": {}, "note": None},
    ],
)
def test_what_is_no_record_is_none(tree):
    assert RECORDS.from_tree(tree) is None


def test_every_kind_of_entry_has_a_name():
    names = {ENTRIES.to_tree(each)["kind"] for each in EXAMPLES}
    assert len(names) == len(EXAMPLES) == len(get_args(entries.Entry))
    for each in EXAMPLES:
        assert ENTRIES.from_tree(json.loads(json.dumps(ENTRIES.to_tree(each)))) == each


EXAMPLES = (
    entries.Start("a", {"x": "1"}, None, 5),
    entries.End("finished", 5),
    entries.StartTrial("00001", {}, 5),
    entries.EndTrial("00001", "out of memory", "", 5),
    entries.Metrics(None, {"loss": 1.5, "n": 2}, 3, 5),
    entries.Table("00001", {"loss": float("inf")}),
    entries.Data({"name": "heart"}, "training"),
    entries.View(["seed"], 10, False, 5),
    entries.Picks({"00001": "champion"}),
    entries.Picture("00001", "a.png", 3, 5),
    entries.Tags(None, {"a": "b"}),
    entries.Folder("plots", "plots"),
    entries.File("a.txt"),
    entries.Model("a.onnx", {"seed": "1"}, {}),
    entries.RegisteredModel("a", "a.onnx", {}, {}, {"test_distance": 0.25}, True),
    entries.ModelMetrics({"loss": 1.0}),
)
