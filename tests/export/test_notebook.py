"""What a notebook shows for a sampler."""

import base64
import io
import re
import time
from dataclasses import replace

import pytest
from PIL import Image

from export import notebook
from export.sampler import Sampler


def picture(html):
    """The picture in a sampler's HTML, or None."""
    found = re.search(r'<img src="data:image/png;base64,([^"]+)"', html)
    return None if found is None else Image.open(io.BytesIO(base64.b64decode(found[1])))


@pytest.mark.parametrize("kind", ["image", "point"])
def test_a_notebook_shows_text_and_samples(kind, request):
    sampler = Sampler(request.getfixturevalue(f"{kind}_onnx"), provider="cpu")
    html = sampler._repr_html_()
    assert html.startswith("<pre>&lt;Sampler: ")
    assert "samples of seed 0" in html
    drawn = picture(html)
    assert min(drawn.size) > 100 and len(drawn.convert("L").getcolors(10_000)) > 2
    assert sampler._repr_html_() is html, "drawn once"


def test_a_slow_model_is_shown_without_a_picture(image_onnx, monkeypatch):
    monkeypatch.setattr(notebook, "_SECONDS", 1e-6)
    started = time.monotonic()
    html = Sampler(image_onnx, provider="cpu")._repr_html_()
    assert picture(html) is None and html.startswith("<pre>")
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(("fast", "expected"), [(None, ("dpmpp_2m", 15)), (4, ("fast", None))])
def test_a_long_sampler_is_shown_by_a_shorter_one(image_onnx, monkeypatch, fast, expected):
    asked = []
    sampler = Sampler(image_onnx, provider="cpu")
    own = {**sampler.spec.sampler, **({"fast": {"name": "ddim", "num_steps": fast}} if fast else {})}
    sampler.spec = replace(sampler.spec, sampler=own)
    monkeypatch.setattr(notebook, "_NETWORK_CALLS", 15 if fast is None else 9)
    monkeypatch.setattr(notebook, "_NUM_SAMPLES", {"image": 2})
    if fast is None:
        sampler.spec = replace(sampler.spec, table=sampler.table(num_steps=20))
    draw = sampler.sample
    monkeypatch.setattr(
        sampler, "sample", lambda count, **options: asked.append(options) or draw(count, **options)
    )
    assert picture(sampler._repr_html_()) is not None
    assert [(each["sampler"], each["num_steps"]) for each in asked] == [expected]


def test_a_model_with_conditions_is_shown_as_text(version_2):
    _, spec, content = version_2
    html = Sampler(content, provider="cpu")._repr_html_()
    assert (picture(html) is None) == bool(spec.conditions)
    assert all(each.name in html for each in spec.conditions)
