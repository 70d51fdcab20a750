"""One trial, run in this process with Tune's report replaced by a list."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion.checkpoints import TrainedModel
from diffusion.data import load_dataset
from diffusion.objectives import Objective
from diffusion.presets import preset
from workflows import trial
from workflows.group import Layout
from workflows.records import OUT_OF_MEMORY
from workflows.trial import TrialContext, run_trial


@pytest.fixture(scope="module")
def context():
    config = preset("heart").with_values(
        {
            "training.num_updates": 20,
            "training.num_evaluations": 2,
            "metrics.num_samples": 50,
            "sampler.num_steps": 5,
        }
    )
    return TrialContext(
        config, load_dataset(config.data), Layout(1, 1, uses_gpus=False), provenance={"run_id": "r"}
    )


@pytest.fixture
def reports(monkeypatch):
    """What was reported: (result, weights or None)."""
    seen = []

    def report(result, checkpoint=None):
        weights = None
        if checkpoint is not None:
            folder = Path(checkpoint.path)
            assert (folder / "samples.png").stat().st_size > 0
            weights = TrainedModel.load(folder)
        seen.append((result, weights))

    monkeypatch.setattr(trial.tune, "report", report)
    return seen


VALUES = {"schedule.num_train_timesteps": 20, "training.learning_rate": 1e-3}


def test_a_trial_reports_objective_metrics_and_model(context, reports):
    run_trial(VALUES, context)
    assert [(result["updates"], result["status"]) for result, _ in reports] == [
        (10, "running"),
        (20, "running"),
    ]
    result, model = reports[-1]
    assert result["objective"] == result["metrics"]["val/elbo_window"]
    wanted = {"train/mse", "val/mse", "sample/distance", "schedule/alphas_cumprod_T", "schedule/prior_kl"}
    assert wanted <= set(result["metrics"])
    assert "sample/distance" not in reports[0][0]["metrics"], "early values are noise"
    assert model.config.schedule.num_train_timesteps == 20
    assert model.provenance["run_id"] == "r"


def test_a_trial_does_not_depend_on_the_one_before_it_in_the_same_process(context, reports):
    run_trial(VALUES, context)
    alone = reports[-1][1].network.state_dict()
    run_trial({**VALUES, "training.learning_rate": 0.5}, context)
    torch.rand(17)
    run_trial(VALUES, context)
    again = reports[-1][1].network.state_dict()
    assert all(torch.equal(alone[name], again[name]) for name in alone)


def test_a_schedule_that_cannot_run_is_pruned_before_it_costs_anything(context, reports):
    run_trial({"schedule.num_train_timesteps": 2000, "schedule.beta_end": 0.5}, context)
    ((result, model),) = reports
    assert (result["status"], result["updates"], model) == ("pruned", 0, None)
    assert math.isinf(result["objective"]) and "alphas_cumprod_T" in result["reason"]


def test_a_training_that_leaves_the_finite_numbers_is_diverged(context, reports, monkeypatch):
    objective = "diffusion.objectives.Objective.__call__"
    real = Objective.__call__

    def not_a_number(*arguments):
        batch = real(*arguments)
        return replace(batch, loss=batch.loss * math.nan)

    monkeypatch.setattr(objective, not_a_number)
    run_trial(VALUES, context)
    result, _ = reports[-1]
    assert result["status"] == "diverged" and math.isinf(result["objective"])
    assert "finite" in result["reason"]


def test_values_that_do_not_go_together_are_pruned(context, reports):
    never = replace(context, config=context.config.with_values({"network.prediction_type": "v_prediction"}))
    zero = never.config.with_values({"schedule.zero_terminal_snr": True})
    run_trial({"network.prediction_type": "epsilon"}, replace(never, config=zero))
    ((result, _),) = reports
    assert result["status"] == "pruned" and "zero-terminal-snr" in result["reason"]


def test_another_objective_decides_and_brings_what_it_needs(context, reports):
    for objective in ("val/mse", "sample/distance"):
        reports.clear()
        run_trial({**VALUES, "metrics.objective": objective}, context)
        assert [result["objective"] for result, _ in reports] == [
            result["metrics"][objective] for result, _ in reports
        ]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_out_of_memory_on_a_shared_gpu_asks_for_another_try_alone(context, reports, monkeypatch, share):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("diffusion.learner.Learner.step", full)
    crowded = replace(context, layout=Layout(1, 1, uses_gpus=True, gpus_per_worker=share))
    assert crowded.layout.resources == {"CPU": 1.0, "GPU": share}
    if share == 1.0:
        with pytest.raises(torch.OutOfMemoryError):
            run_trial(VALUES, crowded)
        return
    run_trial(VALUES, crowded)
    ((result, model),) = reports
    assert (result["status"], model) == (OUT_OF_MEMORY, None) and math.isinf(result["objective"])
