"""The picture of a network that has not been trained."""

import io

import pytest
import torch
from PIL import Image

from diffusion.config import DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.presets import preset
from diffusion.training.loop import Training
from workflows.training.evaluation_files import untrained_picture


@pytest.mark.parametrize("name", ["heart", "digits"])
def test_a_training_does_not_depend_on_whether_its_beginning_was_pictured(name):
    config = preset(name).with_values({"training.num_updates": 3, "training.num_evaluations": 1})
    config = config.with_values(
        {"metrics.num_samples": 20, "metrics.num_examples": 20, "sampler.num_steps": 3}
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
