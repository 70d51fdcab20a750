"""The readers that were written from docs/onnx-format.md draw what `export.Sampler` draws."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from diffusion.process.schedules import Spacing
from diffusion.registry import SAMPLERS
from export.sampler import Sampler

READER = Path(__file__).parents[2] / "docs" / "onnx_reader.py"
SPACINGS = get_args(Spacing)
SAMPLERS_WITH_ETA = {"ddim": 0.5, "heun_churn": 0.7}


def eta_of(sampler):
    return SAMPLERS_WITH_ETA.get(sampler, 0.0)


@pytest.fixture(scope="module", name="reader")
def _reader():
    return SimpleNamespace(**runpy.run_path(str(READER), run_name="reader"))


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * expected.std())


def conditions_of(spec, count):
    rng = np.random.default_rng(0)
    return {each.name: rng.uniform(0.0, 5.0, (count, *each.shape)) for each in spec.conditions}


def test_the_reader_imports_nothing_of_the_project():
    imported = set()
    for node in ast.walk(ast.parse(READER.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        assert not isinstance(node, ast.ImportFrom)
    assert imported == {"base64", "json", "sys", "numpy", "onnxruntime"}


@pytest.mark.parametrize("kind", ["points", "image", "conditional"])
def test_it_runs_as_a_program_without_the_project(kind, request, tmp_path):
    """In an isolated interpreter (-I), with the file's default sampler."""
    names = {"points": "point_file", "image": "image_file", "conditional": "conditional_file"}
    path = request.getfixturevalue(names[kind])
    result = subprocess.run(
        [sys.executable, "-I", READER, path, "7", "samples.npy"],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "samples.npy: 7 samples\n"
    assert_same(np.load(tmp_path / "samples.npy"), Sampler(path, provider="cpu").sample(7))


@pytest.mark.parametrize("kind", ["points", "image"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_computes_every_sampler_at_every_spacing(reader, kind, sampler, spacing, request):
    path = request.getfixturevalue("point_file" if kind == "points" else "image_file")
    peer = Sampler(path, provider="cpu")
    session, spec, _ = reader.read(str(path))
    eta = eta_of(sampler)
    for num_steps in (1, 2, 7, 20):
        table = reader.build_table(spec, sampler, num_steps, eta, spacing)
        actual = reader.sample(session, spec, table, 3, seed=5)
        choices = {"sampler": sampler, "num_steps": num_steps, "eta": eta, "spacing": spacing}
        assert_same(actual, peer.sample(3, seed=5, **choices))
        expected = peer.table(**choices)
        np.testing.assert_array_equal(table["timestep"], expected.timesteps)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_it_computes_the_tables_of_every_prediction_type(reader, prediction_type, point_file):
    peer = Sampler(point_file, provider="cpu")
    _, spec, _ = reader.read(str(point_file))
    own = replace(peer.spec, prediction_type=prediction_type)
    peer._engine.spec = peer.spec = own
    for sampler in SAMPLERS:
        eta = eta_of(sampler)
        table = reader.build_table(spec | {"prediction_type": prediction_type}, sampler, 9, eta, "logsnr")
        expected = peer.table(sampler=sampler, num_steps=9, eta=eta, spacing="logsnr")
        for name in expected.columns:
            np.testing.assert_allclose(table[name], expected.column(name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 2**32 + 9])
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 4.0])
def test_it_guides_by_labels(reader, conditional_file, scale, seed):
    peer = Sampler(conditional_file, provider="cpu")
    opened = reader.read(str(conditional_file))
    for labels in (None, [2, 2, 0, 1, 0]):
        actual = reader.sample(*opened, 5, seed=seed, labels=labels, guidance_scale=scale)
        assert_same(actual, peer.sample(5, seed=seed, labels=labels, guidance_scale=scale))


def test_it_reads_version_2(reader, version_2, tmp_path):
    (tmp_path / "sampler.onnx").write_bytes(version_2[2])
    peer = Sampler(tmp_path / "sampler.onnx", provider="cpu")
    session, spec, table = reader.read(str(tmp_path / "sampler.onnx"))
    conditions = conditions_of(peer.spec, 5)
    actual = reader.sample(session, spec, table, 5, seed=5, conditions=conditions)
    assert_same(actual, peer.sample(5, seed=5, conditions=conditions))
    for sampler in SAMPLERS:
        eta = eta_of(sampler)
        other = reader.build_table(spec, sampler, 6, eta, "trailing")
        actual = reader.sample(session, spec, other, 5, seed=5, conditions=conditions)
        expected = peer.sample(5, seed=5, sampler=sampler, num_steps=6, eta=eta, conditions=conditions)
        assert_same(actual, expected)


@pytest.mark.parametrize(("resampling", "jump_length"), [(1, 1), (3, 2)])
def test_it_draws_around_known_values_and_from_given_starts(
    reader, version_2, resampling, jump_length, tmp_path
):
    """Also for tables with e2, noise levels, a learned variance, and two rows a step."""
    (tmp_path / "sampler.onnx").write_bytes(version_2[2])
    peer = Sampler(tmp_path / "sampler.onnx", provider="cpu")
    session, spec, table = reader.read(str(tmp_path / "sampler.onnx"))
    rng = np.random.default_rng(0)
    values, start = rng.uniform(0.0, 16.0, (2, 3, *peer.spec.shape))
    unknown = rng.random(values.shape) < 0.5
    options = {"seed": 5, "conditions": conditions_of(peer.spec, 3), "resampling": resampling}
    options |= {"jump_length": jump_length, "known": values}
    for strength in (None, 1.0, 0.6, 0.01):
        ours = options | ({} if strength is None else {"strength": strength, "start_from": start})
        theirs = options | ({} if strength is None else {"strength": strength, "start": start})
        expected = peer.sample(3, **ours, mask=unknown)
        assert_same(reader.sample(session, spec, table, 3, **theirs, unknown=unknown), expected)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_its_own_tables_start_from_given_samples(reader, sampler, point_file):
    peer = Sampler(point_file, provider="cpu")
    session, spec, _ = reader.read(str(point_file))
    table = reader.build_table(spec, sampler, 7, 0.0, "logsnr")
    start = np.array([[1.0, -2.0], [0.5, 3.0], [0.0, 0.0]])
    known, unknown = np.array([1.5, 0.0]), np.array([0, 1])
    options = {"known": known, "resampling": 2, "strength": 0.5}
    actual = reader.sample(session, spec, table, 3, **options, unknown=unknown, start=start, num_steps=7)
    choices = {"sampler": sampler, "num_steps": 7, "eta": 0.0, "spacing": "logsnr"}
    assert_same(actual, peer.sample(3, **options, mask=unknown, start_from=start, **choices))


@pytest.mark.parametrize("version_2", ["conditions"], indirect=True)
def test_it_refuses_a_missing_condition(reader, version_2, tmp_path):
    (tmp_path / "sampler.onnx").write_bytes(version_2[2])
    with pytest.raises(SystemExit, match="needs the condition low_resolution"):
        reader.sample(*reader.read(str(tmp_path / "sampler.onnx")), 5)


@pytest.mark.parametrize("change", ["version", "part"])
def test_it_refuses_what_it_does_not_know(reader, change, image_onnx, metadata_of, with_metadata, tmp_path):
    metadata = metadata_of(image_onnx)
    if change == "version":
        metadata["ray_ddpm.format_version"] = "3"
    else:
        metadata["ray_ddpm.spec"] = metadata["ray_ddpm.spec"].replace("{", '{"later": 1, ', 1)
    (tmp_path / "sampler.onnx").write_bytes(with_metadata(image_onnx, metadata))
    with pytest.raises(SystemExit, match="is not known"):
        reader.read(str(tmp_path / "sampler.onnx"))


def test_the_test_vector_of_the_page_is_right(reader):
    zero = np.zeros(1, dtype=np.uint32)
    words = [f"0x{int(word[0]):08X}" for word in reader.threefry(zero, zero, zero, zero)]
    page = READER.with_name("onnx-format.md").read_text()
    assert f"give the words {words[0]}, {words[1]}." in page


# The reader in JavaScript. Each test is one process, which draws all of its cases.

JS_READER = READER.with_suffix(".mjs")
JS_CASES = f"""
import {{ readFileSync }} from "node:fs";
const {{ read, sample, buildTable }} = await import("{JS_READER.as_uri()}");
const found = [];
for (const {{ path, choices, count, ...options }} of JSON.parse(readFileSync(0, "utf8"))) {{
  const model = await read(path);
  const {{ sampler, num_steps, eta, spacing }} = choices ?? {{}};
  const table = choices ? buildTable(model.spec, sampler, num_steps, {{ eta, spacing }}) : model.table;
  found.push(Array.from(await sample(model, table, count, options)));
}}
console.log(JSON.stringify(found));
"""


def node(*arguments, **options):
    return subprocess.run(
        ["node", *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture(scope="module", name="run_js")
def _run_js():
    """A function from cases to their samples, flat. The module is found by NODE_PATH."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    if node("-e", "require.resolve('onnxruntime-node')").returncode:
        pytest.skip("onnxruntime-node is not installed: make javascript")

    def run(cases):
        result = node("--input-type=module", "-e", JS_CASES, input=json.dumps(cases))
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def assert_same_in_js(actual, expected):
    assert_same(np.array(actual, dtype=np.float32).reshape(expected.shape), expected)


def test_javascript_runs_as_a_program(run_js, image_file, tmp_path):
    path = tmp_path / "samples.npy"
    result = node(JS_READER, image_file, 7, path)
    assert (result.returncode, result.stdout) == (0, f"{path}: 7 samples\n"), result.stderr
    assert_same(np.load(path), Sampler(image_file, provider="cpu").sample(7))


@pytest.mark.parametrize("kind", ["points", "image"])
def test_javascript_computes_every_sampler_at_every_spacing(run_js, kind, request):
    path = request.getfixturevalue("point_file" if kind == "points" else "image_file")
    cases = [
        {"sampler": sampler, "num_steps": num_steps, "eta": eta_of(sampler), "spacing": spacing}
        for sampler in SAMPLERS
        for spacing in SPACINGS
        for num_steps in (1, 2, 7, 20)
    ]
    actual = run_js([{"path": str(path), "choices": choices, "count": 2, "seed": 5} for choices in cases])
    peer = Sampler(path, provider="cpu")
    for choices, samples in zip(cases, actual, strict=True):
        assert_same_in_js(samples, peer.sample(2, seed=5, **choices))


def test_javascript_guides_by_labels(run_js, conditional_file):
    path, labels = str(conditional_file), [2, 2, 0, 1, 0]
    cases = [{"path": path, "count": 5}]
    cases += [
        {"path": path, "count": 5, "seed": 2**32 + 9, "labels": labels, "guidanceScale": scale}
        for scale in (0.0, 1.0, 4.0)
    ]
    own, *guided = run_js(cases)
    peer = Sampler(conditional_file, provider="cpu")
    assert_same_in_js(own, peer.sample(5))
    for case, samples in zip(cases[1:], guided, strict=True):
        scale = case["guidanceScale"]
        assert_same_in_js(samples, peer.sample(5, seed=9, labels=labels, guidance_scale=scale))


def test_javascript_reads_version_2(run_js, version_2, tmp_path):
    path = tmp_path / "sampler.onnx"
    path.write_bytes(version_2[2])
    peer = Sampler(path, provider="cpu")
    conditions = conditions_of(peer.spec, 5)
    flat = {name: values.ravel().tolist() for name, values in conditions.items()}
    other = {"sampler": "ddpm", "num_steps": 6, "eta": 0.0, "spacing": "trailing"}
    common = {"path": str(path), "count": 5, "seed": 5, "conditions": flat}
    own, changed = run_js([common, common | {"choices": other}])
    assert_same_in_js(own, peer.sample(5, seed=5, conditions=conditions))
    assert_same_in_js(changed, peer.sample(5, seed=5, conditions=conditions, **other))


@pytest.mark.parametrize("change", ["version", "part"])
def test_javascript_refuses_what_it_does_not_know(
    run_js, change, image_onnx, metadata_of, with_metadata, tmp_path
):
    metadata = metadata_of(image_onnx)
    if change == "version":
        metadata["ray_ddpm.format_version"] = "3"
    else:
        metadata["ray_ddpm.spec"] = metadata["ray_ddpm.spec"].replace("{", '{"later": 1, ', 1)
    (tmp_path / "sampler.onnx").write_bytes(with_metadata(image_onnx, metadata))
    result = node(JS_READER, tmp_path / "sampler.onnx", 2, tmp_path / "samples.npy")
    assert result.returncode == 1 and "is not known" in result.stderr
