"""Metadata of any content give a sampler whose every use works, or one line."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.errors import InputError
from export.contract import FAST, SPEC_KEY, SamplerSpec
from export.output import save_samples

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 5)
    | st.sampled_from([10**30, 1e308, float("nan"), float("inf"), 0.5])
    | st.sampled_from(["", "1", "x", "\ud800", "a\nb"])
)
ANY = st.recursive(
    VALUES,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=3), parts, max_size=2),
)


def paths(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


def replaced(tree, path, value):
    if not path:
        return value
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return tree


@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data())
def test_a_spec_with_any_value_replaced_is_used_or_refused(point_onnx, image_onnx, metadata_of, data, folder):
    metadata = metadata_of(data.draw(st.sampled_from([point_onnx, image_onnx])))
    tree = json.loads(metadata[SPEC_KEY])
    path = data.draw(
        st.sampled_from([path for path in paths(tree) if path[:1] != ("provenance",) or len(path) < 3])
    )
    tree = replaced(tree, path, data.draw(ANY))
    try:
        spec = SamplerSpec.from_metadata(metadata | {SPEC_KEY: json.dumps(tree)})
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 400
        return
    samples = spec.denormalise(np.zeros((3, *spec.shape))).astype(np.float32)
    for suffix in (".png", ".npy", ".csv") if spec.data["kind"] == "points" else (".png", ".npy"):
        try:
            save_samples(samples, spec, folder / f"samples{suffix}")
        except InputError as error:
            assert "channels" in str(error)
    assert spec.graph_inputs and isinstance(spec.classes, list)
    assert np.isfinite(samples).all()


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    return tmp_path_factory.mktemp("samples")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("data", "columns"), 5),
        (("data", "columns"), ["only one"]),
        (("data", "columns"), [1, 2]),
        (("data", "mean"), ["0.5", "0.5"]),
        (("data", "mean"), [True, False]),
        (("data", "std"), [float("nan"), 1.0]),
        (("data", "std"), "1"),
        (("data", "range"), [0.0, 1.0]),
        (("data", "shape"), [True, 2]),
        (("data", "classes"), "ab"),
        (("schedule", "betas"), ["0.1"]),
        (("schedule", "kind"), 5),
        (("sampler", "num_steps"), True),
        (("sampler", "eta"), False),
        (("sampler", "clip"), "ab"),
        (("sampler", "clip"), {"0": 1, "1": 2}),
        (("provenance",), []),
    ],
    ids=str,
)
def test_values_of_wrong_types_are_refused(point_onnx, metadata_of, path, value):
    metadata = metadata_of(point_onnx)
    tree = replaced(json.loads(metadata[SPEC_KEY]), path, value)
    with pytest.raises(InputError, match="metadata is damaged") as caught:
        SamplerSpec.from_metadata(metadata | {SPEC_KEY: json.dumps(tree)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eta", -0.1),
        ("eta", 1.1),
        ("guidance_scale", -1.0),
        ("guidance_scale", 101.0),
        ("num_steps", 0),
        ("variance", "learned"),
        ("spacing", "even"),
        ("clip", [1.0, -1.0]),
        (FAST, {"name": "ddim", "num_steps": 0}),
        (FAST, {"name": "ddim", "num_steps": 10**6}),
        (FAST, {"name": "no name", "num_steps": 2}),
        (FAST, {"name": "ddim"}),
    ],
    ids=str,
)
def test_samplers_out_of_range_are_refused(point_onnx, metadata_of, name, value):
    metadata = metadata_of(point_onnx)
    tree = replaced(json.loads(metadata[SPEC_KEY]), ("sampler", name), value)
    with pytest.raises(InputError, match="metadata is damaged"):
        SamplerSpec.from_metadata(metadata | {SPEC_KEY: json.dumps(tree)})


@pytest.mark.parametrize("value", [None, [1.0], [0.0, "1"], [2.0, 1.0], 5])
def test_images_need_a_range(image_onnx, metadata_of, value):
    metadata = metadata_of(image_onnx)
    tree = replaced(json.loads(metadata[SPEC_KEY]), ("data", "range"), value)
    with pytest.raises(InputError, match="images have range"):
        SamplerSpec.from_metadata(metadata | {SPEC_KEY: json.dumps(tree)})
