"""Comparisons of network outputs. test_sample_parity.py has those of samples, which need data sets."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch

from diffusion import NoiseSchedule, linear_betas, sampler_table
from diffusion.config import SamplerConfig
from diffusion.registry import SAMPLERS
from export import parity
from export.noise import normal_noise
from export.parity import STEP_TOLERANCE, TRAJECTORY_TOLERANCE, ParityCase, check_parity, summary
from export.sampler import Sampler
from export.to_onnx import ParityError, export_onnx
from export.torch_sampler import TorchSampler

STEPS = ["one step, batch 1", "one step, batch 3", "one step, batch 7"]
TRAJECTORIES = [
    "deployed sampler",
    *(f"{name}, 20 steps, {clipping}" for clipping in ("clipped", "unclipped") for name in SAMPLERS),
]
EVERY_TIMESTEP = "every timestep"


def compared(model, onnx_file):
    return check_parity(TorchSampler.of(model), Sampler(onnx_file, provider="cpu"))


def by_name(cases):
    return {case.name: case for case in cases}


@pytest.fixture(name="check_broken")
def _check_broken(image_model, image_onnx):
    """Function that changes the graph of the image model's file and compares it with the model."""

    def check(change, *arguments):
        proto = change(onnx.load_from_string(image_onnx), *arguments)
        return by_name(compared(image_model, proto.SerializeToString()))

    return check


def test_a_faithful_file_passes_every_comparison(image_export, point_model, point_onnx):
    for cases in (image_export[1], compared(point_model, point_onnx)):
        assert [case.name for case in cases] == [*STEPS, *TRAJECTORIES, EVERY_TIMESTEP]
        for case in cases:
            assert case.passed, case
            tolerance = STEP_TOLERANCE if case.name not in TRAJECTORIES else TRAJECTORY_TOLERANCE
            assert 0.0 <= case.max_abs_error <= tolerance * case.output_scale
            assert case.output_scale > 0.1  # something was compared


def test_the_tolerances_are_as_documented():
    assert STEP_TOLERANCE <= 1e-4
    assert TRAJECTORY_TOLERANCE <= 1e-3


def test_the_scale_is_the_largest_output_of_pytorch(image_model, image_export):
    x = torch.from_numpy(normal_noise(0, np.arange(3), 0, (1, 8, 8))).float()
    scales = [float(image_model.network(x, torch.full((3,), t)).abs().max()) for t in range(20)]
    output_scale = by_name(image_export[1])["one step, batch 3"].output_scale
    assert min(abs(output_scale - scale) for scale in scales) < 1e-6
    assert output_scale >= max(scales[0], scales[19]) - 1e-6  # both ends are on the grid


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_an_error_is_measured_and_compared_with_the_tolerance(broken, check_broken, image_export, factor):
    """Outputs are shifted by a known amount, less or more than the tolerance."""
    scale = by_name(image_export[1])["one step, batch 1"].output_scale
    amount = factor * STEP_TOLERANCE * scale
    case = check_broken(broken["shifted"], amount)["one step, batch 1"]
    assert case.max_abs_error == pytest.approx(amount, abs=3e-6)
    assert case.passed == (factor < 1.0)


def test_a_wrong_output_fails_everywhere(broken, check_broken):
    assert not any(case.passed for case in check_broken(broken["shifted"], 0.5).values())


def test_a_graph_that_forgets_the_timestep_fails(broken, check_broken):
    cases = check_broken(broken["forgets the timestep"])
    assert not any(cases[name].passed for name in [*STEPS, EVERY_TIMESTEP])
    assert not cases["deployed sampler"].passed


@pytest.mark.parametrize("timestep", range(20))
def test_an_error_at_any_single_timestep_is_found(broken, check_broken, timestep):
    assert not check_broken(broken["shifted at one timestep"], timestep, 1e-2)[EVERY_TIMESTEP].passed


def test_a_graph_that_is_right_only_at_batch_1_fails(broken, check_broken):
    cases = check_broken(broken["repeats the first output"])
    assert cases["one step, batch 1"].passed
    assert not any(case.passed for name, case in cases.items() if name != "one step, batch 1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_fail(image_model, image_onnx, broken, check_broken, value):
    """NaN and infinity in the file's outputs fail every single call."""
    with np.errstate(invalid="ignore"):
        cases = check_broken(broken["shifted"], value)
    assert not any(cases[name].passed for name in STEPS)


def test_a_network_of_nan_fails(make_model, image_model, image_onnx, broken):
    model = make_model(image_model.data, image_model.config.sampler)
    model.network.outward.bias.fill_(float("nan"))
    changed = broken["shifted"](onnx.load_from_string(image_onnx), float("nan"))
    cases = compared(model, changed.SerializeToString())
    assert not any(case.passed for case in cases)


@pytest.fixture(name="scaled")
def _scaled(make_model, point_model, point_onnx):
    """Function that scales the outputs of a model and of its file, by factors that may differ."""

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


def test_a_network_whose_output_is_zero_passes(scaled):
    """As a newly built network's is. A tolerance relative to zero would let nothing pass."""
    cases = by_name(compared(*scaled(0.0, 0.0)))
    assert all(case.passed for case in cases.values())
    assert cases["one step, batch 1"].output_scale == 0.0


def test_errors_are_relative_to_small_outputs_too(scaled):
    """A relative error of 0.1% fails, however small the outputs are."""
    cases = by_name(compared(*scaled(1e-3, 1e-3)))
    assert all(cases[name].passed for name in STEPS)
    cases = by_name(compared(*scaled(1e-3, 1.001e-3)))
    assert not any(cases[name].passed for name in STEPS)


def test_another_models_file_fails(make_model, image_model, image_onnx):
    other = make_model(image_model.data, image_model.config.sampler, seed=1)
    assert not any(case.passed for case in compared(other, image_onnx))


def test_the_deployed_sampler_is_that_of_the_model(make_model, point_model, point_onnx):
    """The scale of its samples follows the clipping that the model is deployed with."""
    narrow = dataclasses.replace(point_model.data, clip=(-0.5, 0.5))
    model = make_model(narrow, SamplerConfig(name="ddim", num_steps=4))
    cases = by_name(compared(model, point_onnx))
    assert cases["deployed sampler"].passed
    assert cases["deployed sampler"].output_scale == 0.5
    assert by_name(compared(point_model, point_onnx))["deployed sampler"].output_scale > 2.5


def test_pytorchs_random_state_does_not_change(point_model, point_onnx):
    before = torch.get_rng_state()
    compared(point_model, point_onnx)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_summary_is_parity_json(image_export):
    """Its values are plain numbers and booleans that JSON can hold."""
    content = json.loads(json.dumps(summary(image_export[1]), allow_nan=False))
    assert set(content) == {"passed", "cases"}
    assert content["passed"] is True
    assert [case["name"] for case in content["cases"]] == [*STEPS, *TRAJECTORIES, EVERY_TIMESTEP]
    for case in content["cases"]:
        assert set(case) == {"name", "max_abs_error", "output_scale", "passed", "rms_error"}
        assert case["passed"] is True
        assert isinstance(case["max_abs_error"], float)
        assert 0.0 <= case["rms_error"] <= case["max_abs_error"]


def test_one_failure_fails_the_summary(image_export):
    cases = list(image_export[1])
    cases[-1] = dataclasses.replace(cases[-1], passed=False)
    assert summary(cases)["passed"] is False


def test_a_diverging_trajectory_fails_only_if_it_is_the_deployed_samplers(
    monkeypatch, image_model, image_onnx, give_graph
):
    """Divergence amplifies rounding errors without bound, so it says nothing about the file."""
    give_graph(onnx.load_from_string(image_onnx))

    def diverging(word):
        """A comparison that fails, with outputs far too large, if the case's name contains `word`."""

        def compare(name, *_):
            return (
                ParityCase(name, 1e5, 1e8, passed=False) if word in name else ParityCase(name, 0.0, 1.0, True)
            )

        return compare

    monkeypatch.setattr(parity, "compare", diverging("unclipped"))
    content, cases = export_onnx(image_model)
    assert content and cases and not [case for case in cases if "unclipped" in case.name]
    for failing in ("deployed sampler", "one step"):
        monkeypatch.setattr(parity, "compare", diverging(failing))
        with pytest.raises(ParityError, match=failing):
            export_onnx(image_model)


@pytest.mark.parametrize(("num_steps", "count"), [(4, 8), (20, 5), (50, 2), (200, 1), (1000, 1)])
def test_a_long_sampler_has_few_trajectories_but_all_of_its_rows(point_model, num_steps, count):
    """Calls of a U-Net take nearly all of the check's time, and those of a trajectory cannot be shared."""
    table, levels = sampler_table(NoiseSchedule(linear_betas(1000, 1e-4, 0.02)), "ddim", num_steps), []

    def denoise(x, level, labels, guidance_scale, conditions):
        levels.append(level)
        return np.zeros_like(x)

    samples = parity._trajectories(TorchSampler.of(point_model), table, 1.0, denoise)
    assert len(samples) == count and levels == table.timesteps.tolist()
