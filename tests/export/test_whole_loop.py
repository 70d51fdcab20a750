"""Files that draw finished samples in one call, compared with export.Sampler."""

import json
import shutil
import subprocess

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from diffusion.config import SamplerConfig
from diffusion.errors import InputError
from diffusion.registry import SAMPLERS
from export import noise, whole_loop
from export.graph_builder import GraphBuilder, onnx_file
from export.loop_format import loop_columns, loop_feeds, loop_table
from export.noise_graph import BitwiseWords, normal_noise, threefry
from export.parity import ParityError, require
from export.sampler import Sampler
from export.to_onnx import main
from export.whole_loop import compare_loop

CPU = ["CPUExecutionProvider"]


def run(content, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    (samples,) = onnxruntime.InferenceSession(content, options, providers=CPU).run(["samples"], feeds)
    return samples


@pytest.fixture(name="file_and_sampler", params=["image", "points"])
def _file_and_sampler(request, image_onnx, image_sampler, point_onnx, point_sampler):
    return (image_onnx, image_sampler) if request.param == "image" else (point_onnx, point_sampler)


@pytest.mark.parametrize("in_graph_noise", [False, True])
def test_one_call_draws_the_samplers_samples(file_and_sampler, in_graph_noise):
    """The file's own table is the default, and any other is an input. Noise that is given is float32."""
    content, sampler = file_and_sampler
    file = whole_loop.whole_loop(content, in_graph_noise=in_graph_noise)
    expected = sampler.sample(5, seed=3)
    actual = run(file, loop_feeds(sampler.spec, 5, 3, in_graph_noise=in_graph_noise))
    assert (actual.dtype, actual.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())
    for name in SAMPLERS:
        table = sampler.table(sampler=name, num_steps=6)
        feeds = loop_feeds(sampler.spec, 5, 3, in_graph_noise=in_graph_noise, table=table)
        expected = sampler.sample(5, seed=3, sampler=name, num_steps=6)
        tolerance = (1e-5 if in_graph_noise else 1e-4) * expected.std()
        np.testing.assert_allclose(run(file, feeds), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("in_graph_noise", [False, True])
def test_every_kind_of_model_goes_into_a_loop(version_2, in_graph_noise):
    """Noise levels, learned variances, methods of order 3, conditions, classes with and without guidance."""
    _, spec, content = version_2
    cases = compare_loop(
        whole_loop.whole_loop(content, in_graph_noise=in_graph_noise), Sampler(content, provider="cpu")
    )
    assert [case for case in cases if not case.passed] == []
    assert len(cases) == (1 + len(SAMPLERS)) * (3 if spec.classes else 1)
    assert max(case.max_abs_error for case in cases) < (1e-5 if in_graph_noise else 5e-5)


def test_labels_and_guidance_are_inputs(version_2):
    _, spec, content = version_2
    if not spec.classes:
        pytest.skip("no classes")
    sampler, file = Sampler(content, provider="cpu"), whole_loop.whole_loop(content, in_graph_noise=True)
    conditions = {each.name: np.full(each.shape, 2.0) for each in spec.conditions}
    drawn = []
    for scale in (None, 0.0, 1.0, 7.5):
        for labels in ("dog", [0, 2]):
            choices = {"labels": labels, "guidance_scale": scale, "conditions": conditions}
            actual = run(file, loop_feeds(spec, 2, 9, in_graph_noise=True, **choices))
            expected = sampler.sample(2, seed=9, **choices)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
            drawn.append(actual)
    assert len({each.tobytes() for each in drawn}) > 5


def test_a_broken_loop_is_found(point_onnx, point_sampler):
    """Each of a wrong table, a wrong network and a wrong conversion to data units."""
    file = whole_loop.whole_loop(point_onnx)
    require(compare_loop(file, point_sampler))
    for value in (0.5, 3.0):  # the standard deviation of a column, and its mean
        proto = onnx.load_from_string(file)
        changed = 0
        for tensor in proto.graph.initializer:
            array = numpy_helper.to_array(tensor).copy()
            if array.dtype == np.float64 and array.shape == (2,) and value in array:
                array[0] += 0.001
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
                changed += 1
        assert changed == 1
        with pytest.raises(ParityError, match="whole loop"):
            require(compare_loop(proto.SerializeToString(), point_sampler))
    own = next(
        each
        for each in onnx.load_from_string(file).graph.initializer
        if numpy_helper.to_array(each).shape == (point_sampler.spec.table.num_rows, 11)
    )
    table = numpy_helper.to_array(own).copy()
    table[3, 3] *= 1.01
    proto = onnx.load_from_string(file)
    for tensor in proto.graph.initializer:
        if tensor.name == own.name:
            tensor.CopyFrom(numpy_helper.from_array(table, own.name))
    cases = compare_loop(proto.SerializeToString(), point_sampler)
    assert [case.name for case in cases if not case.passed] == ["whole loop"]


def test_a_sampler_without_fresh_noise_needs_only_the_first(image_onnx, image_sampler):
    file, table = whole_loop.whole_loop(image_onnx), image_sampler.table(sampler="ddim")
    feeds = loop_feeds(image_sampler.spec, 3, 1, table=table)
    assert feeds["noise"].shape == (1, 3, 1, 8, 8)
    expected = image_sampler.sample(3, seed=1, sampler="ddim")
    np.testing.assert_allclose(run(file, feeds), expected, rtol=0, atol=1e-4)
    feeds["noise"] = np.concatenate([feeds["noise"], np.full((10, 3, 1, 8, 8), np.nan, dtype=np.float32)])
    np.testing.assert_allclose(run(file, feeds), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("seed", "first_index"), [(0, 0), (-1, 5), (2**40 + 3, 2**32 - 2)])
def test_the_file_makes_the_noise_of_a_seed(point_onnx, point_sampler, seed, first_index):
    """Of any seed, from any sample on."""
    file = whole_loop.whole_loop(point_onnx, in_graph_noise=True)
    feeds = loop_feeds(point_sampler.spec, 2, seed, in_graph_noise=True)
    feeds["first_index"] = np.array(first_index)
    expected = point_sampler.sample(2, seed=seed, first_index=first_index)
    np.testing.assert_allclose(run(file, feeds), expected, rtol=0, atol=1e-5 * expected.std())


def test_inputs_that_must_be_given_stand_for_the_files_own_if_empty(point_onnx, point_sampler):
    for in_graph_noise in (False, True):
        choices = {"in_graph_noise": in_graph_noise, "required_inputs": True}
        file = whole_loop.whole_loop(point_onnx, **choices)
        proto = onnx.load_from_string(file)
        assert not {each.name for each in proto.graph.input} & {each.name for each in proto.graph.initializer}
        feeds = loop_feeds(point_sampler.spec, 3, 1, **choices)
        assert feeds["table"].shape == (0, 11)
        expected = point_sampler.sample(3, seed=1)
        np.testing.assert_allclose(run(file, feeds), expected, rtol=0, atol=1e-5 * expected.std())
        assert all(case.passed for case in compare_loop(file, point_sampler))


def test_the_graphs_words_and_noise_are_numpys():
    """All words, those that wrap around as well; odd and even numbers of elements."""
    builder = GraphBuilder("words/")
    names = ("key0", "key1", "x0", "x1")
    outputs = threefry(builder, BitwiseWords(builder), names[:2], names[2:])
    for index, name in enumerate(outputs):
        builder.op("Identity", name, output=f"w{index}")
    graph = builder.graph(
        "words",
        {name: ("uint32", ["n"]) for name in names},
        {f"w{index}": ("uint32", ["n"]) for index in range(2)},
    )
    words = np.random.default_rng(0).integers(2**32, size=(4, 1000), dtype=np.uint32)
    words[:, :2] = [[0, 2**32 - 1]] * 4
    session = onnxruntime.InferenceSession(onnx_file(graph).SerializeToString(), providers=CPU)
    actual = session.run(["w0", "w1"], dict(zip(names, words, strict=True)))
    np.testing.assert_array_equal(actual, noise.threefry(tuple(words[:2]), tuple(words[2:])))
    for shape in ((1,), (2,), (3, 3, 3), (1, 8, 8)):
        builder = GraphBuilder("noise/")
        z = normal_noise(builder, BitwiseWords(builder), "seeds", "indices", "k", shape)
        builder.op("Identity", z, output="z")
        graph = builder.graph(
            "noise",
            {"seeds": ("uint32", ["m"]), "indices": ("uint32", ["n"]), "k": ("uint32", [])},
            {"z": ("float64", ["n", *shape])},
        )
        session = onnxruntime.InferenceSession(onnx_file(graph).SerializeToString(), providers=CPU)
        for k in (0, 1, 2**31 + 7):
            indices = np.array([0, 5, 2**32 - 1])
            (actual,) = session.run(
                ["z"],
                {
                    "seeds": noise.seed_words([7]),
                    "indices": indices.astype(np.uint32),
                    "k": np.array(k, dtype=np.uint32),
                },
            )
            expected = noise.normal_noise(7, indices, k, shape)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


def test_the_metadata_say_what_the_file_is_and_the_sampler_refuses_it(point_onnx, point_sampler, metadata_of):
    for in_graph_noise, word in ((False, "input"), (True, "in the graph")):
        file = whole_loop.whole_loop(point_onnx, in_graph_noise=in_graph_noise)
        content = json.loads(metadata_of(file)["ray_ddpm.whole_loop"])
        assert content == {
            "version": "1",
            "columns": list(loop_columns(point_sampler.spec)),
            "rows": 8,
            "noise": word,
        }
        assert json.loads(metadata_of(file)["ray_ddpm.spec"]) == json.loads(
            metadata_of(point_onnx)["ray_ddpm.spec"]
        )
        with pytest.raises(InputError, match="is a whole loop, which .* give the sampler.onnx") as caught:
            Sampler(file, provider="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="whole loop"):
        whole_loop.whole_loop(file)


def test_a_table_that_needs_another_network_is_refused(point_sampler, version_2):
    _, spec, _ = version_2
    if spec.learned_variance:
        with pytest.raises(InputError, match="columns g"):
            loop_table(point_sampler.spec, spec.table)


@pytest.mark.parametrize("arguments", [[], ["--in-graph-noise"], ["--required-inputs"]])
def test_the_command_writes_a_checked_file(
    point_model, point_onnx, give_graph, tmp_path, monkeypatch, capsys, arguments
):
    give_graph(onnx.load_from_string(point_onnx))
    point_model.save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert main(["model", "--whole-loop", *arguments]) == 0
    assert "comparisons with export.sampler passed, largest difference" in capsys.readouterr().out
    inputs = [each.name for each in onnxruntime.InferenceSession(tmp_path / "whole-loop.onnx").get_inputs()]
    expected = {"--in-graph-noise": ["num_samples", "seed"], "--required-inputs": ["noise", "table"]}
    assert inputs == expected.get((arguments or [""])[-1], ["noise"])


def test_the_command_writes_no_file_that_differs(
    point_model, point_onnx, give_graph, tmp_path, monkeypatch, capsys
):
    give_graph(onnx.load_from_string(point_onnx))
    point_model.save(tmp_path / "model")
    monkeypatch.setattr(whole_loop, "TOLERANCE", -1.0)
    output = tmp_path / "loop.onnx"
    assert main([str(tmp_path / "model"), "--whole-loop", "--output", str(output)]) == 1
    assert "parity failed (whole loop)" in capsys.readouterr().err
    assert not output.exists()


def test_flags_of_a_whole_loop_need_it(tmp_path, capsys):
    for flag in ("--in-graph-noise", "--required-inputs"):
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path), flag])
        assert ended.value.code == 2
        assert "give --whole-loop too" in capsys.readouterr().err


JAVASCRIPT = """
const ort = require("onnxruntime-node");
const { readFileSync } = require("node:fs");
(async () => {
  const session = await ort.InferenceSession.create("loop.onnx");
  const table = JSON.parse(readFileSync("table.json"));
  const results = [];
  for (const rows of [[], table]) {
    const { samples } = await session.run({
      num_samples: new ort.Tensor("int64", [3n], []),
      seed: new ort.Tensor("int64", [7n], []),
      first_index: new ort.Tensor("int64", [0n], []),
      table: new ort.Tensor("float64", Float64Array.from(rows.flat(), Number), [rows.length, 11]),
    });
    results.push(Array.from(samples.data));
  }
  console.log(JSON.stringify(results));
})();
"""


def test_javascript_draws_the_same_samples_in_one_call(point_onnx, point_sampler, tmp_path):
    find = ["node", "-e", "require.resolve('onnxruntime-node')"]
    if shutil.which("node") is None or subprocess.run(find, capture_output=True).returncode:
        pytest.skip("onnxruntime-node is not installed: make javascript")
    file = whole_loop.whole_loop(point_onnx, in_graph_noise=True, required_inputs=True)
    (tmp_path / "loop.onnx").write_bytes(file)
    table = point_sampler.table(sampler="dpmpp_2m", num_steps=5)
    rows = [
        [str(value).replace("inf", "Infinity") for value in row]
        for row in loop_table(point_sampler.spec, table)
    ]
    (tmp_path / "table.json").write_text(json.dumps(rows))
    result = subprocess.run(
        ["node", "-e", JAVASCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    own, other = json.loads(result.stdout)
    for actual, choices in ((own, {}), (other, {"sampler": "dpmpp_2m", "num_steps": 5})):
        expected = point_sampler.sample(3, seed=7, **choices)
        np.testing.assert_allclose(
            np.reshape(actual, expected.shape), expected, rtol=0, atol=1e-4 * expected.std()
        )


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_points_with_classes_go_into_a_loop(make_model, scale):
    """A real network with labels, exported as users do."""
    from dataclasses import replace

    from export.exporter import export_whole_loop, onnx_model
    from export.torch_sampler import TorchSampler
    from tests.export.conftest import POINTS

    sampler = SamplerConfig(name="dpmpp_2m", num_steps=4, guidance_scale=scale)
    model = make_model(replace(POINTS, classes=("a", "b")), sampler)
    file, cases = export_whole_loop(onnx_model(TorchSampler.of(model)).SerializeToString())
    assert len(cases) == 3 * (1 + len(SAMPLERS))
    inputs = [each.name for each in onnx.load_from_string(file).graph.input]
    assert inputs == ["noise", "table", "y", "guidance_scale"]
