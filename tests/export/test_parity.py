import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch

from diffusion.config import SamplerConfig
from export import parity
from export.noise import normal_noise
from export.parity import STEP_TOLERANCE, TRAJECTORY_TOLERANCE, ParityCase, check_parity, summary
from export.to_onnx import ParityError, export_onnx

STEPS = ["one step, batch 1", "one step, batch 3", "one step, batch 7"]
TRAJECTORIES = [
    "deployed sampler",
    "ddpm, 20 steps, clipped",
    "ddim, 20 steps, clipped",
    "dpmpp_2m, 20 steps, clipped",
    "ddpm, 20 steps, unclipped",
    "ddim, 20 steps, unclipped",
    "dpmpp_2m, 20 steps, unclipped",
]


def by_name(cases):
    return {case.name: case for case in cases}


@pytest.fixture(name="check_broken")
def _check_broken(image_model, image_onnx):
    """Check the image model against its file after a change to the graph."""

    def check(change, *arguments):
        proto = change(onnx.load_from_string(image_onnx), *arguments)
        return by_name(check_parity(image_model, proto.SerializeToString()))

    return check


def test_a_faithful_file_passes_every_comparison(image_export, point_model, point_onnx):
    for cases in (image_export[1], check_parity(point_model, point_onnx)):
        assert [case.name for case in cases] == STEPS + TRAJECTORIES
        for case in cases:
            assert case.passed, case
            tolerance = STEP_TOLERANCE if case.name in STEPS else TRAJECTORY_TOLERANCE
            assert 0.0 <= case.max_abs_error <= tolerance * case.output_scale
            assert case.output_scale > 0.1  # something was compared


def test_the_tolerances_are_no_looser_than_agreed():
    assert STEP_TOLERANCE <= 1e-4
    assert TRAJECTORY_TOLERANCE <= 1e-3


def test_the_scale_is_the_largest_output_of_pytorch(image_model, image_export):
    x = torch.from_numpy(normal_noise(0, np.arange(3), 0, (1, 8, 8))).float()
    scales = [float(image_model.network(x, torch.full((3,), t)).abs().max()) for t in range(20)]
    found = by_name(image_export[1])["one step, batch 3"].output_scale
    assert min(abs(found - scale) for scale in scales) < 1e-6
    assert found >= max(scales[0], scales[19]) - 1e-6  # both ends are on the grid


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_an_error_is_measured_and_held_to_the_tolerance(broken, check_broken, image_export, share):
    """An output that is larger by a known amount, on both sides of the tolerance."""
    scale = by_name(image_export[1])["one step, batch 1"].output_scale
    amount = share * STEP_TOLERANCE * scale
    found = check_broken(broken["shifted"], amount)["one step, batch 1"]
    assert found.max_abs_error == pytest.approx(amount, abs=3e-6)
    assert found.passed == (share < 1.0)


def test_a_wrong_output_fails_everywhere(broken, check_broken):
    assert not any(case.passed for case in check_broken(broken["shifted"], 0.5).values())


def test_a_graph_that_forgets_the_timestep_fails(broken, check_broken):
    cases = check_broken(broken["forgets the timestep"])
    assert not any(cases[name].passed for name in STEPS)
    assert not cases["deployed sampler"].passed


def test_a_graph_that_is_right_for_one_example_only_fails_at_larger_batches(broken, check_broken):
    cases = check_broken(broken["gives all the first one's output"])
    assert cases["one step, batch 1"].passed
    assert not any(case.passed for name, case in cases.items() if name != "one step, batch 1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_fail(image_model, image_onnx, broken, check_broken, value):
    """In the file alone, and in PyTorch and the file alike: NaN equals nothing."""
    with np.errstate(invalid="ignore"):
        cases = check_broken(broken["shifted"], value)
    assert not any(cases[name].passed for name in STEPS)


def test_a_network_of_nan_fails(make_model, image_model, image_onnx, broken):
    model = make_model(image_model.data, image_model.config.sampler)
    model.network.outward.bias.fill_(float("nan"))
    changed = broken["shifted"](onnx.load_from_string(image_onnx), float("nan"))
    cases = check_parity(model, changed.SerializeToString())
    assert not any(case.passed for case in cases)


@pytest.fixture(name="scaled")
def _scaled(make_model, point_model, point_onnx):
    """(model, file) with outputs smaller by a factor, which may differ between the two."""

    def scale(model_factor, file_factor):
        model = make_model(point_model.data, point_model.config.sampler)
        model.network.outward.weight.mul_(model_factor)
        model.network.outward.bias.mul_(model_factor)
        proto = onnx.load_from_string(point_onnx)
        for tensor in proto.graph.initializer:
            if tensor.name.startswith("outward."):
                values = onnx.numpy_helper.to_array(tensor) * np.float32(file_factor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return model, proto.SerializeToString()

    return scale


def test_a_network_that_gives_zero_passes(scaled):
    """A fresh network does, and relative to nothing every error is infinite."""
    cases = by_name(check_parity(*scaled(0.0, 0.0)))
    assert all(case.passed for case in cases.values())
    assert cases["one step, batch 1"].output_scale == 0.0


def test_errors_are_relative_to_small_outputs_too(scaled):
    """A tenth of a percent is too much, however little that is."""
    cases = by_name(check_parity(*scaled(1e-3, 1e-3)))
    assert all(cases[name].passed for name in STEPS)
    cases = by_name(check_parity(*scaled(1e-3, 1.001e-3)))
    assert not any(cases[name].passed for name in STEPS)


def test_another_models_file_fails(make_model, image_model, image_onnx):
    other = make_model(image_model.data, image_model.config.sampler, seed=1)
    assert not any(case.passed for case in check_parity(other, image_onnx))


def test_the_deployed_sampler_is_the_models(make_model, point_model, point_onnx):
    """Its samples scale with the clipping that the model is deployed with."""
    narrow = dataclasses.replace(point_model.data, clip=(-0.5, 0.5))
    model = make_model(narrow, SamplerConfig(name="ddim", num_steps=4))
    cases = by_name(check_parity(model, point_onnx))
    assert cases["deployed sampler"].passed
    assert cases["deployed sampler"].output_scale == 0.5
    assert by_name(check_parity(point_model, point_onnx))["deployed sampler"].output_scale > 2.5


def test_pytorchs_own_generator_is_left_alone(point_model, point_onnx):
    before = torch.get_rng_state()
    check_parity(point_model, point_onnx)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_summary_is_parity_json(image_export):
    """As JSON: plain numbers and booleans under the agreed names."""
    content = json.loads(json.dumps(summary(image_export[1]), allow_nan=False))
    assert set(content) == {"passed", "cases"}
    assert content["passed"] is True
    assert [case["name"] for case in content["cases"]] == STEPS + TRAJECTORIES
    for case in content["cases"]:
        assert set(case) == {"name", "max_abs_error", "output_scale", "passed", "rms_error"}
        assert case["passed"] is True
        assert isinstance(case["max_abs_error"], float)
        assert 0.0 <= case["rms_error"] <= case["max_abs_error"]


def test_one_failure_fails_the_summary(image_export):
    cases = list(image_export[1])
    cases[-1] = dataclasses.replace(cases[-1], passed=False)
    assert summary(cases)["passed"] is False


def test_a_trajectory_that_diverges_in_pytorch_vetoes_nothing_unless_it_is_deployed(monkeypatch, image_model):
    """It multiplies rounding errors without bound, so it says nothing about the file."""

    def diverging(word):
        def compare(name, *_):
            return (
                ParityCase(name, 1e5, 1e8, passed=False) if word in name else ParityCase(name, 0.0, 1.0, True)
            )

        return compare

    monkeypatch.setattr(parity, "_compare", diverging("unclipped"))
    content, cases = export_onnx(image_model)
    assert content and cases and not [case for case in cases if "unclipped" in case.name]
    for veto in ("deployed sampler", "one step"):
        monkeypatch.setattr(parity, "_compare", diverging(veto))
        with pytest.raises(ParityError, match=veto):
            export_onnx(image_model)
