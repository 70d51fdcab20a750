"""Small models of the heart, and finalists whose samples are given."""

import numpy as np
import pytest
import torch

from diffusion.data.dataset import load_dataset
from diffusion.evaluation.distances import Estimate
from diffusion.evaluation.evaluator import Evaluator
from diffusion.networks.build import build_network
from diffusion.presets import preset
from diffusion.training.checkpoints import TrainedModel
from workflows.data.load import LoadedData
from workflows.sweep import confirmation

SMALL = {
    "schedule.num_train_timesteps": 20,
    "network.hidden_size": 8,
    "network.num_blocks": 1,
    "network.time_embedding_size": 8,
    "sampler.num_steps": 5,
    "metrics.num_samples": 10,
    "metrics.num_examples": 16,
    "metrics.choose_sampler": False,
    "training.num_updates": 40,
}


@pytest.fixture(scope="package")
def heart():
    return LoadedData(load_dataset(preset("heart").data))


@pytest.fixture
def make_model(heart):
    """Function (objective, spread, update) -> an untrained model with these metrics.

    What `drawn_samples` draws from it are points with the standard deviation `spread`, its initial bias.
    """

    def make(objective=1.0, spread=1.0, update=40, **values):
        config = preset("heart").with_values(SMALL | values)
        with torch.random.fork_rng():
            network = build_network(config, (2,)).eval().requires_grad_(False)
        network.outward.bias.fill_(spread)
        metrics = {"objective": objective, "val/elbo_window": objective, "val/mse": 1.0 / objective}
        return TrainedModel(config, heart.dataset.spec, network, {"update": update, "metrics": metrics})

    return make


@pytest.fixture
def save_finalists(tmp_path):
    """Function (models by ID) -> their folders, with the objective of each example."""

    def save(models):
        folders = {}
        for name, model in models.items():
            folders[name] = tmp_path / "trials" / name
            model.save(folders[name])
            objective = model.provenance["metrics"]["objective"]
            np.save(folders[name] / "elbo_per_example.npy", objective + np.linspace(-1.0, 1.0, 16))
        return folders

    return save


class SpreadMetrics:
    """Measures samples by their standard deviation, as distance and as AUC; smaller is better."""

    def __init__(self, dataset, held_out, features):
        self.held_out = held_out

    def compute(self, samples):
        spread = float(samples.std())
        return {"distance": spread, "distance_se": 0.01, "auc": spread, "auc_se": 0.01}

    def difference(self, a, b):
        return dict.fromkeys(("distance", "auc"), Estimate(float(a.std() - b.std()), 0.01))


@pytest.fixture
def drawn_samples(monkeypatch):
    """Calls of the sampler as (seed, num_samples); it and the metrics are replaced by quick ones."""
    calls = []

    def samples(self, network, *, num_samples, seed):
        calls.append((seed, num_samples))
        noise = torch.randn(num_samples, 2, generator=torch.Generator().manual_seed(seed))
        return noise * float(network.outward.bias[0])

    monkeypatch.setattr(Evaluator, "samples", samples)
    monkeypatch.setattr(confirmation, "SampleMetrics", SpreadMetrics)
    return calls
