"""Metrics of a finished model: what is reported as `test/...` is measured on the test split."""

import dataclasses

import pytest

from diffusion.data.dataset import Split, load_dataset
from diffusion.evaluation import evaluator
from diffusion.evaluation.evaluator import Evaluator
from diffusion.networks.build import build_network
from diffusion.presets import preset
from diffusion.training.checkpoints import TrainedModel
from workflows.publishing.final_metrics import metrics_on_test_split


@pytest.fixture
def measured():
    """An untrained model, and data whose test split is far away from the validation split."""
    small = {"network.hidden_size": 8, "schedule.num_train_timesteps": 20, "sampler.num_steps": 2}
    config = preset("heart").with_values(small | {"metrics.num_samples": 20, "metrics.num_examples": 64})
    dataset = load_dataset(config.data)
    far = dataclasses.replace(dataset, test=Split(dataset.test[:200] + 10.0))
    return TrainedModel(config, dataset.spec, build_network(config, (2,)).eval(), {}), far


def test_test_metrics_are_those_of_the_test_split(measured, monkeypatch):
    model, dataset = measured
    seeds = []

    class Centre:
        """The centre of the held-out examples as the only metric of samples."""

        def __init__(self, dataset, held_out, features, add_training):
            assert not add_training, "samples are compared with examples that no training has seen"
            self.held_out = held_out

        def compute(self, samples):
            return {"centre": float(self.held_out.mean())}

    draw = Evaluator.samples

    def samples(self, network, *, num_samples, seed):
        seeds.append(seed)
        return draw(self, network, num_samples=num_samples, seed=seed)

    monkeypatch.setattr(evaluator, "SampleMetrics", Centre)
    monkeypatch.setattr(Evaluator, "samples", samples)
    metrics = metrics_on_test_split(model, dataset, None)
    assert all(name.startswith("test/") for name in metrics)
    assert metrics["test/sample_centre"] == float(dataset.test[:].mean()) > 9.0
    on_validation, _ = Evaluator(model.config, dataset).held_out_losses(model.network)
    on_test = dataclasses.replace(dataset, val=dataset.test)
    expected, _ = Evaluator(model.config, on_test).held_out_losses(model.network)
    assert metrics["test/elbo_window"] == expected["val/elbo_window"]
    assert metrics["test/elbo_window"] != pytest.approx(on_validation["val/elbo_window"], rel=0.05)
    assert len(seeds) == 1 and model.config.metrics.seed not in seeds
