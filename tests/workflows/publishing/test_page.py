"""Pages, and the numbers in them."""

import base64
import gzip
import math

import pytest

from workflows.publishing.formatting import duration, with_error
from workflows.publishing.page import plotting_library, write_page


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.12345, 0.0123, "0.123 ± 0.012"),
        (2.9, 0.5, "2.90 ± 0.50"),
        (1234.5, 12.0, "1234 ± 12"),
        (-0.0002, 0.0015, "-0.0002 ± 0.0015"),
        (12345.0, 678.0, "1.234e+04 ± 6.8e+02"),
        (0.12345, None, "0.1235"),
        (0.12345, math.nan, "0.1235"),
        (0.5, 0.0, "0.5"),
        (math.nan, 0.1, "not measured"),
        (None, None, "not measured"),
    ],
)
def test_a_value_has_as_many_decimals_as_its_error(value, error, text):
    assert with_error(value, error) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (90.0, "1.5 min"), (5400.0, "1.5 h")]
)
def test_durations_have_the_unit_that_suits_them(seconds, text):
    assert duration(seconds) == text


def test_values_are_escaped_in_every_template(tmp_path):
    (tmp_path / "a.html.jinja").write_text(
        '{% extends "page.html.jinja" %}{% block content %}<p title="{{ x }}">{{ x }}</p>{% endblock %}'
    )
    page = write_page(tmp_path / "a.html", tmp_path / "a.html.jinja", x='"<b>&')
    assert '<p title="&#34;&lt;b&gt;&amp;">&#34;&lt;b&gt;&amp;</p>' in page.read_text()


def test_the_library_is_packed_and_the_same_each_time():
    packed = plotting_library()
    plotting_library.cache_clear()
    assert packed == plotting_library() and len(packed) < 3e6
    assert b"Plotly" in gzip.decompress(base64.b64decode(packed))
