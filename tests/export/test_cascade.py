"""Chains of exported models, with networks that tell what they received."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from diffusion.errors import InputError
from diffusion.process.samplers import sampler_table
from diffusion.process.schedules import NoiseSchedule
from export.cascade import Cascade, cascade_files
from export.conditions import LOW_RESOLUTION, LOW_RESOLUTION_NOISE
from export.contract import ConditionSpec, SamplerSpec
from export.noise import condition_noise, normal_noise, stage_seed, threefry
from export.sampler import Sampler, main

BETAS = [0.1, 0.3, 0.5]
MEAN, STD, RANGE = 100.0, 50.0, [0.0, 255.0]


def spec_of(side, low_side=None, classes=None, conditions=None, value_range=RANGE, noise=0.2):
    """A model of images that predicts x_0 and samples in three steps of ddim."""
    table = sampler_table(NoiseSchedule(BETAS), "ddim", 3, prediction_type="sample", clip=None)
    if conditions is None and low_side is not None:
        conditions = [
            ConditionSpec(LOW_RESOLUTION, (1, low_side, low_side), MEAN, STD),
            ConditionSpec(LOW_RESOLUTION_NOISE, (), 0.0, 1.0),
        ]
    sampler = {
        "name": "ddim", "num_steps": 3, "eta": 0.0, "variance": "beta_tilde", "spacing": "leading",
        "clip": None, "guidance_scale": 1.0, **({LOW_RESOLUTION_NOISE: noise} if low_side else {}),
    }  # fmt: skip
    data = {"kind": "image", "shape": [1, side, side], "mean": MEAN, "std": STD, "range": value_range}
    return SamplerSpec(
        data={**data, "columns": None, "classes": classes},
        schedule={"kind": "constant", "betas": BETAS},
        prediction_type="sample",
        sampler=sampler,
        provenance={"run_id": None, "git_revision": None, "data_fingerprint": "", "metrics": {}},
        table=table,
        conditions=tuple(conditions or ()),
    )


def file_of(spec):
    """A network whose x_0 is 0.1 x, plus, for a second model, the enlarged image and ten times its noise."""
    inputs = [
        helper.make_tensor_value_info(name, getattr(TensorProto, dtype.upper().replace("FLOAT32", "FLOAT")),
                                      ["batch", *shape])
        for name, (dtype, shape) in spec.graph_inputs.items()
    ]  # fmt: skip
    side = spec.shape[-1]
    nodes = [helper.make_node("Mul", ["x", "tenth"], ["small"])]
    constants = [helper.make_tensor("tenth", TensorProto.FLOAT, [], [0.1])]
    last = "small"
    if spec.conditions:
        factor = side // spec.conditions[0].shape[-1]
        constants += [
            helper.make_tensor("scales", TensorProto.FLOAT, [4], [1.0, 1.0, factor, factor]),
            helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
        ]
        nodes += [
            helper.make_node("Resize", ["condition_low_resolution", "", "scales"], ["large"], mode="nearest"),
            helper.make_node("Unsqueeze", ["condition_low_resolution_noise", "axes"], ["level"]),
            helper.make_node("Add", ["small", "large"], ["both"]),
            helper.make_node("Add", ["both", "level"], ["sum"]),
        ]
        last = "sum"
    nodes.append(helper.make_node("Identity", [last], ["model_output"]))
    output = helper.make_tensor_value_info("model_output", TensorProto.FLOAT, ["batch", *spec.shape])
    graph = helper.make_graph(nodes, "denoiser", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, spec.to_metadata())
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def sampler_of(*arguments, **options):
    return Sampler(file_of(spec_of(*arguments, **options)), provider="cpu")


@pytest.fixture(scope="module")
def samplers():
    return sampler_of(2), sampler_of(4, 2), sampler_of(8, 4)


def test_the_second_model_receives_the_samples_of_the_first_with_the_file_s_noise(samplers):
    low, second, _ = samplers
    drawn = low.sample(5, seed=3).astype(np.float64)
    noised = drawn + 0.2 * STD * condition_noise(stage_seed(3, 1), np.arange(5), (1, 2, 2))
    conditions = {LOW_RESOLUTION: noised, LOW_RESOLUTION_NOISE: 0.2}
    expected = second.sample(5, seed=stage_seed(3, 1), conditions=conditions)
    np.testing.assert_array_equal(Cascade([low, second]).sample(5, seed=3), expected)


@pytest.mark.parametrize("level", [0.0, 1.5])
def test_another_noise_level_can_be_asked_for(samplers, level):
    low, second, _ = samplers
    noise = condition_noise(stage_seed(0, 1), np.arange(4), (1, 2, 2))
    conditions = {LOW_RESOLUTION: low.sample(4) + level * STD * noise, LOW_RESOLUTION_NOISE: level}
    expected = second.sample(4, seed=stage_seed(0, 1), conditions=conditions)
    actual = Cascade([low, second]).sample(4, low_resolution_noise=level)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_samples_of_a_seed_do_not_depend_on_their_number_or_the_batch(samplers):
    cascade = Cascade(samplers)
    expected = cascade.sample(7, seed=5)
    assert expected.shape == (7, 1, 8, 8)
    np.testing.assert_allclose(cascade.sample(7, seed=5, batch_size=2), expected, atol=1e-4)
    np.testing.assert_allclose(cascade.sample(3, seed=5, first_index=4), expected[4:], atol=1e-4)
    assert not np.allclose(cascade.sample(7, seed=6), expected)


def test_each_model_has_noise_of_its_own():
    """No word of a stage's key is that of another one, and its condition's noise is that of no row."""
    seeds = [stage_seed(7, stage) for stage in range(4)]
    assert seeds[0] == 7 and len(set(seeds)) == 4
    assert stage_seed(2**32 + 7, 1) == seeds[1]
    assert seeds[2] == int(threefry((7, 2), (2**32 - 1, 0))[0])
    noises = [normal_noise(seed, [0], 0, (8,)) for seed in seeds] + [condition_noise(seeds[1], [0], (8,))]
    for index, one in enumerate(noises):
        for other in noises[:index]:
            assert abs(float(np.corrcoef(one[0], other[0])[0, 1])) < 0.999


def test_the_time_limit_is_that_of_all_models_together(samplers, monkeypatch):
    now, limits = [0.0], []

    def stage(sampler):
        def sample(num_samples, *, time_limit, **_options):
            limits.append(time_limit)
            now[0] += 2.0
            return np.zeros((num_samples, *sampler.spec.shape), np.float32)

        return SimpleNamespace(spec=sampler.spec, sample=sample)

    monkeypatch.setattr("export.cascade.time", SimpleNamespace(monotonic=lambda: now[0]))
    Cascade([stage(each) for each in samplers]).sample(2, time_limit=5.0)
    assert limits == [5.0, 3.0, 1.0]


def test_the_files_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        (tmp_path / f"{number}.onnx").touch()
    assert [path.name for path in cascade_files(tmp_path)] == ["1.onnx", "2.onnx", "10.onnx"]


def test_classes_reach_all_models_that_have_them():
    low, second = sampler_of(2, classes=["a", "b"]), sampler_of(4, 2)
    cascade = Cascade([low, second])
    np.testing.assert_array_equal(cascade.sample(4, labels="b"), cascade.sample(4, labels=[1, 1, 1, 1]))
    plain = Cascade([sampler_of(2), second])
    with pytest.raises(InputError, match="labels 'b': no model has classes"):
        plain.sample(4, labels="b")
    with pytest.raises(InputError, match="guidance_scale 2.0: no model has classes"):
        plain.sample(4, guidance_scale=2.0)
    with pytest.raises(InputError, match="other classes than the model before"):
        Cascade([low, sampler_of(4, 2, classes=["b", "c"])])


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (lambda: [sampler_of(2)], "a cascade of 1: give at least two"),
        (lambda: ["low.onnx", "high.onnx"], "a cascade of 'low.onnx': give samplers"),
        (lambda: [sampler_of(2), sampler_of(4)], "model 2 of the cascade receives no low-resolution image"),
        (lambda: [sampler_of(4), sampler_of(4, 2)], r"of shape \[1, 2, 2\], but .* have shape \[1, 4, 4\]"),
        (lambda: [sampler_of(2, value_range=[0.0, 16.0]), sampler_of(4, 2)], "images of range"),
        (
            lambda: [
                sampler_of(2),
                sampler_of(4, conditions=spec_of(4, 2).conditions + (ConditionSpec("known", (), 0.0, 1.0),)),
            ],
            "also needs the condition known",
        ),
    ],
)
def test_models_that_do_not_meet_are_refused(models, words):
    with pytest.raises(InputError, match=words):
        Cascade(models())


@pytest.mark.parametrize("level", [-0.1, 11.0, float("nan")])
def test_a_noise_level_out_of_range_is_refused(samplers, level):
    with pytest.raises(InputError, match="low_resolution_noise .*: give 0 to 10"):
        Cascade(samplers).sample(2, low_resolution_noise=level)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, spec in (("low", spec_of(2)), ("second", spec_of(4, 2)), ("third", spec_of(8, 4))):
        (tmp_path / f"{name}.onnx").write_bytes(file_of(spec))
    return tmp_path


def test_the_command_line_chains_files(files, samplers, capsys):
    arguments = ["low.onnx", "--then", "second.onnx", "--then", "third.onnx", "--seed", "4"]
    assert main([*arguments, "--num-samples", "6", "--output", "out.npy"]) == 0
    np.testing.assert_allclose(np.load("out.npy"), Cascade(samplers).sample(6, seed=4), atol=1e-4)
    assert "third.onnx: image of shape [1, 8, 8]" in capsys.readouterr().out
    noise = ["--low-resolution-noise", "0.5", "--num-samples", "2", "--output", "out.npy"]
    assert main(["low.onnx", "--then", "second.onnx", *noise]) == 0
    expected = Cascade(samplers[:2]).sample(2, low_resolution_noise=0.5)
    np.testing.assert_allclose(np.load("out.npy"), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("low.onnx --then low.onnx", "receives no low-resolution image: give one that train.py --super-res"),
        ("low.onnx --then third.onnx", "images of shape [1, 4, 4], but"),
        ("low.onnx --then nowhere.onnx", "nowhere.onnx"),
        ("second.onnx", "--then SECOND.onnx"),
        ("low.onnx --low-resolution-noise 0.1", "--low-resolution-noise: it needs --then"),
        ("low.onnx --then second.onnx --low-resolution-noise 11", "low_resolution_noise 11: give 0 to 10"),
        ("low.onnx --then second.onnx --known low.onnx", "--known: it does not go with --then"),
    ],
)
def test_bad_input_is_one_line(files, arguments, words, capsys):
    assert main([*arguments.split(), "--output", "out.png"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (files / "out.png").exists()
