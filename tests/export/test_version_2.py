"""Format version 2: files whose models need what version 1 does not have, and hostile ones."""

import base64
import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch

from diffusion.errors import InputError
from diffusion.process.samplers import COEFFICIENTS, sampler_table, step, with_learned_variance
from diffusion.registry import SAMPLERS
from export.contract import SamplerSpec
from export.gpu_loop import fits_device_loop
from export.noise import normal_noise
from export.parity import check_network
from export.sampler import Sampler
from export.to_onnx import export_onnx, sampler_spec
from export.torch_sampler import TorchSampler

CONDITIONS = {
    "low_resolution": np.random.default_rng(0).uniform(0.0, 16.0, (5, 1, 2, 2)),
    "known": np.random.default_rng(1).normal(2.0, 2.0, (5, 3)),
}


def conditions_of(spec):
    return CONDITIONS if spec.conditions else None


def plain_samples(network, spec, count=5, seed=3):
    """The update as docs/onnx-format.md has it, with PyTorch, written out."""
    table, scale = spec.table, spec.sampler["guidance_scale"]
    column = {name: table.coefficients[:, place] for place, name in enumerate(table.columns)}
    levels = table.timesteps if table.noise_levels is None else table.noise_levels
    indices = np.arange(count)

    def call(x, level, labels):
        dtype = torch.int64 if table.noise_levels is None else torch.float32
        inputs = [torch.from_numpy(x).float(), torch.full((count,), level, dtype=dtype)]
        inputs += [torch.from_numpy(labels)] if spec.classes else []
        for each in spec.conditions:
            values = (CONDITIONS[each.name] - np.array(each.mean)) / np.array(each.std)
            inputs.append(torch.from_numpy(values).float())
        outputs = network(*inputs)
        return [each.numpy().astype(float) for each in (outputs if isinstance(outputs, tuple) else [outputs])]

    x = normal_noise(seed, indices, 0, spec.shape)
    x0 = x0_previous = np.zeros_like(x)
    for i, level in enumerate(levels.tolist()):
        out, *variance = call(x, level, indices % 3)
        if spec.classes:
            null, *_ = call(x, level, np.full(count, 3))
            out = null + scale * (out - null)
        x0_previous_2, x0_previous = x0_previous, x0
        x0 = np.clip(column["a"][i] * x + column["b"][i] * out, column["lo"][i], column["hi"][i])
        noise = column["s"][i] * normal_noise(seed, indices, i + 1, spec.shape)
        if variance:
            noise = np.exp(column["g"][i] * variance[0]) * noise
        x = column["c"][i] * x0 + column["d"][i] * x + column["e"][i] * x0_previous + noise
        x = x + column["f"][i] * out
        if "e2" in column:
            x = x + column["e2"][i] * x0_previous_2
    return (x * 4.0 + 5.0).clip(0.0, 16.0)


def test_samples_equal_those_of_a_plain_loop_with_pytorch(version_2):
    network, spec, content = version_2
    sampler = Sampler(content, provider="cpu")
    assert sampler.spec.format_version == "2"
    expected = plain_samples(network, spec)
    assert expected.std() > 0.5
    for batch_size in (5, 2):
        actual = sampler.sample(5, seed=3, conditions=conditions_of(spec), batch_size=batch_size)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())


def test_every_part_of_version_2_changes_the_samples(version_2):
    """Otherwise the comparison above would say nothing about it."""
    network, spec, content = version_2
    table = spec.table
    sampler = Sampler(content, provider="cpu")
    expected = sampler.sample(5, seed=3, conditions=conditions_of(spec))
    if spec.conditions:
        changed = {**CONDITIONS, "known": CONDITIONS["known"] + 1.0}
        actual = sampler.sample(5, seed=3, conditions=changed)
    else:
        proto = onnx.load_from_string(content)
        metadata = spec.to_metadata()
        if table.noise_levels is not None:
            key, values = "ray_ddpm.noise_levels", 1.2 * table.noise_levels
        else:
            key, values = "ray_ddpm.table", table.coefficients.copy()
            values[:, table.columns.index("g" if "g" in table.columns else "e2")] *= 0.5
        onnx.helper.set_model_props(proto, metadata | {key: encoded(values, "<f8")})
        actual = Sampler(proto.SerializeToString(), provider="cpu").sample(5, seed=3)
    assert np.abs(actual - expected).max() > 1e-3


def test_metadata_survive_writing_and_reading(version_2):
    _, spec, _ = version_2
    metadata = spec.to_metadata()
    assert metadata["ray_ddpm.format_version"] == "2"
    read = SamplerSpec.from_metadata(metadata)
    assert read.to_metadata() == metadata
    assert read.graph_inputs == spec.graph_inputs and read.graph_outputs == spec.graph_outputs
    np.testing.assert_array_equal(read.table.coefficients, spec.table.coefficients)


def test_a_faithful_file_passes_parity(version_2):
    network, spec, content = version_2
    cases = check_network(network, content)
    assert all(case.passed for case in cases), cases
    names = [case.name for case in cases]
    assert len(names) == 3 * len(spec.graph_outputs) + (2 if spec.classes else 1)
    assert ("variance, batch 7" in names) == spec.learned_variance
    assert all(case.output_scale > 0.01 for case in cases)


def test_a_changed_network_fails_parity(version_2):
    network, _, content = version_2
    weight = network.outward[-1].weight
    weight.mul_(1.01)
    cases = check_network(network, content)
    weight.div_(1.01)
    assert not all(case.passed for case in cases)


def test_other_samplers_can_be_chosen(version_2):
    """Their rows are at training timesteps; a learned variance is used by ddpm at any number of steps."""
    _, spec, content = version_2
    sampler = Sampler(content, provider="cpu")
    for name in ("ddpm", "ddim", "dpmpp_2m"):
        samples = sampler.sample(5, sampler=name, num_steps=6, eta=0.0, conditions=conditions_of(spec))
        assert samples.std() > 0.5
        table = sampler.table(sampler=name, num_steps=6, eta=0.0)
        assert ("g" in table.columns) == (spec.learned_variance and name == "ddpm")
        assert (table.noise_levels is None) == (spec.noise_level is None)
    if spec.noise_level is not None:
        timesteps = sampler_table(spec.noise_schedule, "ddim", 6, spacing="trailing").timesteps
        np.testing.assert_array_equal(table.noise_levels, spec.noise_levels(timesteps))


def test_progress_counts_network_calls_not_steps(version_2):
    _, spec, content = version_2
    calls = []
    Sampler(content, provider="cpu").sample(
        5, conditions=conditions_of(spec), on_row=lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (8, 8) and len(calls) == 8


def test_models_of_another_signature_run_in_the_loop_on_the_host(version_2, image_sampler):
    _, spec, _ = version_2
    assert fits_device_loop(spec) == ("e2" in spec.table.columns)  # then the engine looks at the table
    assert fits_device_loop(image_sampler.spec)


def test_models_that_need_nothing_new_are_written_as_version_1(image_model, point_model):
    for model in (image_model, point_model):
        metadata = sampler_spec(model).to_metadata()
        assert metadata["ray_ddpm.format_version"] == "1"
        assert "ray_ddpm.columns" not in metadata


def test_the_network_chooses_between_the_two_variances(image_model):
    """At -1 and 1 a row with the column g has the noise of beta_tilde and of beta."""
    schedule = image_model.schedule
    low, high = (sampler_table(schedule, "ddpm", 10, variance=name) for name in ("beta_tilde", "beta"))
    both = with_learned_variance(low, high)
    x, z = np.zeros(3), np.ones(3)
    for index in range(10):
        for sign, table in ((-1.0, low), (1.0, high)):
            row = both.coefficients[index]
            actual, _ = step(row, x, x, x, z, columns=both.columns, variance=sign * np.ones(3))
            expected, _ = step(table.coefficients[index], x, x, x, z)
            np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)


def test_a_step_accepts_tensors():
    columns = (*COEFFICIENTS, "e2", "g")
    row = np.random.default_rng(0).normal(size=len(columns))
    row[7:9] = -1.0, 1.0
    values = np.random.default_rng(1).normal(size=(6, 4))
    x, out, previous, z, previous_2, variance = values
    options = {"columns": columns, "x0_previous_2": previous_2, "variance": variance}
    expected = step(row, x, out, previous, z, **options)
    tensors = {name: torch.from_numpy(options[name]) for name in ("x0_previous_2", "variance")}
    actual = step(row, *map(torch.from_numpy, (x, out, previous, z)), **(options | tensors))
    for tensor, array in zip(actual, expected, strict=True):
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"known": None}, "needs 'known' of shape [3]"),
        ({"colour": np.zeros(3)}, "no such condition"),
        ({"known": np.zeros(4)}, "[5, 3]"),
        ({"known": np.zeros((4, 3))}, "[5, 3]"),
        ({"known": [1.0, 2.0, np.nan]}, "finite"),
        ({"known": [1.0, 2.0, 1e300]}, "finite"),
        ({"known": ["a", "b", "c"]}, "numbers"),
        ({"known": [[1.0], [2.0, 3.0]]}, "numbers"),
    ],
    ids=str,
)
@pytest.mark.parametrize("version_2", ["conditions"], indirect=True)
def test_conditions_are_checked(version_2, change, words):
    given = {name: value for name, value in {**CONDITIONS, **change}.items() if value is not None}
    with pytest.raises(InputError) as caught:
        Sampler(version_2[2], provider="cpu").sample(5, conditions=given)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("version_2", ["conditions"], indirect=True)
def test_one_condition_may_serve_all_samples(version_2):
    sampler = Sampler(version_2[2], provider="cpu")
    one = {name: values[0] for name, values in CONDITIONS.items()}
    each = {name: np.repeat(values[:1], 5, axis=0) for name, values in CONDITIONS.items()}
    expected = sampler.sample(5, conditions=each)
    np.testing.assert_array_equal(sampler.sample(5, conditions=one), expected)


def test_a_model_without_conditions_takes_none(image_sampler):
    with pytest.raises(InputError, match="it has none; leave the conditions out"):
        image_sampler.sample(2, conditions={"known": np.zeros(3)})


def encoded(values, dtype):
    return base64.b64encode(np.asarray(values, dtype=dtype).tobytes()).decode()


def refused(metadata):
    with pytest.raises(InputError) as caught:
        SamplerSpec.from_metadata(metadata)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 400 and "export" in message
    return message


@pytest.mark.parametrize(
    "columns",
    [
        None, 3, "abc", [], list(COEFFICIENTS[1:]), [*COEFFICIENTS, "e3"], [*COEFFICIENTS, "e2"],
        [*COEFFICIENTS, "a"], [*COEFFICIENTS, ["e2"]], [*COEFFICIENTS, None],
        dict.fromkeys(COEFFICIENTS, 1), ["x" * 10**6],
    ],
    ids=lambda columns: str(columns)[:40],
)  # fmt: skip
@pytest.mark.parametrize("version_2", ["sigma"], indirect=True)
def test_other_columns_are_refused(version_2, columns):
    metadata = version_2[1].to_metadata()
    assert refused({**metadata, "ray_ddpm.columns": json.dumps(columns)})


@pytest.mark.parametrize("key", ["columns", "noise_levels", "table", "alphas_cumprod", "spec"])
@pytest.mark.parametrize("version_2", ["sigma"], indirect=True)
def test_missing_and_damaged_entries_are_refused(version_2, key):
    metadata, name = version_2[1].to_metadata(), f"ray_ddpm.{key}"
    assert name in refused({other: value for other, value in metadata.items() if other != name})
    for text in ("", "AAAA", "????", metadata[name][:-12]):
        assert refused({**metadata, name: text})


@pytest.mark.parametrize("level", [np.nan, np.inf, -np.inf, 1e300, 0.0, -1.0])
@pytest.mark.parametrize("version_2", ["sigma"], indirect=True)
def test_noise_levels_outside_their_range_are_refused(version_2, level):
    spec = version_2[1]
    levels = spec.table.noise_levels.copy()
    levels[3] = level
    assert refused({**spec.to_metadata(), "ray_ddpm.noise_levels": encoded(levels, "<f8")})


CONDITION = {"name": "known", "shape": [3], "mean": 0.0, "std": 1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_level": "timestep"}, {"noise_level": None}, {"noise_level": 3}, {"surprise": 1}, {"table": 1},
        {"conditions": None}, {"conditions": "known"}, {"conditions": [1]}, {"conditions": [CONDITION] * 2},
        *(
            {"conditions": [CONDITION | change]}
            for change in (
                {"name": ""}, {"name": "a b"}, {"name": "x" * 65}, {"name": 3}, {"name": "known\n"},
                {"shape": 3}, {"shape": [0]}, {"shape": [2**40]}, {"shape": ["a"]},
                {"mean": [1.0, 2.0]}, {"mean": None}, {"mean": float("nan")}, {"std": 0.0}, {"more": 1},
            )
        ),
        {"sampler": {"variance": "learned"}}, {"sampler": {"num_steps": 9}}, {"sampler": {"num_steps": 0}},
        {"sampler": {"name": "no name"}}, {"data": {"shape": [10**15]}},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("version_2", ["sigma"], indirect=True)
def test_hostile_specs_are_refused(version_2, changes):
    metadata = version_2[1].to_metadata()
    spec = json.loads(metadata["ray_ddpm.spec"])
    for name, value in changes.items():
        spec[name] = spec[name] | value if name in ("sampler", "data") else value
    assert refused({**metadata, "ray_ddpm.spec": json.dumps(spec)})


@pytest.mark.parametrize("version_2", ["variance"], indirect=True)
def test_a_learned_variance_needs_all_of_its_parts(version_2):
    _, spec, content = version_2
    metadata = spec.to_metadata()
    content_of_spec = json.loads(metadata["ray_ddpm.spec"])
    content_of_spec["sampler"]["variance"] = "beta"
    assert "column g" in refused({**metadata, "ray_ddpm.spec": json.dumps(content_of_spec)})
    table = spec.table.coefficients.copy()
    table[-1, -1] = 1.0
    assert "g is not 0" in refused({**metadata, "ray_ddpm.table": encoded(table, "<f8")})
    proto = onnx.load_from_string(content)
    del proto.graph.output[1]
    with pytest.raises(InputError, match="variance tensor"):
        Sampler(proto.SerializeToString(), provider="cpu")


def test_a_part_of_version_2_in_version_1_is_refused(image_model):
    metadata = sampler_spec(image_model).to_metadata()
    for part, value in (("noise_level", "sigma"), ("conditions", [])):
        spec = json.loads(metadata["ray_ddpm.spec"]) | {part: value}
        assert part in refused({**metadata, "ray_ddpm.spec": json.dumps(spec)})


def deployed(model, **values):
    """(model, its file) if it is deployed with this sampler."""
    config = model.config.with_values({f"sampler.{name}": value for name, value in values.items()})
    changed = dataclasses.replace(model, config=config)
    return changed, export_onnx(changed)


@pytest.mark.parametrize(
    ("values", "version", "rows"),
    [
        ({"name": "dpmpp_3m", "num_steps": 8}, "2", 8),
        ({"name": "dpmpp_3m", "num_steps": 3}, "1", 3),  # too few for the third order
        ({"name": "dpmpp_2m_sde", "num_steps": 8}, "1", 8),
        ({"name": "heun", "num_steps": 8}, "2", 15),
        ({"name": "heun_churn", "num_steps": 8, "eta": 0.7}, "2", 15),
        ({"name": "ddim", "num_steps": 8, "spacing": "karras"}, "2", 8),
    ],
    ids=str,
)
def test_models_are_deployed_with_every_sampler_in_the_version_that_it_needs(
    point_model, values, version, rows
):
    model, (content, cases) = deployed(point_model, **{"spacing": "logsnr", "eta": None, **values})
    assert all(case.passed for case in cases)
    sampler = Sampler(content, provider="cpu")
    assert (sampler.spec.format_version, sampler.spec.table.num_rows) == (version, rows)
    by_torch = sampler.spec.denormalise(TorchSampler.of(model).draw(5).samples)
    np.testing.assert_allclose(sampler.sample(5), by_torch, rtol=0, atol=1e-4 * by_torch.std())
    # What the file says about its sampler gives the same table.
    again = sampler.table(sampler=values["name"])
    np.testing.assert_array_equal(again.coefficients, sampler.spec.table.coefficients)


def test_a_file_of_version_1_draws_by_every_sampler(point_model, point_onnx):
    """Also those whose tables have the column e2 and two rows a step."""
    sampler, reference = Sampler(point_onnx, provider="cpu"), TorchSampler.of(point_model)
    assert sampler.spec.format_version == "1"
    drawn = {}
    for name in SAMPLERS:
        table = sampler.table(sampler=name, num_steps=8, spacing="karras")
        states = list(reference.states(5, table))
        drawn[name] = sampler.sample(5, sampler=name, num_steps=8, spacing="karras")
        expected = sampler.spec.denormalise(states[-1])
        np.testing.assert_allclose(drawn[name], expected, rtol=0, atol=1e-4 * expected.std())
    assert len({values.tobytes() for values in drawn.values()}) == len(drawn)


def test_another_sampler_than_the_files_has_its_own_eta(point_onnx):
    """The file is ddim with eta 0.5."""
    sampler = Sampler(point_onnx, provider="cpu")
    assert (sampler.spec.sampler["name"], sampler.spec.sampler["eta"]) == ("ddim", 0.5)

    def table(name, eta=None):
        return sampler.table(sampler=name, num_steps=6, eta=eta).coefficients

    np.testing.assert_array_equal(table("ddim"), table("ddim", 0.5))
    np.testing.assert_array_equal(table("heun_churn"), table("heun_churn", 0.25))
    assert not np.array_equal(table("heun_churn"), table("heun_churn", 0.5))


def test_the_spacing_karras_in_version_1_is_refused(point_model):
    metadata = sampler_spec(point_model).to_metadata()
    assert metadata["ray_ddpm.format_version"] == "1"
    content = json.loads(metadata["ray_ddpm.spec"])
    content["sampler"]["spacing"] = "karras"
    assert "spacing karras" in refused({**metadata, "ray_ddpm.spec": json.dumps(content)})
