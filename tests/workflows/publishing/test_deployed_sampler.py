"""What becomes of the sampler that was chosen for a model: config, file, model card, tracker, plot."""

import dataclasses
import math

import pytest
import torch

from diffusion.evaluation.sampler_choice import MeasuredSampler, SamplerChoice, choose_sampler
from export.contract import FAST
from export.sampler import Sampler
from export.to_onnx import export_onnx
from tests.workflows.publishing.test_artifacts import make_model
from workflows.data.load import LoadedData
from workflows.publishing import deployed_sampler
from workflows.publishing.deployed_sampler import (
    sampler_curves,
    with_deployed_sampler,
)
from workflows.publishing.model_card import model_card

CHOICE = choose_sampler(
    [
        MeasuredSampler("ddpm", 20, 20, 0.20, 0.02, 0.60, 0.01),
        MeasuredSampler("dpmpp_2m", 15, 15, 0.21, 0.02, 0.605, 0.01),
        MeasuredSampler("ddim", 10, 10, 0.40, 0.02, 0.80, 0.01),
    ],
    num_samples=500,
)


@pytest.fixture(scope="module")
def untrained():
    return make_model("heart")


@pytest.fixture
def deployed(untrained, monkeypatch):
    """A model with eta whose config asks for a choice, after it was made."""
    model, dataset = untrained
    values = {"metrics.choose_sampler": True, "sampler.name": "ddim", "sampler.eta": 0.5}
    model = dataclasses.replace(model, config=model.config.with_values(values), provenance={"run_id": "r"})
    monkeypatch.setattr(deployed_sampler, "measure_samplers", lambda *_: CHOICE)
    return with_deployed_sampler(model, LoadedData(dataset), print)


def test_the_choice_replaces_the_samplers_values_and_no_others(deployed, untrained):
    before, after = untrained[0].config.flat(), deployed.config.flat()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"metrics.choose_sampler", "sampler.name", "sampler.num_steps"}
    assert (after["sampler.name"], after["sampler.num_steps"], after["sampler.eta"]) == ("dpmpp_2m", 15, None)
    assert deployed.table.num_rows == 15
    assert deployed.provenance["run_id"] == "r" and SamplerChoice.of(deployed.provenance) == CHOICE


def test_samplers_are_measured_on_the_device_of_the_data(untrained, device, monkeypatch):
    model, dataset = untrained
    model = dataclasses.replace(model, config=model.config.with_values({"metrics.choose_sampler": True}))
    measured = []

    def measure(config, network, dataset, *_):
        measured.extend([dataset.train.device, *(each.device for each in network.parameters())])
        return CHOICE

    monkeypatch.setattr(deployed_sampler, "measure_samplers", measure)
    found = with_deployed_sampler(model, LoadedData(dataset).to(device), print)
    assert set(measured) == {device}
    assert {each.device for each in found.network.parameters()} == {torch.device("cpu")}


def test_a_model_whose_config_does_not_ask_for_it_is_not_measured(untrained, monkeypatch):
    model, dataset = untrained
    monkeypatch.setattr(deployed_sampler, "measure_samplers", lambda *_: pytest.fail("it was measured"))
    assert with_deployed_sampler(model, LoadedData(dataset), print) is model
    assert SamplerChoice.of(model.provenance) is None and sampler_curves(None) == {}


def test_the_file_samples_by_the_choice_and_knows_the_curve(deployed):
    content, _ = export_onnx(deployed)
    sampler = Sampler(content, provider="cpu")
    assert sampler.spec.sampler["name"] == "dpmpp_2m" and sampler.spec.sampler["num_steps"] == 15
    assert sampler.spec.sampler[FAST] == {"name": "ddpm", "num_steps": 20}
    assert sampler.spec.provenance["samplers"] == CHOICE.to_dict()
    drawn = [
        sampler.sample(4, **how) for how in ({"sampler": FAST}, {"sampler": "ddpm", "num_steps": 20}, {})
    ]
    assert (drawn[0] == drawn[1]).all() and not (drawn[0] == drawn[2]).all()
    assert sampler.table(sampler=FAST, num_steps=7).num_rows == 7


def test_the_model_card_has_the_curve(deployed):
    card = model_card(deployed)
    assert "- it samples by dpmpp_2m with 15 steps: of 3 choices" in card
    assert "| ddim | 10 | 10 | 0.4 ± 0.02 | 0.800 ± 0.01 |" in card
    assert "## Sampler" not in model_card(dataclasses.replace(deployed, provenance={}))


def test_a_tracker_gets_curves_by_network_evaluations():
    assert sampler_curves(CHOICE) == {
        10: {"sampler/ddim_distance": 0.40, "sampler/ddim_auc": 0.80},
        15: {"sampler/dpmpp_2m_distance": 0.21, "sampler/dpmpp_2m_auc": 0.605},
        20: {"sampler/ddpm_distance": 0.20, "sampler/ddpm_auc": 0.60},
    }


def test_a_sampler_whose_samples_are_not_finite_is_not_tracked_and_does_not_hinder_the_export(untrained):
    diverged = MeasuredSampler("ddim", 10, 10, math.inf, math.nan, 1.0, math.nan)
    choice = choose_sampler([*CHOICE.measured[1:], diverged], num_samples=500)
    assert sorted(sampler_curves(choice)) == [15, 20]
    model = dataclasses.replace(untrained[0], provenance={"samplers": choice.to_dict()})
    content, _ = export_onnx(model)
    samplers = Sampler(content, provider="cpu").spec.provenance["samplers"]
    assert samplers["measured"][0]["distance"] is None
    assert "nan" in model_card(model)
