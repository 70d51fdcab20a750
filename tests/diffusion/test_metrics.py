"""Metric names stand in diffusion/metrics.py alone."""

import ast
import re
from pathlib import Path

from diffusion import metrics as names

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("diffusion", "export", "workflows", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "diffusion/metrics.py"
]
PREFIXES = {
    value.split("/")[0]
    for value in vars(names).values()
    if isinstance(value, str) and re.match(r"\w+/", value)
}
NAME = re.compile(rf"({'|'.join(PREFIXES)})/(\w|$)")


def literals(tree):
    """Strings of a program, those of f-strings included, but not docstrings."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def keys(tree):
    """Strings by which something is looked up or stored in a dict."""
    for node in ast.walk(tree):
        found = [node.slice] if isinstance(node, ast.Subscript) else getattr(node, "keys", None) or []
        yield from (each.value for each in found if isinstance(each, ast.Constant))


def test_no_metric_is_named_by_a_literal():
    found = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        found[path] = [text for text in literals(tree) if NAME.match(text)]
        found[path] += [key for key in keys(tree) if key == names.OBJECTIVE]
    assert len(found) > 100
    assert {path: texts for path, texts in found.items() if texts} == {}


def test_the_search_for_literals_finds_them():
    tree = ast.parse(""""val/mse is logged."\nx = [{"objective": 1}, m["val/mse"], f"rung/{y}", "valid/x"]""")
    assert [text for text in literals(tree) if NAME.match(text)] == ["val/mse", "rung/"]
    assert "objective" in keys(tree)
    assert {"train", "val", "test", "sample", "schedule", "rung", "features", "final"} <= PREFIXES


def test_a_prefix_is_replaced_only_where_it_begins_a_name():
    metrics = {"sample/distance": 1.0, "sample/kid_sample/x": 2.0, "val/mse": 3.0}
    assert names.with_prefix(metrics, "sample/", "test/sample_") == {
        "test/sample_distance": 1.0,
        "test/sample_kid_sample/x": 2.0,
    }
    assert names.with_prefix({"mse": 1.0}, "", "final/") == {"final/mse": 1.0}
