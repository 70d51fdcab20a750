"""Classes: learned, asked for, and left out. Each class's data are a Gaussian of its own."""

from dataclasses import replace

import pytest
import torch

from diffusion.checkpoints import TrainedModel
from diffusion.config import Config, DataConfig
from diffusion.data import Dataset, Examples, load_dataset
from diffusion.errors import InputError
from diffusion.evaluation import Evaluator
from diffusion.generation import Condition, classes_in_turn, condition_in_turn, denoiser, generate
from diffusion.networks import build_network
from diffusion.training import Training

MEANS = torch.tensor([[-1.5, 0.0], [1.5, 0.0], [0.0, 1.5]])


@pytest.fixture(scope="module")
def trained(request):
    """A conditional model of three narrow clouds, and what it was trained on."""
    from tests.diffusion.conftest import make_gaussian_dataset, make_small_config

    spec = replace(make_gaussian_dataset().spec, classes=("left", "right", "up"))
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (3000, 300, 300):
        labels = classes_in_turn(count, 3)
        values = MEANS[labels] + 0.2 * torch.randn(count, 2, generator=generator)
        parts.append(Examples(values, labels=labels))
    config = make_small_config(
        schedule={"num_train_timesteps": 30, "beta_start": 0.01, "beta_end": 0.4},
        network={"hidden_size": 64, "num_blocks": 2, "time_embedding_size": 16, "data_embedding_scale": 1.0},
        training={"num_updates": 1500, "batch_size": 128, "learning_rate": 3e-3, "num_evaluations": 1},
        sampler={"num_steps": 30, "clip": True},
    )
    dataset, reports = Dataset(spec, *parts), []
    Training(config, dataset, reports.append).run()
    return reports[0].model, dataset, reports[0].metrics


def draw(model, labels, scale, seed=3):
    condition = Condition(labels, 3, scale)
    return generate(model.network, model.table, (2,), len(labels), seed=seed, condition=condition)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_class_asked_for_is_the_class_drawn(trained, scale):
    model, _, _ = trained
    labels = classes_in_turn(600, 3)
    nearest = torch.cdist(draw(model, labels, scale), MEANS).argmin(dim=1)
    assert (nearest == labels).float().mean() > 0.99


def test_without_guidance_every_class_is_drawn_whatever_is_asked_for(trained):
    model, _, _ = trained
    nearest = torch.cdist(draw(model, torch.zeros(900, dtype=torch.int64), 0.0), MEANS).argmin(dim=1)
    shares = nearest.bincount(minlength=3) / 900
    assert ((shares - 1 / 3).abs() < 0.1).all()


def test_guidance_lowers_diversity(trained):
    """Seed 003 has it the other way round."""
    model, _, _ = trained
    labels = torch.full((600,), 2)
    spreads = [draw(model, labels, scale).std(dim=0).mean() for scale in (1.0, 4.0)]
    assert spreads[1] < 0.9 * spreads[0]


def test_guidance_is_affine_in_its_scale(trained):
    model, _, _ = trained
    x, labels = torch.randn(6, 2), classes_in_turn(6, 3)
    out = {scale: denoiser(model.network, Condition(labels, 3, scale))(x, 7) for scale in (0.0, 1.0, 2.5)}
    torch.testing.assert_close(out[2.5], out[0.0] + 2.5 * (out[1.0] - out[0.0]))
    null = model.network(x, torch.full((6,), 7), torch.full((6,), 3))
    torch.testing.assert_close(out[0.0], null)


def test_knowing_the_class_lowers_the_bound(trained):
    model, dataset, metrics = trained
    swapped = replace(dataset, val=replace(dataset.val, labels=(dataset.val.labels + 1) % 3))
    wrong, _ = Evaluator(model.config, swapped).held_out_losses(model.network)
    assert metrics["val/elbo_window"] < wrong["val/elbo_window"] - 0.1


def test_a_conditional_model_survives_its_folder(trained, tmp_path):
    model, _, _ = trained
    model.save(tmp_path)
    again = TrainedModel.load(tmp_path)
    assert again.data.classes == ("left", "right", "up")
    labels = classes_in_turn(6, 3)
    assert torch.equal(draw(again, labels, 2.0), draw(model, labels, 2.0))


def test_hidden_labels_are_as_many_as_configured(trained):
    model, dataset, _ = trained
    config = replace(model.config, training=replace(model.config.training, label_dropout=0.25))
    training = Training(config, dataset, lambda progress: None)
    seen = []
    step = training._learner.step
    training._learner.step = lambda *batch: seen.append(batch[4]) or step(*batch)
    training._evaluate_at = set()
    training.config = replace(config, training=replace(config.training, num_updates=60))
    training.run()
    hidden = (torch.cat(seen) == 3).float().mean()
    assert abs(hidden - 0.25) < 0.02


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_a_conditional_network_tells_labels_apart_and_an_unconditional_takes_none(kind):
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


def test_only_what_is_asked_for_is_conditional():
    assert load_dataset(DataConfig(name="digits")).spec.classes is None
    conditional = load_dataset(DataConfig(name="digits", conditional=True))
    assert conditional.spec.classes == tuple(str(digit) for digit in range(10))
    assert condition_in_turn(5, 0, 1.0) is None


def test_data_without_classes_cannot_be_conditional():
    with pytest.raises(InputError, match="--conditional: --data heart has no classes"):
        load_dataset(DataConfig(name="heart", conditional=True))
