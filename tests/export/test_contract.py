import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from diffusion.errors import InputError
from export.contract import SamplerSpec
from export.sampler import Sampler
from export.to_onnx import sampler_spec

KEYS = {
    "ray_ddpm.format_version",
    "ray_ddpm.spec",
    "ray_ddpm.timesteps",
    "ray_ddpm.table",
    "ray_ddpm.alphas_cumprod",
}


@pytest.fixture(name="spec", params=["image", "points"])
def _spec(request, image_model, point_model):
    return sampler_spec(image_model if request.param == "image" else point_model)


@pytest.fixture(name="metadata")
def _metadata(image_model):
    return sampler_spec(image_model).to_metadata()


def encoded(values, dtype):
    return base64.b64encode(np.asarray(values, dtype=dtype).tobytes()).decode()


def refused(metadata):
    """Read metadata that is refused, and return the one-line message."""
    with pytest.raises(InputError) as caught:
        SamplerSpec.from_metadata(metadata)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "export" in message  # the remedy
    return message


def test_reading_gives_back_what_was_written(spec):
    actual = SamplerSpec.from_metadata(spec.to_metadata())
    np.testing.assert_array_equal(actual.table.timesteps, spec.table.timesteps)
    np.testing.assert_array_equal(actual.table.coefficients, spec.table.coefficients)
    np.testing.assert_array_equal(actual.table.alphas_cumprod, spec.table.alphas_cumprod)
    for name in ("data", "schedule", "sampler", "provenance"):
        assert getattr(actual, name) == json.loads(json.dumps(getattr(spec, name)))
    assert actual.prediction_type == spec.prediction_type
    assert actual.shape == tuple(spec.data["shape"])


def test_more_rows_than_steps_need_version_2(spec):
    assert spec.format_version == "1"
    two_stages = replace(spec, sampler=spec.sampler | {"num_steps": spec.table.num_rows // 2})
    assert two_stages.format_version == "2"


def test_betas_round_trip_exactly(spec, image_model):
    """Their decimal notation in JSON loses no bit. Both models have the same schedule."""
    actual = SamplerSpec.from_metadata(spec.to_metadata())
    np.testing.assert_array_equal(actual.noise_schedule.betas, image_model.schedule.betas)


def test_the_metadata_have_the_documented_format(spec):
    """Names, JSON without NaN or Infinity, and little-endian base64."""
    metadata = spec.to_metadata()
    assert set(metadata) == KEYS
    assert metadata["ray_ddpm.format_version"] == "1"

    def fail(constant):
        raise AssertionError(constant)

    content = json.loads(metadata["ray_ddpm.spec"], parse_constant=fail)
    assert set(content) == {"data", "schedule", "prediction_type", "sampler", "provenance"}
    assert set(content["data"]) == {"kind", "shape", "mean", "std", "range", "columns"}
    assert {"kind", "betas"} <= set(content["schedule"])
    assert set(content["sampler"]) == {
        "name", "num_steps", "eta", "variance", "spacing", "clip", "guidance_scale",
    }  # fmt: skip
    assert set(content["provenance"]) == {"run_id", "git_revision", "data_fingerprint", "metrics"}

    raw = {name: base64.b64decode(metadata[f"ray_ddpm.{name}"]) for name in ("timesteps", "table")}
    steps = content["sampler"]["num_steps"]
    np.testing.assert_array_equal(np.frombuffer(raw["timesteps"], "<i8"), spec.table.timesteps)
    np.testing.assert_array_equal(
        np.frombuffer(raw["table"], "<f8").reshape(steps, 9), spec.table.coefficients
    )
    alphas_cumprod = np.frombuffer(base64.b64decode(metadata["ray_ddpm.alphas_cumprod"]), "<f8")
    assert alphas_cumprod.shape == (steps + 1,)
    assert alphas_cumprod[-1] == 1.0


def test_an_unclipped_table_keeps_its_infinite_limits(point_model):
    actual = SamplerSpec.from_metadata(sampler_spec(point_model).to_metadata())
    np.testing.assert_array_equal(actual.table.coefficients[:, 7:], [[-np.inf, np.inf]] * 8)


def test_data_units_are_x_times_std_plus_mean(point_model):
    x = np.array([[0.0, 0.0], [1.0, -1.0], [100.0, 100.0]])
    expected = [[1.0, -2.0], [1.5, -5.0], [51.0, 298.0]]
    np.testing.assert_array_equal(sampler_spec(point_model).denormalise(x), expected)


def test_images_are_clipped_to_their_range(image_model):
    x = np.array([-2.0, -1.0, 0.0, 1.0, 3.0])[:, None, None, None] * np.ones((1, 8, 8))
    actual = sampler_spec(image_model).denormalise(x)
    np.testing.assert_array_equal(actual[:, 0, 0, 0], [0.0, 1.0, 5.0, 9.0, 16.0])


def test_unknown_entries_are_ignored(metadata):
    """Other tools for ONNX files add metadata, too."""
    actual = SamplerSpec.from_metadata({**metadata, "author": "somebody"})
    assert actual.shape == SamplerSpec.from_metadata(metadata).shape


def test_metadata_without_our_entries_are_refused():
    assert "export.to_onnx" in refused({})
    assert "export.to_onnx" in refused({"author": "somebody"})


@pytest.mark.parametrize("version", ["3", "0", "", "1.0", "x" * 5000, "1\n"])
def test_another_format_version_is_refused_by_name(metadata, version):
    message = refused({**metadata, "ray_ddpm.format_version": version})
    assert repr(version[:20]) in message
    assert len(message) < 300


@pytest.mark.parametrize("key", sorted(KEYS - {"ray_ddpm.format_version"}))
def test_a_missing_entry_is_refused_by_name(metadata, key):
    del metadata[key]
    assert key in refused(metadata)


@pytest.mark.parametrize("key", ["timesteps", "table", "alphas_cumprod"])
@pytest.mark.parametrize("text", ["", "AAAA", "????", "AAAAAAAAAA", "\u00e9\u00e9\u00e9\u00e9", "AAAA\nAAAA"])
def test_damaged_base64_is_refused(metadata, key, text):
    assert refused({**metadata, f"ray_ddpm.{key}": text})


@pytest.mark.parametrize("key", ["timesteps", "table", "alphas_cumprod"])
def test_a_truncated_array_is_refused(metadata, key):
    name = f"ray_ddpm.{key}"
    assert refused({**metadata, name: metadata[name][:-12]})
    raw = base64.b64decode(metadata[name])
    assert refused({**metadata, name: base64.b64encode(raw[:-8]).decode()})
    assert refused({**metadata, name: base64.b64encode(raw + raw[-8:]).decode()})


@pytest.mark.parametrize("key", ["timesteps", "table", "alphas_cumprod"])
@pytest.mark.parametrize("stray", ["!", "\n", " "])
def test_base64_with_a_stray_character_is_refused(metadata, key, stray):
    name = f"ray_ddpm.{key}"
    assert refused({**metadata, name: metadata[name][:8] + stray + metadata[name][8:]})


@pytest.mark.parametrize("timestep", [-1, 20, 2**62])
def test_timesteps_outside_the_schedule_are_refused(metadata, timestep):
    timesteps = np.frombuffer(base64.b64decode(metadata["ray_ddpm.timesteps"]), "<i8").copy()
    timesteps[3] = timestep
    assert "0..19" in refused({**metadata, "ray_ddpm.timesteps": encoded(timesteps, "<i8")})


@pytest.mark.parametrize("column", range(9), ids="a b c d e f s lo hi".split())
def test_a_table_with_nan_is_refused(metadata, column):
    table = np.frombuffer(base64.b64decode(metadata["ray_ddpm.table"]), "<f8").reshape(-1, 9).copy()
    table[2, column] = np.nan
    assert refused({**metadata, "ray_ddpm.table": encoded(table, "<f8")})


@pytest.mark.parametrize("column", range(7), ids="a b c d e f s".split())
def test_a_table_with_an_infinite_factor_is_refused(metadata, column):
    table = np.frombuffer(base64.b64decode(metadata["ray_ddpm.table"]), "<f8").reshape(-1, 9).copy()
    table[2, column] = -np.inf
    assert "finite" in refused({**metadata, "ray_ddpm.table": encoded(table, "<f8")})


@pytest.mark.parametrize("row", [0, -1])
def test_alphas_cumprod_that_are_not_finite_are_refused(metadata, row):
    values = np.frombuffer(base64.b64decode(metadata["ray_ddpm.alphas_cumprod"]), "<f8").copy()
    values[row] = np.nan
    assert "finite" in refused({**metadata, "ray_ddpm.alphas_cumprod": encoded(values, "<f8")})


def test_an_empty_table_is_refused(metadata):
    empty = {"ray_ddpm.timesteps": "", "ray_ddpm.table": "", "ray_ddpm.alphas_cumprod": encoded([1.0], "<f8")}
    assert refused({**metadata, **empty})


@pytest.mark.parametrize(
    "text", ["", "{", "null", "3", "[]", '"text"', "{}", '{"data": 1}', "\x00", "[" * 50_000]
)
def test_a_spec_that_is_not_the_expected_json_is_refused(metadata, text):
    assert refused({**metadata, "ray_ddpm.spec": text})


@pytest.mark.parametrize("part", ["data", "schedule", "prediction_type", "sampler", "provenance"])
def test_a_spec_without_one_of_its_parts_is_refused_by_name(metadata, part):
    content = json.loads(metadata["ray_ddpm.spec"])
    del content[part]
    assert part in refused({**metadata, "ray_ddpm.spec": json.dumps(content)})


@pytest.mark.parametrize("part", ["surprise", "table"])
def test_a_spec_with_another_part_is_refused_by_name(metadata, part):
    content = json.loads(metadata["ray_ddpm.spec"]) | {part: 1}
    assert part in refused({**metadata, "ray_ddpm.spec": json.dumps(content)})


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"kind": "audio"}),
        ("data", {"kind": None}),
        ("data", {"shape": 64}),
        ("data", {"shape": [1, -8, 8]}),
        ("data", {"shape": [1, 8.5, 8]}),
        ("data", {"shape": ["one", 8, 8]}),
        ("data", {"shape": [10**15]}),
        ("data", {"mean": [[[1.0]], [[2.0]], [[3.0]]]}),
        ("data", {"std": [[[[1.0]]], [[[1.0]]]]}),
        ("data", {"mean": [1.0, 2.0, 3.0]}),
        ("data", {"mean": [[1.0, 2.0], [3.0]]}),
        ("data", {"mean": "five"}),
        ("data", {"std": None}),
        ("data", {"mean": [[[float("nan")]]]}),
        ("data", {"std": [[[float("inf")]]]}),
        ("data", {"range": [0.0]}),
        ("data", {"range": "all"}),
        ("schedule", {"betas": []}),
        ("schedule", {"betas": [[0.1] * 20]}),
        ("schedule", {"betas": [0.0] * 20}),
        ("schedule", {"betas": [1.5] * 20}),
        ("schedule", {"betas": ["small"] * 20}),
        ("schedule", {"betas": None}),
    ],
    ids=str,
)
def test_invalid_values_are_refused(metadata, section, change):
    content = json.loads(metadata["ray_ddpm.spec"])
    content[section] |= change
    assert refused({**metadata, "ray_ddpm.spec": json.dumps(content)})


@pytest.mark.parametrize(
    ("section", "name"),
    [
        *(("data", name) for name in ("kind", "shape", "mean", "std", "range")),
        ("schedule", "betas"),
        *(("sampler", name) for name in ("name", "num_steps", "eta", "variance", "spacing", "clip")),
    ],
)
def test_a_value_missing_from_a_part_is_refused_by_name(metadata, section, name):
    content = json.loads(metadata["ray_ddpm.spec"])
    del content[section][name]
    assert name in refused({**metadata, "ray_ddpm.spec": json.dumps(content)})


def test_an_unknown_prediction_type_is_refused(metadata):
    content = json.loads(metadata["ray_ddpm.spec"]) | {"prediction_type": "score"}
    assert refused({**metadata, "ray_ddpm.spec": json.dumps(content)})


def test_an_error_names_the_file_if_there_is_one(tmp_path, image_onnx, metadata_of, with_metadata):
    metadata = metadata_of(image_onnx)
    bad = {
        "version.onnx": {**metadata, "ray_ddpm.format_version": "99"},
        "table.onnx": {**metadata, "ray_ddpm.table": "????"},
        "foreign.onnx": {},
    }
    for name, changed in bad.items():
        content = with_metadata(image_onnx, changed)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            Sampler(tmp_path / name, provider="cpu")
        assert str(tmp_path / name) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(InputError):
            Sampler(content, provider="cpu")


def test_the_file_contains_the_specs_metadata(image_model, image_onnx, metadata_of):
    assert metadata_of(image_onnx) == sampler_spec(image_model).to_metadata()
