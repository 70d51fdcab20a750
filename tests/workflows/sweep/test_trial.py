"""One trial, run in this process; a list collects what it reports to Tune."""

import errno
import math
from dataclasses import replace
from numbers import Number
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.tune.utils.util import flatten_dict

from diffusion.data.dataset import load_dataset
from diffusion.presets import preset
from diffusion.training.checkpoints import TrainedModel
from diffusion.training.loss import DenoisingLoss
from workflows.data.load import LoadedData
from workflows.ray_runtime import preemption
from workflows.storage.storage import Storage
from workflows.sweep import trial
from workflows.sweep.trial import TrialContext, run_trial
from workflows.sweep.trial_records import OUT_OF_MEMORY
from workflows.training.worker import Preempted
from workflows.training.worker_group import WorkerResources

pytestmark = pytest.mark.usefixtures("small_reference")


@pytest.fixture(scope="module")
def context():
    config = preset("heart").with_values(
        {
            "training.num_updates": 20,
            "training.num_evaluations": 2,
            "metrics.num_samples": 50,
            "metrics.num_examples": 64,
            "sampler.num_steps": 5,
        }
    )
    return TrialContext(
        config,
        LoadedData(load_dataset(config.data)),
        WorkerResources(1, 1, uses_gpus=False),
        provenance={"run_id": "r"},
    )


@pytest.fixture
def reports(monkeypatch):
    """The reports so far: (result, model or None)."""
    reported = []

    def report(result, checkpoint=None):
        model = None
        if checkpoint is not None:
            folder = Path(checkpoint.path)
            is_last = result["updates"] == 20
            assert (folder / "samples.png").exists() == is_last, "the training is too short for more"
            model = TrainedModel.load(folder)
            is_first = not reported or reported[-1][0]["updates"] >= result["updates"]  # of this trial
            assert (folder / "untrained.png").exists() == is_first
        reported.append((result, model))

    monkeypatch.setattr(trial.tune, "report", report)
    return reported


VALUES = {"schedule.num_train_timesteps": 20, "training.learning_rate": 1e-3}


def test_a_trial_reports_objective_metrics_and_model(context, reports):
    run_trial(VALUES, context)
    assert [(result["updates"], result["status"]) for result, _ in reports] == [
        (10, "running"),
        (20, "running"),
    ]
    result, model = reports[-1]
    metrics = dict(result["metrics"])
    assert result["objective"] == metrics["val/elbo_window"]
    expected = {"train/mse", "val/mse", "sample/distance", "schedule/alphas_cumprod_T", "schedule/prior_kl"}
    assert expected <= set(metrics)
    assert "sample/distance" not in dict(reports[0][0]["metrics"]), "computed at the end only"
    numbers = {name for name, value in flatten_dict(result).items() if isinstance(value, Number)}
    assert numbers == {"objective", "updates"}, "Tune keeps a history of each, for as long as the sweep runs"
    assert model.config.schedule.num_train_timesteps == 20
    assert model.provenance["run_id"] == "r"


def test_a_trial_does_not_depend_on_the_one_before_it_in_the_same_process(context, reports):
    run_trial(VALUES, context)
    before = reports[-1][1].network.state_dict()
    run_trial({**VALUES, "training.learning_rate": 0.5}, context)
    torch.rand(17)
    run_trial(VALUES, context)
    after = reports[-1][1].network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_infeasible_schedule_is_pruned_without_training(context, reports):
    run_trial({"schedule.num_train_timesteps": 2000, "schedule.beta_end": 0.5}, context)
    ((result, model),) = reports
    assert (result["status"], result["updates"], model) == ("pruned", 0, None)
    assert math.isinf(result["objective"]) and "alphas_cumprod_T" in result["reason"]


def test_a_training_with_a_loss_that_is_not_finite_has_diverged(context, reports, monkeypatch):
    original = DenoisingLoss.__call__

    def not_a_number(*arguments):
        batch = original(*arguments)
        return replace(batch, loss=batch.loss * math.nan)

    monkeypatch.setattr(DenoisingLoss, "__call__", not_a_number)
    run_trial(VALUES, context)
    result, _ = reports[-1]
    assert result["status"] == "diverged" and math.isinf(result["objective"])
    assert "finite" in result["reason"]


def test_values_that_contradict_each_other_are_pruned(context, reports):
    config = context.config.with_values({"network.prediction_type": "v_prediction"})
    config = config.with_values({"schedule.zero_terminal_snr": True})
    run_trial({"network.prediction_type": "epsilon"}, replace(context, config=config))
    ((result, _),) = reports
    assert result["status"] == "pruned" and "zero-terminal-snr" in result["reason"]


def test_another_objective_is_computed_at_every_evaluation(context, reports):
    for objective in ("val/mse", "sample/distance"):
        reports.clear()
        run_trial({**VALUES, "metrics.objective": objective}, context)
        assert [result["objective"] for result, _ in reports] == [
            dict(result["metrics"])[objective] for result, _ in reports
        ]


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_out_of_memory_fails_only_with_a_whole_gpu(context, reports, monkeypatch, fraction):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("diffusion.training.train_step.TrainStep.run", out_of_memory)
    on_gpu = replace(context, resources=WorkerResources(1, 1, uses_gpus=True, gpus_per_worker=fraction))
    assert on_gpu.resources.per_worker == {"CPU": 1.0, "GPU": fraction}
    if fraction == 1.0:
        with pytest.raises(torch.OutOfMemoryError):
            run_trial(VALUES, on_gpu)
        return
    run_trial(VALUES, on_gpu)
    ((result, model),) = reports
    assert (result["status"], model) == (OUT_OF_MEMORY, None) and math.isinf(result["objective"])


class NodeDiedError(BaseException):
    """Ends a trial like the death of its node: nothing that the trial does follows it."""


@pytest.fixture
def on_cluster(context, monkeypatch, tmp_path):
    """The context of trials whose checkpoints outlive their nodes."""
    monkeypatch.setattr(trial.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "t1"))
    return replace(context, checkpoints=Storage(str(tmp_path / "running")), storage_retry_seconds=0.0)


def weights(reports):
    return reports[-1][1].network.state_dict()


def test_a_trial_whose_node_died_goes_on_from_its_last_checkpoint(on_cluster, context, reports, monkeypatch):
    run_trial(VALUES, context)
    undisturbed = weights(reports)
    reports.clear()
    updates = []
    original = trial.Training._update

    def die_once(training, *arguments):
        if training.updates == 15 and 15 not in updates:
            updates.append(15)
            raise NodeDiedError
        updates.append(training.updates)
        original(training, *arguments)

    monkeypatch.setattr(trial.Training, "_update", die_once)
    with pytest.raises(NodeDiedError):
        run_trial(VALUES, on_cluster)
    run_trial(VALUES, on_cluster)
    assert updates == [*range(15), 15, *range(10, 20)], "from the checkpoint of update 10"
    assert [result["updates"] for result, _ in reports] == [10, 20]
    assert all(torch.equal(undisturbed[name], after) for name, after in weights(reports).items())
    assert on_cluster.checkpoints.names() == [], "nothing goes on from them any more"


def test_a_trial_stops_with_a_checkpoint_when_its_node_will_be_taken_away(on_cluster, reports, monkeypatch):
    monkeypatch.setattr(preemption, "SECONDS_BETWEEN_QUESTIONS", 0.0)
    monkeypatch.setattr(preemption, "node_is_draining", lambda: bool(reports))
    with pytest.raises(Preempted):
        run_trial(VALUES, on_cluster)
    assert on_cluster.store("t1").updates()[-1] == 20, "before the evaluation, which takes longer"
    monkeypatch.setattr(preemption, "node_is_draining", lambda: False)
    run_trial(VALUES, on_cluster)
    assert [result["updates"] for result, _ in reports] == [10, 20]


def test_a_trial_that_kills_its_process_again_and_again_fails(on_cluster, reports, monkeypatch):
    def die(*_):
        raise NodeDiedError

    monkeypatch.setattr(trial.Training, "_update", die)
    for _ in range(3):
        with pytest.raises(NodeDiedError):
            run_trial(VALUES, on_cluster)
    run_trial(VALUES, on_cluster)
    ((result, _),) = reports
    assert result["status"] == "failed" and "died 3 times after update 0" in result["reason"]


def test_a_trial_that_gets_further_before_each_death_goes_on(on_cluster, reports, monkeypatch):
    deaths, original = [5, 5, 15, 15], trial.Training._update

    def die(training, *arguments):
        if deaths and training.updates == deaths[0]:
            deaths.pop(0)
            raise NodeDiedError
        original(training, *arguments)

    monkeypatch.setattr(trial.Training, "_update", die)
    for _ in range(4):
        with pytest.raises(NodeDiedError):
            run_trial(VALUES, on_cluster)
    run_trial(VALUES, on_cluster)
    assert [(result["updates"], result["status"]) for result, _ in reports] == [
        (10, "running"),
        (20, "running"),
    ]


def test_an_error_of_the_trial_itself_is_not_tried_again(on_cluster, context, reports, monkeypatch):
    def fail(*_):
        raise ValueError("no such thing")

    monkeypatch.setattr(trial.Training, "_update", fail)
    with pytest.raises(ValueError, match="no such thing"):
        run_trial(VALUES, context)  # Tune records it, and starts no trial again on a single machine
    run_trial(VALUES, on_cluster)
    ((result, _),) = reports
    assert (result["status"], result["reason"]) == ("failed", "ValueError: no such thing")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_an_error_of_the_storage_and_not_of_the_trial(
    on_cluster, reports, monkeypatch, number
):
    def full(*_):
        raise OSError(number, "full")

    monkeypatch.setattr("workflows.storage.local.LocalFolder.upload_folder", full)
    with pytest.raises(OSError, match="full"):
        run_trial(VALUES, on_cluster)


def test_a_report_waits_for_a_storage_that_is_silent(context, monkeypatch):
    reported, failures = [], iter([OSError("AWS Error NETWORK_CONNECTION"), OSError(errno.ESTALE, "stale")])

    def report(result, checkpoint=None):
        for error in failures:
            raise error
        reported.append(result["updates"])

    monkeypatch.setattr(trial.tune, "report", report)
    monkeypatch.setattr("workflows.storage.storage._SECONDS_BETWEEN_RETRIES", 0.01)
    run_trial(VALUES, context)
    assert reported == [10, 20]
