"""Selection of the champion without a sweep: finalists whose samples are given, and no files of models."""

import json
from types import SimpleNamespace

import pytest
import torch

from diffusion.evaluation.sampler_choice import MeasuredSampler, choose_sampler
from export.to_onnx import ParityError
from workflows.publishing import deployed_sampler
from workflows.publishing.model_card import model_card
from workflows.sweep import champion as champion_module
from workflows.sweep.champion import choose_champion, publish_champion
from workflows.training.worker_group import WorkerGroupError


@pytest.fixture
def select(heart, save_finalists, drawn_samples, monkeypatch, tmp_path):
    """Function (models by ID, final=None) -> champion, published model, decision.json, progress messages."""
    published, not_exported = [], set()

    def write_model_artifacts(model, dataset, features, directory, notify):
        if model.provenance["trial_id"] in not_exported:
            raise ParityError("no")
        directory.mkdir(parents=True, exist_ok=True)
        published.append(model)

    def metrics_on_test_split(model, dataset, features):
        return {"test/objective": model.provenance["metrics"]["objective"]}

    monkeypatch.setattr(champion_module, "write_model_artifacts", write_model_artifacts)
    monkeypatch.setattr(champion_module, "metrics_on_test_split", metrics_on_test_split)

    def run(models, final=None, broken=(), picked_by_mse="", **arguments):
        not_exported.update(broken)
        messages = []
        origin = {"run_id": "r"}
        choice = choose_champion(
            save_finalists(models),
            heart,
            origin,
            messages.append,
            final,
            **{"seed_error": 0.001, **arguments},
        )
        directory = tmp_path / "champion"
        found = publish_champion(choice, heart, directory, origin, messages.append, picked_by_mse)
        record = json.loads((tmp_path / "champion" / "decision.json").read_text())
        return found, published[-1], record, messages

    return run


def test_the_closest_samples_win_not_the_most_distant(select, make_model):
    models = {"a": make_model(1.0, spread=3.0), "b": make_model(1.1, spread=1.0), "c": make_model(1.2, 2.0)}
    champion, model, record, _ = select(models, picked_by_mse="c")
    assert champion.decision.ranking == ("b", "c", "a") and champion.trial_id == "b"
    assert champion.objective == 1.1 and champion.metrics["test/objective"] == 1.1
    assert champion.metrics["val/sample_distance"] == champion.confirmations["b"]["sample/distance"]
    assert model.provenance["run_id"] == "r" and model.provenance["metrics"] == champion.metrics
    assert record["champion"] == "b" and record["picked_by_mse"] == "c"
    assert set(record["confirmed"]) == set(record["finalists"]) == {"a", "b", "c"}
    assert record["reasons"] == list(champion.reasons) == model.provenance["decision"]
    assert "whose objective is better" in " ".join(champion.reasons)


def test_the_champion_has_the_weights_of_its_best_update_and_the_card_says_so(select, make_model):
    champion, model, *_ = select({"a": make_model(update=10)})
    assert champion.update == model.provenance["update"] == 10
    card = model_card(model)
    assert "its weights after update 10 of 40" in card
    assert "## Why this model" in card and "- the only trial with a usable model." in card


def test_choosing_writes_nothing_and_does_not_touch_the_test_split(
    heart, make_model, save_finalists, drawn_samples, monkeypatch, tmp_path
):
    monkeypatch.delattr(champion_module, "metrics_on_test_split")
    finalists = save_finalists({"a": make_model(1.0, spread=3.0), "b": make_model(1.1, spread=1.0)})
    files = sorted(tmp_path.rglob("*"))
    choice = choose_champion(finalists, heart, {}, print, seed_error=0.001)
    assert choice.decision.champion == "b" and choice.final_training is None
    assert set(choice.models) == set(choice.confirmed) == {"a", "b"}
    assert sorted(tmp_path.rglob("*")) == files


def test_equal_finalists_are_ranked_by_what_they_cost(select, make_model):
    models = {"a": make_model(1.0, **{"sampler.num_steps": 10}), "b": make_model(1.0005)}
    champion, _, record, messages = select(models)
    assert champion.trial_id == "b" and record["comparisons"][0]["decided_by"] == "cost"
    assert record["comparisons"][0]["num_samples"] == 80
    assert sum("drawing more samples" in message for message in messages) == 2


def test_the_next_finalist_takes_the_place_of_one_that_cannot_be_exported(select, make_model):
    models = {"a": make_model(1.0), "b": make_model(1.5)}
    champion, model, record, _ = select(models, broken={"a"})
    assert champion.trial_id == record["champion"] == model.provenance["trial_id"] == "b"
    assert champion.reasons == ("chosen since trial a, which is better, cannot be exported",)
    with pytest.raises(ParityError):
        select(models, broken={"a", "b"})


def test_the_champion_is_deployed_with_the_sampler_that_was_measured_best(select, make_model, monkeypatch):
    """Only the champion is measured, before the test split is used, and not with the split's examples."""
    fast = MeasuredSampler("dpmpp_2m", 10, 10, 0.1, 0.01, 0.5, 0.01)
    choice = choose_sampler([fast, MeasuredSampler("ddpm", 20, 20, 0.3, 0.01, 0.7, 0.01)], num_samples=9)
    measured, tested = [], []

    def measure(config, network, dataset, features, notify):
        measured.append(float(network.outward.bias[0]))
        return choice

    def metrics_on_test_split(model, dataset, features):
        tested.append(model.table.num_rows)
        return {}

    monkeypatch.setattr(deployed_sampler, "measure_samplers", measure)
    monkeypatch.setattr(champion_module, "metrics_on_test_split", metrics_on_test_split)
    asked = {"metrics.choose_sampler": True}
    champion, model, record, _ = select(
        {"a": make_model(1.0, 3.0, **asked), "b": make_model(1.0, 1.0, **asked)}
    )
    assert champion.trial_id == "b" and measured == [1.0] and tested == [10]
    assert (model.config.sampler.name, model.config.sampler.num_steps) == ("dpmpp_2m", 10)
    assert champion.samplers == choice and model.provenance["samplers"] == choice.to_dict()
    assert record["reasons"][-1] == champion.reasons[-1] == choice.sentences()[-1]


def final_of(model):
    return SimpleNamespace(run=lambda *_: model)


def test_another_trial_is_measured_like_the_finalists_but_does_not_compete(
    select, make_model, save_finalists
):
    other = save_finalists({"m": make_model(0.1, spread=0.1)})
    champion, _, record, _ = select({"a": make_model(1.0, spread=2.0)}, also_measured=other)
    assert champion.trial_id == "a" and champion.decision.ranking == ("a",)
    assert champion.confirmations["m"]["sample/distance"] < champion.confirmations["a"]["sample/distance"]
    assert set(record["finalists"]) == {"a"} and set(record["confirmed"]) == {"a", "m"}


@pytest.mark.parametrize(
    ("spread", "words"),
    [
        (0.5, "is used: of the two, it is better"),
        (2.0, "is not used: of the two, the trial is better"),
        (1.0, "is not used: it cannot be told apart"),
    ],
    ids=["better", "worse", "equal"],
)
def test_the_model_of_the_final_training_is_used_only_if_it_is_better(
    select, make_model, monkeypatch, spread, words
):
    """The objective alone would prefer neither."""
    monkeypatch.setattr(
        champion_module, "_measured_objective", lambda model, data: champion_module.MeasuredObjective(1.0)
    )
    trial, longer = make_model(1.0, update=40), make_model(1.0, spread, update=400)
    champion, model, record, messages = select({"a": trial}, final_of(longer))
    assert champion.trial_id == "a" and champion.update == (400 if spread < 1.0 else 40)
    expected = longer if spread < 1.0 else trial
    assert torch.equal(model.network.outward.bias, expected.network.outward.bias)
    assert words in record["final_training"] and words in champion.reasons[-1]
    assert record["final_training"] in messages
    assert champion.confirmations["a"] == (
        record["confirmed"]["final training"] if spread < 1.0 else record["confirmed"]["a"]
    )


def test_a_final_training_with_a_worse_objective_is_not_used(select, make_model, monkeypatch):
    monkeypatch.setattr(
        champion_module, "_measured_objective", lambda model, data: champion_module.MeasuredObjective(2.0)
    )
    champion, *_ = select({"a": make_model(1.0, update=40)}, final_of(make_model(2.0, update=400)))
    assert champion.update == 40 and "the trial is better" in champion.reasons[-1]


def test_a_final_training_that_fails_leaves_the_trials_model(select, make_model):
    def fail(*_):
        raise WorkerGroupError("a machine was lost")

    champion, _, _, messages = select({"a": make_model()}, SimpleNamespace(run=fail))
    assert champion.trial_id == "a" and any("a machine was lost" in message for message in messages)


def test_there_must_be_a_finalist(select):
    with pytest.raises(ValueError, match="no finalists"):
        select({})


@pytest.fixture
def in_memory(save_finalists, monkeypatch):
    """Function (models by ID) -> their folders, which give the models without reading their files.

    The simulated device cannot read those.
    """

    def save(models):
        folders = save_finalists(models)
        by_folder = {folder: models[name] for name, folder in folders.items()}
        monkeypatch.setattr(champion_module.TrainedModel, "load", by_folder.__getitem__)
        return folders

    return save


def test_finalists_and_champion_are_measured_on_the_device_as_on_the_cpu(
    heart, make_model, in_memory, small_reference, device, monkeypatch, tmp_path
):
    """Everything but the export, which has the CPU's copies of the model and the data."""
    exported = []
    monkeypatch.setattr(champion_module, "write_model_artifacts", lambda *given: exported.append(given))
    finalists = in_memory({"a": make_model(1.0), "b": make_model(1.0001, 0.0)})
    champions = []
    for where in (torch.device("cpu"), device):
        choice = choose_champion(finalists, heart, {}, print, seed_error=0.001, device=where)
        directory = tmp_path / where.type
        directory.mkdir()
        champions.append(publish_champion(choice, heart, directory, {}, print, device=where))
        model, dataset, *_ = exported[-1]
        assert {each.device for each in model.network.parameters()} == {torch.device("cpu")}
        assert dataset is heart.dataset
    on_cpu, on_device = champions
    assert on_device.trial_id == on_cpu.trial_id
    assert on_device.metrics == pytest.approx(on_cpu.metrics, rel=1e-3, abs=1e-3, nan_ok=True)


def test_a_longer_training_is_measured_on_the_device(heart, make_model, in_memory, small_reference, device):
    finalists = in_memory({"a": make_model(1.0)})
    longer = make_model(1.0, update=80)
    choice = choose_champion(finalists, heart, {}, print, final_of(longer), seed_error=0.001, device=device)
    assert "final training" in choice.confirmations
