"""Conditional models, guidance and label dropout, on data with one Gaussian per class."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.config import Config, DataConfig
from diffusion.data.dataset import Dataset, Split, load_dataset
from diffusion.errors import InputError
from diffusion.evaluation.evaluator import Evaluator
from diffusion.networks.build import build_network
from diffusion.presets import preset
from diffusion.process.generate import Condition, cycling_condition, cycling_labels, denoiser, generate
from diffusion.training.checkpoints import TrainedModel
from diffusion.training.loop import Training

MEANS = torch.tensor([[-1.5, 0.0], [1.5, 0.0], [0.0, 1.5]])


@pytest.fixture(scope="module")
def trained(request):
    """A conditional model of three narrow Gaussians, its data set and its metrics."""
    from tests.diffusion.conftest import make_gaussian_dataset, make_small_config

    spec = replace(make_gaussian_dataset().spec, classes=("left", "right", "up"))
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (3000, 300, 300):
        labels = cycling_labels(count, 3)
        values = MEANS[labels] + 0.2 * torch.randn(count, 2, generator=generator)
        parts.append(Split(values, labels=labels))
    config = make_small_config(
        schedule={"num_train_timesteps": 30, "beta_start": 0.01, "beta_end": 0.4},
        network={"hidden_size": 64, "num_blocks": 2, "time_embedding_size": 16, "data_embedding_scale": 1.0},
        training={"num_updates": 800, "batch_size": 128, "learning_rate": 3e-3, "num_evaluations": 1},
        sampler={"num_steps": 30, "clip": True},
    )
    dataset, reports = Dataset(spec, *parts), []
    Training(config, dataset, reports.append).run()
    return reports[0].model, dataset, reports[0].metrics


def draw(model, labels, scale, seed=3):
    condition = Condition(labels, 3, scale)
    return generate(model.network, model.table, (2,), len(labels), seed=seed, condition=condition)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_samples_have_the_requested_class(trained, scale):
    model, _, _ = trained
    labels = cycling_labels(600, 3)
    nearest = torch.cdist(draw(model, labels, scale), MEANS).argmin(dim=1)
    assert (nearest == labels).float().mean() > 0.99


def test_at_guidance_scale_0_every_class_is_drawn_whatever_is_requested(trained):
    model, _, _ = trained
    nearest = torch.cdist(draw(model, torch.zeros(900, dtype=torch.int64), 0.0), MEANS).argmin(dim=1)
    frequencies = nearest.bincount(minlength=3) / 900
    assert ((frequencies - 1 / 3).abs() < 0.1).all()


def test_guidance_lowers_diversity(trained):
    """Source document 003 claims the opposite."""
    model, _, _ = trained
    labels = torch.full((600,), 2)
    spreads = [draw(model, labels, scale).std(dim=0).mean() for scale in (1.0, 4.0)]
    assert spreads[1] < 0.9 * spreads[0]


def test_guidance_is_affine_in_its_scale(trained):
    model, _, _ = trained
    x, labels = torch.randn(6, 2), cycling_labels(6, 3)
    out = {scale: denoiser(model.network, Condition(labels, 3, scale))(x, 7) for scale in (0.0, 1.0, 2.5)}
    torch.testing.assert_close(out[2.5], out[0.0] + 2.5 * (out[1.0] - out[0.0]))
    null = model.network(x, torch.full((6,), 7), torch.full((6,), 3))
    torch.testing.assert_close(out[0.0], null)


def test_the_right_labels_lower_the_bound(trained):
    model, dataset, metrics = trained
    swapped = replace(dataset, val=replace(dataset.val, labels=(dataset.val.labels + 1) % 3))
    wrong, _ = Evaluator(model.config, swapped).held_out_losses(model.network)
    assert metrics["val/elbo_window"] < wrong["val/elbo_window"] - 0.1


def test_a_conditional_model_is_saved_and_loaded(trained, tmp_path):
    model, _, _ = trained
    model.save(tmp_path)
    again = TrainedModel.load(tmp_path)
    assert again.data.classes == ("left", "right", "up")
    labels = cycling_labels(6, 3)
    assert torch.equal(draw(again, labels, 2.0), draw(model, labels, 2.0))


def test_labels_are_dropped_as_often_as_configured(trained):
    model, dataset, _ = trained
    config = model.config.with_values({"training.label_dropout": 0.25, "training.num_updates": 60})
    training = Training(config, dataset, lambda result: None)
    labels = []
    run = training.train_step.run
    training.train_step.run = lambda *batch: labels.append(batch[4][0]) or run(*batch)
    training.run()
    dropped = (torch.cat(labels) == 3).float().mean()
    assert abs(dropped - 0.25) < 0.02


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_a_conditional_network_depends_on_the_label_and_an_unconditional_one_has_no_label_weights(kind):
    config = Config().with_values(
        {"network.kind": kind, "network.base_channels": 8, "network.channel_multipliers": (1,)}
    )
    network = build_network(config, (1, 8, 8), num_classes=4).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 3])
    outputs = [network(x, t, torch.full((2,), label)) for label in range(5)]
    assert all(not torch.equal(one, two) for one, two in zip(outputs, outputs[1:], strict=False))
    assert sum(weight.numel() for weight in build_network(config, (1, 8, 8)).parameters()) < sum(
        weight.numel() for weight in network.parameters()
    )


def test_models_are_conditional_only_on_request():
    assert load_dataset(DataConfig(name="digits")).spec.classes is None
    conditional = load_dataset(DataConfig(name="digits", conditional=True))
    assert conditional.spec.classes == tuple(str(digit) for digit in range(10))
    assert cycling_condition(5, 0, 1.0) is None


def test_data_without_classes_cannot_be_conditional():
    with pytest.raises(InputError, match="--conditional: --data heart has no classes"):
        load_dataset(DataConfig(name="heart", conditional=True))


def test_a_conditional_model_samples_the_given_classes_with_the_given_guidance():
    """The same noise and network as `generate` gets, in data units."""
    config = preset("digits").with_values({"data.conditional": True, "network.hidden_size": 8})
    spec = load_dataset(config.data).spec
    torch.manual_seed(0)
    network = build_network(config, spec.shape, spec.num_classes).eval()
    torch.nn.init.normal_(network.outward.weight)
    model = TrainedModel(config, spec, network)
    samples = model.sample(3, seed=2, labels=[7, 0, 7], guidance_scale=3.0)
    condition = Condition(torch.tensor([7, 0, 7]), 10, 3.0)
    expected = generate(network, model.table, spec.shape, 3, seed=2, condition=condition)
    np.testing.assert_allclose(samples, spec.denormalise(expected.numpy()), rtol=1e-6)
    assert not np.array_equal(samples, model.sample(3, seed=2))
    for arguments in ({"labels": [1]}, {"labels": [1, 2, 10]}, {"num_samples": 0}):
        with pytest.raises(InputError, match="give"):
            model.sample(**{"num_samples": 3, **arguments})
    unconditional = preset("heart")
    points = load_dataset(unconditional.data).spec
    plain = TrainedModel(unconditional, points, build_network(unconditional, points.shape).eval())
    with pytest.raises(InputError, match="this model has no classes"):
        plain.sample(3, labels=[1, 1, 1])
