"""The second model of a cascade: what its network receives in training, evaluations and sampling."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.config import Config, DataConfig, SamplerConfig, TrainingConfig
from diffusion.data.dataset import load_dataset
from diffusion.data.low_resolution import LowResolution
from diffusion.data.sources import open_source
from diffusion.errors import InputError
from diffusion.evaluation.evaluator import Evaluator
from diffusion.networks.build import build_network
from diffusion.presets import source_preset
from diffusion.training.checkpoints import TrainedModel, read_checkpoint, write_checkpoint
from diffusion.training.loop import Training

SMALL = {
    "network.base_channels": 8, "network.channel_multipliers": (1,), "training.num_updates": 4,
    "training.num_evaluations": 2, "training.batch_size": 8, "metrics.num_examples": 8,
    "metrics.num_samples": 20, "metrics.choose_sampler": False, "sampler.num_steps": 2,
    "schedule.num_train_timesteps": 20,
}  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["unconditional", "conditional"])
def config(request):
    data = DataConfig(name="digits", super_resolution="4:8", conditional=request.param)
    return source_preset(open_source(data)).with_values(SMALL)


@pytest.fixture(scope="module")
def dataset(config):
    return load_dataset(config.data)


def test_training_gives_each_example_its_own_low_resolution_image_with_known_noise(config, dataset):
    training = Training(config, dataset, lambda result: None)
    seen, run = [], training.train_step.run
    training.train_step.run = lambda *batch: seen.append((batch[1], batch[4][-2:])) or run(*batch)
    training.run()
    of = LowResolution(dataset.spec, 4).of
    for x_0, (images, levels) in seen:
        assert float(levels.min()) >= 0.0 and float(levels.max()) <= config.training.low_resolution_noise
        assert len(levels.unique()) == len(levels)
        noise = (images - of(x_0)) / levels[:, None, None, None]
        assert 0.7 < float(noise.std()) < 1.3
    assert len(seen) == 4


def test_a_resumed_training_ends_with_the_same_weights(config, dataset, tmp_path):
    config = config.with_values({"training.augment": 0.3})

    def save(model, state):
        write_checkpoint(tmp_path / str(state.update), model, state, {})

    whole = Training(config, dataset, lambda result: None, save=save)
    whole.run()
    model, state, _ = read_checkpoint(tmp_path / "2")
    resumed = Training(config, dataset, lambda result: None, resume=(model, state))
    resumed.run()
    weights, others = (each.model.network.state_dict() for each in (whole, resumed))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def trained(config, dataset):
    torch.manual_seed(0)
    network = build_network(config, dataset.spec.shape, dataset.spec.num_classes).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.add_(0.1 * torch.randn(weight.shape))
    return TrainedModel(config, dataset.spec, network)


def test_evaluations_see_the_low_resolution_images_of_the_validation_examples(config, dataset):
    model = trained(config, dataset)
    evaluator = Evaluator(config, dataset)
    images, levels = evaluator.low_resolution(len(dataset.val) + 3)
    clean = LowResolution(dataset.spec, 4).of(dataset.val[:])
    assert torch.equal(levels, torch.full((len(images),), config.sampler.low_resolution_noise))
    assert abs(float((images[: len(clean)] - clean).std()) - config.sampler.low_resolution_noise) < 0.01
    assert not torch.equal(images[: len(clean)], clean)
    assert float((images[len(clean) :] - clean[:3]).abs().max()) < 6 * config.sampler.low_resolution_noise
    others = Evaluator(config, replace(dataset, val=replace(dataset.val, values=dataset.val.values.flip(0))))
    one, two = (each.samples(model.network, num_samples=4, seed=0) for each in (evaluator, others))
    assert not torch.equal(one, two)
    same, again = (each.held_out_losses(model.network)[0] for each in (evaluator, Evaluator(config, dataset)))
    assert same == again


def test_a_model_is_saved_loaded_and_sampled(config, dataset, tmp_path):
    model = trained(config, dataset)
    model.save(tmp_path)
    again = TrainedModel.load(tmp_path)
    low = LowResolution(dataset.spec, 4)
    images = low.denormalised(low.of(dataset.val[:3]))
    one, two = (each.sample(3, low_resolution=images) for each in (model, again))
    assert one.shape == (3, 1, 8, 8)
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, model.sample(3, low_resolution=images[::-1].copy()))
    with pytest.raises(InputError, match=r"this is a super-resolution model; give images \[3, 1, 4, 4\]"):
        model.sample(3)


def test_the_network_enlarges_the_image_and_reads_its_noise_level(config, dataset):
    network = trained(config, dataset).network
    x, t, low = torch.randn(2, 1, 8, 8), torch.tensor([3, 3]), torch.randn(2, 1, 4, 4)
    labels = [torch.tensor([1, 2])] if dataset.spec.num_classes else []
    base = network(x, t, *labels, low, torch.zeros(2))
    assert base.shape == x.shape
    assert not torch.equal(base, network(x, t, *labels, low + 1.0, torch.zeros(2)))
    assert not torch.equal(base, network(x, t, *labels, low, torch.full((2,), 0.3)))


def test_sampling_noise_that_training_never_had_is_refused():
    data = DataConfig(name="digits", super_resolution="4:8")
    with pytest.raises(InputError, match="--sampler.low-resolution-noise 0.6 is more than the 0.5"):
        Config(
            data=data,
            network=source_preset(open_source(data)).network,
            training=TrainingConfig(),
            sampler=SamplerConfig(low_resolution_noise=0.6),
        )


def test_other_models_take_no_low_resolution_image():
    dataset = load_dataset(DataConfig(name="heart"))
    config = source_preset(open_source(DataConfig(name="heart")))
    model = TrainedModel(config, dataset.spec, build_network(config, (2,)).eval())
    with pytest.raises(InputError, match="this is no super-resolution model"):
        model.sample(2, low_resolution=np.zeros((2, 1, 4, 4)))
