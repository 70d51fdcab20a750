"""Pictures of samples, and of a network that has not been trained."""

import dataclasses
import io

import pytest
import torch
from PIL import Image

from diffusion.config import DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.presets import preset
from diffusion.training.checkpoints import TrainedModel
from diffusion.training.loop import Training, evaluation_points
from workflows.training import evaluation_files
from workflows.training.evaluation_files import pictured_updates, untrained_picture, write_evaluation


@pytest.mark.usefixtures("small_reference")
@pytest.mark.parametrize("name", ["heart", "digits"])
def test_a_training_does_not_depend_on_whether_its_beginning_was_pictured(name):
    config = preset(name).with_values(
        {
            "training.num_updates": 3,
            "training.num_evaluations": 1,
            "training.batch_size": 16,
            "network.hidden_size": 16,
            "metrics.num_samples": 20,
            "metrics.num_examples": 20,
            "sampler.num_steps": 3,
        }
    )
    dataset = load_dataset(DataConfig(name=name))
    weights = []
    for pictured in (False, True):
        training = Training(config, dataset, lambda result: None)
        if pictured:
            with Image.open(io.BytesIO(untrained_picture(training.model))) as picture:
                assert picture.size > (40, 40)
        training.run()
        weights.append(training.train_step.network.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.fixture(name="model_of", scope="module")
def _model_of():
    """Function (name of data, values of the config) -> a model without a network."""
    specs = {name: load_dataset(DataConfig(name=name)).spec for name in ("heart", "digits")}

    def model_of(name, **values):
        config = preset(name).with_values({key.replace("__", "."): value for key, value in values.items()})
        return TrainedModel(config, specs[name], None)

    return model_of


@pytest.mark.parametrize("name", ["heart", "digits"])
@pytest.mark.parametrize("num_updates", [2, 40, 1000, 8000, 100_000])
@pytest.mark.parametrize("num_steps", [5, 100])
def test_pictures_take_a_tenth_of_the_network_evaluations_at_most(model_of, name, num_updates, num_steps):
    """But for the last one, which has no fewer samples than the picture of the untrained network."""
    model = model_of(name, training__num_updates=num_updates, sampler__num_steps=num_steps)
    training = model.config.training
    pictured, points = pictured_updates(model), evaluation_points(training)
    assert pictured <= set(points) and points[-1] in pictured
    count = evaluation_files._num_samples(model)
    of_training = 3 * training.batch_size * num_updates
    of_others = (len(pictured) - 1) * count * num_steps
    assert of_others <= 0.1 * of_training
    assert (
        count <= evaluation_files._FEWEST_SAMPLES[model.data.kind] or count * num_steps <= 0.1 * of_training
    )


def test_a_long_training_has_a_picture_of_each_evaluation_and_a_tiny_one_of_the_last(model_of):
    long, tiny = (model_of("digits", training__num_updates=updates) for updates in (8000, 40))
    assert pictured_updates(long) == set(evaluation_points(long.config.training))
    assert pictured_updates(tiny) == {40}


def test_a_picture_shows_the_best_model_so_far(tmp_path, monkeypatch):
    drawn = []

    def draw(model, count, title, inputs):
        drawn.append((model.network.state_dict(), title))
        return Image.new("L", (1, 1))

    monkeypatch.setattr(evaluation_files, "_draw", draw)
    config = preset("heart").with_values({"training.num_updates": 2, "training.num_evaluations": 2})
    config = config.with_values({"metrics.num_samples": 20, "metrics.num_examples": 20})
    config = config.with_values({"sampler.num_steps": 2, "schedule.num_train_timesteps": 10})
    results = []
    training = Training(config, load_dataset(DataConfig(name="heart")), results.append)
    training.run()
    last, first = results[-1], results[0].best
    for best, title in ((first, "1 updates"), (dataclasses.replace(first, update=2), "2 updates")):
        write_evaluation(dataclasses.replace(last, best=best), {}, tmp_path)
        weights, shown = drawn.pop()
        assert shown == title
        expected = best.weights if best.update == 1 else last.model.network.state_dict()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
