"""Confirmation of finalists: fresh noise, the same for all, and never the test split."""

import dataclasses
import math

import pytest
import torch

from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.measured_objective import MeasuredObjective
from workflows.data.load import LoadedData
from workflows.sweep.confirmation import Confirmation, confirmation_seed
from workflows.sweep.decision import decide


class Untouchable:
    """A split that must not be read."""

    def __getattr__(self, name):
        raise AssertionError("the test split is for the champion alone")

    def __getitem__(self, index):
        raise AssertionError("the test split is for the champion alone")

    def __len__(self):
        raise AssertionError("the test split is for the champion alone")


@pytest.fixture
def data(heart):
    return LoadedData(dataclasses.replace(heart.dataset, test=Untouchable()))


def confirm(data, models, seed_error=0.0):
    found = Confirmation(data, seed_error, lambda _: None)
    objectives = {
        name: MeasuredObjective(model.provenance["metrics"]["objective"]) for name, model in models.items()
    }
    return found, {name: found.add(name, model, objectives[name]) for name, model in models.items()}


@pytest.mark.parametrize("metrics_seed", [0, 1, 1_000_001, 2_000_003, 2**32 - 1])
def test_no_confirmation_uses_the_noise_of_the_trials(metrics_seed):
    seeds = [confirmation_seed(metrics_seed, round) for round in range(3)]
    assert metrics_seed not in seeds and len(set(seeds)) == 3


def test_all_finalists_draw_the_same_fresh_noise_in_every_round(data, make_model, drawn_samples):
    models = {name: make_model(**{"metrics.seed": 5}) for name in ("a", "b")}
    found, _ = confirm(data, models)
    found.compare("a", "b", 2)
    of_a, of_b = drawn_samples[0::2], drawn_samples[1::2]
    assert sorted(drawn_samples) == sorted(2 * list(dict.fromkeys(drawn_samples)))
    seeds = {seed for seed, _ in drawn_samples}
    assert len(seeds) == 3 and 5 not in seeds
    assert of_a[0] == of_b[0]


def test_each_round_doubles_the_samples_and_keeps_those_drawn_before(data, make_model, drawn_samples):
    found, _ = confirm(data, {"a": make_model(), "b": make_model(spread=2.0)})
    assert [found.compare("a", "b", round).num_samples for round in (0, 1, 2)] == [20, 40, 80]
    assert [count for _, count in drawn_samples] == [20, 20, 20, 20, 40, 40]
    again = found.compare("b", "a", 2)
    assert len(drawn_samples) == 6
    assert again.distances["distance"].value == pytest.approx(
        -found.compare("a", "b", 2).distances["distance"].value
    )


def test_the_difference_of_the_objectives_has_the_share_of_the_training_seed(data, make_model, drawn_samples):
    found, _ = confirm(data, {"a": make_model(1.0), "b": make_model(1.5)}, seed_error=0.01)
    objective = found.compare("a", "b", 0).objective
    assert (objective.value, objective.standard_error) == (-0.5, pytest.approx(0.01 * math.sqrt(2.0)))


def test_the_cost_is_that_of_the_network_times_its_calls(data, make_model, drawn_samples):
    _, finalists = confirm(data, {"a": make_model(), "b": make_model(**{"sampler.num_steps": 10})})
    assert finalists["b"].cost == 2.0 * finalists["a"].cost


def test_samples_that_are_not_finite_have_no_difference(data, make_model, drawn_samples):
    found, finalists = confirm(data, {"a": make_model(spread=math.nan), "b": make_model()})
    assert not finalists["a"].is_finite and finalists["b"].is_finite
    assert all(math.isnan(each.value) for each in found.compare("a", "b", 0).distances.values())


def test_the_copying_verdict_is_that_of_the_confirmed_metrics(data, make_model, drawn_samples, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "workflows.sweep.confirmation.copying_verdict",
        lambda metrics: seen.append(metrics) or ("copies" if metrics["sample/distance"] > 1.5 else "no sign"),
    )
    _, finalists = confirm(data, {"a": make_model(), "b": make_model(spread=2.0)})
    assert [each.copies for each in finalists.values()] == [False, True] and len(seen) == 2


def test_the_reference_is_the_validation_split(data, make_model, drawn_samples):
    found, _ = confirm(data, {})
    assert torch.equal(found._measure.held_out, data.dataset.val[:])


@pytest.mark.slow
def test_by_the_real_metrics_the_samples_closest_to_the_data_win(heart, make_model, monkeypatch):
    """One draws rows of the data, one the same with some noise, which has the better objective."""

    def samples(self, network, *, num_samples, seed):
        generator = torch.Generator().manual_seed(seed)
        rows = heart.dataset.test[torch.randperm(len(heart.dataset.test), generator=generator)[:num_samples]]
        noise = torch.randn(rows.shape, generator=generator)
        return rows + (float(network.outward.bias[0]) - 1.0) * noise

    monkeypatch.setattr(Evaluator, "samples", samples)
    models = {
        "blurred": make_model(0.99, spread=1.2, **{"metrics.num_samples": 100}),
        "sharp": make_model(1.0, spread=1.0, **{"metrics.num_samples": 100}),
    }
    found, finalists = confirm(heart, models, seed_error=0.1)
    decision = decide(finalists.values(), found.compare)
    assert decision.ranking == ("sharp", "blurred") and decision.outcomes[0].grounds == "samples"
