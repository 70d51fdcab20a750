"""Weights stored in 16 bits: the file is half as large, and is compared with PyTorch."""

import json

import numpy as np
import onnx
import pytest
import torch

from diffusion.errors import InputError
from diffusion.registry import SAMPLERS
from export import to_onnx
from export.parity import STORAGE_TOLERANCE
from export.precision import with_rounded_weights
from export.sampler import Sampler
from export.to_onnx import ParityError, export_onnx, main


@pytest.fixture(scope="module", name="half")
def _half(image_model):
    return export_onnx(image_model, "fp16")


def weights_of(content):
    return {tensor.name: tensor for tensor in onnx.load_from_string(content).graph.initializer}


def test_the_weights_take_half_the_space(half, image_onnx, image_model):
    saved = len(image_onnx) - len(half[0])
    num_weights = sum(weight.numel() for weight in image_model.network.parameters())
    assert saved > 0.9 * 2 * num_weights
    before, after = weights_of(image_onnx), weights_of(half[0])
    names = {name for name, _ in image_model.network.named_parameters()} & before.keys()
    assert len(names) > 5
    for name in names:
        assert after[f"{name}.fp16"].data_type == onnx.TensorProto.FLOAT16
        assert name not in after


def test_other_constants_keep_their_precision(half, image_onnx):
    """An error in the fourth digit of a frequency of the time embedding is a wrong phase at t = 1000."""
    before, after = weights_of(image_onnx), weights_of(half[0])
    others = {name for name in before if f"{name}.fp16" not in after}
    assert others
    for name in others:
        np.testing.assert_array_equal(
            onnx.numpy_helper.to_array(after[name]), onnx.numpy_helper.to_array(before[name])
        )


def test_the_file_is_valid_with_the_same_metadata(half, image_onnx):
    proto = onnx.load_from_string(half[0])
    onnx.checker.check_model(proto, full_check=True)
    assert Sampler(half[0], provider="cpu").spec.to_metadata() == (
        Sampler(image_onnx, provider="cpu").spec.to_metadata()
    )


def test_the_error_of_storage_is_one_of_the_comparisons(half, image_export):
    cases = {case.name: case for case in half[1]}
    own = [case for name, case in cases.items() if name.startswith("weights in 16 bits")]
    assert [case.name for case in half[1] if case not in own] == [case.name for case in image_export[1]]
    assert len(own) == 2
    for case in own:
        assert case.passed
        # With 11 bits, the error is larger than float32's, but within the tolerance.
        assert 1e-6 * case.output_scale < case.rms_error < STORAGE_TOLERANCE * case.output_scale


def test_the_file_computes_with_the_rounded_weights(half, image_model, image_sampler):
    rounded = with_rounded_weights(image_model)
    x = np.random.default_rng(0).standard_normal((4, 1, 8, 8))
    expected = rounded.network(torch.from_numpy(x).float(), torch.full((4,), 7)).numpy()
    actual = Sampler(half[0], provider="cpu").denoise(x, 7)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(actual - image_sampler.denoise(x, 7)).max() > 1e-5 * np.abs(expected).max()


def test_rounding_does_not_change_the_model(image_model):
    before = {name: weight.clone() for name, weight in image_model.network.state_dict().items()}
    with_rounded_weights(image_model)
    assert all(torch.equal(before[name], weight) for name, weight in image_model.network.state_dict().items())


def test_a_weight_too_large_for_16_bits_is_refused(make_model, point_model):
    model = make_model(point_model.data, point_model.config.sampler)
    model.network.inward.bias[0] = 70_000.0
    with pytest.raises(InputError, match=r"inward.bias reach 7e\+04.*fp32"):
        export_onnx(model, "fp16")


def test_weights_that_do_not_survive_rounding_are_not_exported(make_model, point_model):
    """float16 has few numbers below 1e-6, and here the output depends on such weights alone."""
    model = make_model(point_model.data, point_model.config.sampler)
    model.network.outward.weight.mul_(3e-6)
    model.network.outward.bias.zero_()
    with pytest.raises(ParityError, match="weights in 16 bits"):
        export_onnx(model, "fp16")


def test_the_command_writes_16_bit_weights(point_model, point_onnx, give_graph, tmp_path, capsys):
    give_graph(onnx.load_from_string(point_onnx))
    point_model.save(tmp_path / "model")
    path = tmp_path / "half.onnx"
    assert main([str(tmp_path / "model"), "--precision", "fp16", "--output", str(path)]) == 0
    assert f"{7 + 2 * len(SAMPLERS)} comparisons" in capsys.readouterr().out
    assert any(name.endswith(".fp16") for name in weights_of(path.read_bytes()))
    with pytest.raises(SystemExit) as caught:
        to_onnx.main([str(tmp_path / "model"), "--precision", "int8"])
    assert caught.value.code == 2


def test_the_metadata_do_not_change(half):
    metadata = {entry.key: entry.value for entry in onnx.load_from_string(half[0]).metadata_props}
    assert json.loads(metadata["ray_ddpm.spec"])["data"]["shape"] == [1, 8, 8]
