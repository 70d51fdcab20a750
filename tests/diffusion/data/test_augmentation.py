import math

import pytest
import torch

from diffusion.config import AUGMENTATION_SIZE
from diffusion.data.augmentation import augment, draw_augmentations
from diffusion.data.dataset import load_dataset
from diffusion.errors import InputError
from diffusion.networks.build import build_network
from diffusion.presets import preset
from diffusion.training.checkpoints import TrainedModel
from diffusion.training.loop import Training
from export.to_onnx import denoiser_graph, sampler_spec

CLIP = (-1.0, 1.0)


def images(count, height=12, width=12):
    return torch.rand(count, 2, height, width, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


def of(**changes):
    """The description of one change: flip_x, flip_y, scale, cos - 1, sin, stretch (2), shift (2)."""
    names = ["flip_x", "flip_y", "scale", "cos", "sin", "p", "q", "right", "down"]
    values = torch.zeros(1, AUGMENTATION_SIZE)
    for name, value in changes.items():
        values[0, names.index(name)] = value
    return values


def test_a_description_of_zeros_is_the_image_itself():
    x = images(3)
    assert torch.equal(augment(x, torch.zeros(3, AUGMENTATION_SIZE), CLIP), x)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (of(flip_x=1.0), lambda x: x.flip(-1)),
        (of(flip_y=1.0), lambda x: x.flip(-2)),
        (of(cos=-2.0), lambda x: x.flip(-1, -2)),  # half a turn
        (of(cos=-1.0, sin=1.0), lambda x: x.rot90(-1, (-2, -1))),
        (of(cos=-1.0, sin=-1.0), lambda x: x.rot90(1, (-2, -1))),
    ],
)
def test_flips_and_turns_are_exact(change, expected):
    x = images(1)
    torch.testing.assert_close(augment(x, change, CLIP), expected(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(12, 12), (12, 24)])
def test_a_shift_moves_pixels_by_a_fraction_of_the_side(size):
    x = images(1, *size)
    moved = augment(x, of(right=0.25, down=0.25), CLIP)
    rows, columns = size[0] // 4, size[1] // 4
    torch.testing.assert_close(moved[..., rows:, columns:], x[..., :-rows, :-columns], atol=1e-4, rtol=0)


def gaussian_blob(height, width):
    """A picture of a round blob, whose second moments show how it was stretched."""
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width)[None] - (width - 1) / 2
    return torch.exp(-(x**2 + y**2) / 18.0)[None, None]


def moments(picture):
    height, width = picture.shape[-2:]
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width)[None] - (width - 1) / 2
    mass = picture[0, 0] / picture[0, 0].sum()
    return float((mass * x * x).sum()), float((mass * x * y).sum()), float((mass * y * y).sum())


@pytest.mark.parametrize("size", [(48, 48), (40, 64)])
@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2])
def test_a_stretch_lengthens_along_its_line_and_keeps_the_area(size, angle):
    """Twice the logarithm of the length along the line is 2 ln 2 w, and across it -2 ln 2 w."""
    w = 0.3
    change = of(p=w * math.cos(2 * angle), q=w * math.sin(2 * angle))
    xx, xy, yy = moments(augment(gaussian_blob(*size), change, (0.0, 1.0)))
    base = moments(gaussian_blob(*size))[0]
    c, s = math.cos(angle), math.sin(angle)
    along = c * c * xx + 2 * c * s * xy + s * s * yy
    across = s * s * xx - 2 * c * s * xy + c * c * yy
    assert along / base == pytest.approx(4.0**w, rel=0.02)
    assert across / base == pytest.approx(4.0**-w, rel=0.02)


def test_a_scale_enlarges():
    base, actual = (moments(augment(gaussian_blob(48, 48), of(scale=s), (0.0, 1.0)))[0] for s in (1e-9, 0.4))
    assert actual / base == pytest.approx(4.0**0.4, rel=0.02)


def test_each_change_is_made_as_often_as_asked():
    drawn = draw_augmentations(20_000, 0.3, torch.Generator().manual_seed(1))
    assert drawn.shape == (20_000, AUGMENTATION_SIZE) and drawn.dtype == torch.float32
    made = (drawn != 0.0).double().mean(dim=0)
    expected = torch.tensor([0.15, 0.15] + [0.3] * 7, dtype=torch.float64)
    assert (made - expected).abs().max() < 0.015
    assert not draw_augmentations(100, 0.0, torch.Generator()).any()
    both = ((drawn[:, 2] != 0) & (drawn[:, 7] != 0)).double().mean()
    assert abs(float(both) - 0.09) < 0.01, "changes are independent"


@pytest.fixture(params=["mlp", "unet"])
def config(request):
    values = {
        "network.kind": request.param, "network.hidden_size": 16, "network.base_channels": 8,
        "network.channel_multipliers": (1,), "training.augment": 0.5, "training.num_updates": 4,
        "training.num_evaluations": 1, "training.batch_size": 8, "metrics.num_examples": 8,
        "metrics.num_samples": 20, "sampler.num_steps": 2, "schedule.num_train_timesteps": 20,
    }  # fmt: skip
    return preset("digits").with_values(values)


def test_the_network_sees_augmented_images_with_their_description(config):
    dataset = load_dataset(config.data)
    training = Training(config, dataset, lambda result: None)
    network = training.train_step.network
    told = {
        name: w.clone()
        for name, w in network.named_parameters()
        if "augmentation" in name or "context" in name
    }
    seen, run = [], training.train_step.run
    training.train_step.run = lambda *batch: seen.append((batch[1], batch[6])) or run(*batch)
    training.run()
    plain = Training(config.with_values({"training.augment": 0.0}), dataset, lambda result: None)
    originals, run_plain = [], plain.train_step.run
    plain.train_step.run = lambda *batch: originals.append(batch[1]) or run_plain(*batch)
    plain.run()
    for (x_0, described), original in zip(seen, originals, strict=True):
        torch.testing.assert_close(x_0, augment(original, described, dataset.spec.clip))
        changed = (described != 0.0).any(dim=1)
        assert torch.equal(x_0[~changed], original[~changed]) and bool(changed.any())
    assert told and all(not torch.equal(network.get_parameter(name), w) for name, w in told.items())


def test_samples_are_those_of_no_augmentation(config):
    """None is the same as zeros, and the exported graph has no such input."""
    dataset = load_dataset(config.data)
    torch.manual_seed(0)
    network = build_network(config, dataset.spec.shape).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.add_(0.1 * torch.randn(weight.shape))
    x, t = torch.randn(4, 1, 8, 8), torch.arange(4)
    none = network(x, t)
    assert torch.equal(none, network(x, t, augmentation=torch.zeros(4, AUGMENTATION_SIZE)))
    assert not torch.equal(none, network(x, t, augmentation=torch.ones(4, AUGMENTATION_SIZE)))
    graph = denoiser_graph(network, sampler_spec(TrainedModel(config, dataset.spec, network)))
    assert [value.name for value in graph.graph.input] == ["x", "t"]


def test_points_and_networks_that_cannot_be_told_are_refused(config, monkeypatch):
    from diffusion.registry import NETWORKS

    with pytest.raises(InputError, match="--training.augment 0.5: only images are augmented"):
        build_network(config, (2,))
    monkeypatch.setitem(NETWORKS._loaded, config.network.kind, lambda *arguments: torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=f"the network {config.network.kind} is not told"):
        build_network(config, (1, 8, 8))
