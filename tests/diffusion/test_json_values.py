"""JSON of any content gives its values or one line, and only values of the right type pass."""

import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.files import parse_json, read_json
from diffusion.json_values import check_types, fits, in_words

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=5), parts, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.binary(max_size=40) | st.text(max_size=40))
def test_any_content_is_parsed_or_refused_in_one_line(content):
    for kind in (dict, list):
        try:
            assert isinstance(parse_json(content, kind, "a.json", "give another"), kind)
        except InputError as error:
            assert str(error).startswith("a.json is damaged (") and str(error).isprintable()


@pytest.mark.parametrize(
    "content", [b"", b"  ", b"[" * 100_000, b"9" * 5000, b"\xff", b"{'a': 1}", b"[1]", b"null"]
)
def test_damaged_json_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match="a.json is damaged .*: give a record"):
        read_json(tmp_path / "a.json", "a record")


def test_numbers_that_the_standard_lacks_can_be_refused():
    assert parse_json("[NaN, Infinity]", list, "a", "b")[1] == float("inf")
    with pytest.raises(InputError, match="NaN is no number"):
        parse_json("[NaN]", list, "a", "b", allow_nan=False)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -5, 2**62], [True, 1.0, "1", None, 2**63, [1]]),
        (float, [0, 1.5, float("nan")], [False, "1.5", None, 10**400, [1.0]]),
        (bool, [True, False], [0, 1, "true", None]),
        (str, ["", "é"], [5, None, "\ud800", ["a"]]),
        (int | None, [None, 3], ["", 1.5]),
        (tuple[int, ...], [[], [1, 2], (3,)], [[True], [1.0], {}, 1, "12"]),
        (tuple[float, float], [[1, 2.5]], [[1], [1, 2, 3], ["a", "b"], None]),
        (list[str], [[], ["a"]], ["ab", [1], {"a": "b"}]),
        (dict[str, float], [{}, {"a": 1}], [{"a": "1"}, [], None, {"\ud800": 1}]),
        (Literal["a", 1], ["a", 1], ["b", True, None, ["a"]]),
        (Any, [None, {}, "x"], []),
    ],
    ids=str,
)
def test_a_hint_is_fitted_by_values_of_its_type_only(hint, good, bad):
    assert all(fits(value, hint) for value in good)
    assert not any(fits(value, hint) for value in bad)
    if bad:
        with pytest.raises(InputError) as caught:
            check_types({"x": bad[0], "y": 1}, {"x": hint, "z": int}, "a.")
        assert str(caught.value).startswith("a.x ") and str(caught.value).endswith(f"give {in_words(hint)}")


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_a_config_with_any_value_replaced_is_read_or_refused_in_one_line(data):
    """What is read has kept every value: nothing is taken for what it is not."""
    tree = json.loads(json.dumps(Config().to_dict()))
    section = data.draw(st.sampled_from([name for name in tree if name != "seed"]))
    name = data.draw(st.sampled_from(sorted(tree[section])))
    tree[section][name] = value = data.draw(ANY_JSON)
    try:
        read = Config.from_dict(tree)
    except InputError as error:
        assert str(error).isprintable()
    else:
        kept = getattr(getattr(read, section), name)
        assert kept == (tuple(value) if isinstance(value, list) else value)
        assert isinstance(kept, bool) == isinstance(value, bool)
