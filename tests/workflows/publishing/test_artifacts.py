"""Files of a published model: each step alone, and their sequence."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.config import DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.data.sources import open_source
from diffusion.networks.build import build_network
from diffusion.presets import preset, source_preset
from diffusion.training.checkpoints import TrainedModel
from export.parity import ParityCase, ParityError
from export.sampler import Sampler
from export.torch_sampler import TorchSampler
from workflows.publishing import export
from workflows.publishing.artifacts import write_model_artifacts
from workflows.publishing.export import write_export
from workflows.publishing.final_metrics import metrics_on_test_split
from workflows.publishing.model_card import MODEL_CARD, write_model_card
from workflows.publishing.pictures import with_nearest, write_pictures

pytestmark = pytest.mark.usefixtures("small_reference")

SMALL = {
    "schedule.num_train_timesteps": 20,
    "network.hidden_size": 8,
    "network.num_blocks": 1,
    "network.time_embedding_size": 8,
    "sampler.num_steps": 5,
    "metrics.num_samples": 40,
    "metrics.num_examples": 32,
    "metrics.choose_sampler": False,
}
EXPORTED = {"config.json", "model.safetensors", "sampler.onnx", "parity.json"}
POINT_PICTURES = {"samples.png", "samples_onnx.png", "animation.gif"}


def make_model(data):
    """An untrained model of a data set, and the data set."""
    config = preset(data).with_values(SMALL)
    dataset = load_dataset(config.data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(config, dataset.spec.shape)
        torch.nn.init.normal_(network.outward.weight, std=0.1)
    return TrainedModel(config, dataset.spec, network.eval().requires_grad_(False), {}), dataset


@pytest.fixture(scope="module")
def points():
    return make_model("heart")


@pytest.fixture(scope="module")
def drawn(points):
    return TorchSampler.of(points[0]).draw(2000, num_shown=2000)


@pytest.fixture(scope="module")
def exported(points, drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "new"
    model, dataset = points
    samples = write_export(model, drawn, dataset, None, folder)
    np.testing.assert_allclose(samples, dataset.spec.denormalise(drawn.samples), atol=1e-3)
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_the_export_writes_the_model_its_onnx_file_and_the_comparison(points, exported):
    assert names(exported) >= EXPORTED
    assert json.loads((exported / "parity.json").read_text())["passed"]
    assert Sampler(exported / "sampler.onnx", provider="cpu").sample(3).shape == (3, 2)
    assert TrainedModel.load(exported).config == points[0].config


def test_an_export_that_fails_parity_writes_nothing(points, tmp_path, monkeypatch):
    failed = ParityCase("distance", 1.0, 1.0, False, 1.0)
    monkeypatch.setattr(export, "check_samples", lambda *_: [failed])
    with pytest.raises(ParityError, match="nothing was written"):
        write_model_artifacts(*points, None, tmp_path / "model", print)
    assert not (tmp_path / "model").exists()


def test_pictures_of_points_show_the_samples_of_pytorch_and_of_the_file(points, drawn, exported, tmp_path):
    samples = Sampler(exported / "sampler.onnx", provider="cpu").sample(len(drawn.samples), seed=0)
    write_pictures(points[0], drawn, samples, points[1], tmp_path)
    assert names(tmp_path) == POINT_PICTURES
    ours, theirs = (
        np.asarray(Image.open(tmp_path / name).convert("L"), dtype=float)[40:]
        for name in ("samples.png", "samples_onnx.png")
    )
    assert ours.std() > 0 and np.abs(ours - theirs).mean() < 0.5
    with Image.open(tmp_path / "animation.gif") as animation:
        assert animation.n_frames > 6, "forward and reverse diffusion"


def test_pictures_of_images_have_each_samples_nearest_training_image(tmp_path):
    model, dataset = make_model("digits")
    drawn = TorchSampler.of(model).draw(64, num_shown=64)
    write_pictures(model, drawn, model.data.denormalise(drawn.samples), dataset, tmp_path)
    assert names(tmp_path) == POINT_PICTURES | {"nearest.png"}
    with Image.open(tmp_path / "nearest.png") as pairs:
        assert min(pairs.size) > 0


def test_a_sample_that_is_a_training_image_has_that_image_below_it():
    _, dataset = make_model("digits")
    copies = dataset.raw(dataset.train[:8])
    pixels = np.asarray(with_nearest(copies, dataset).convert("L"), dtype=int)
    samples, nearest = np.split(pixels, 2)  # the same but for the titles
    row = samples.shape[0] - 64
    assert (samples[row:] == nearest[row:]).all() and samples[row:].std() > 0


def test_the_sequence_writes_what_the_steps_write(points, exported, tmp_path):
    write_model_artifacts(*points, None, tmp_path, print)
    assert names(tmp_path) == EXPORTED | POINT_PICTURES | {"model_card.md"}
    for name in EXPORTED:
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes(), name


def test_metrics_on_the_test_split_are_finite_and_the_same_again(points):
    metrics, again = (metrics_on_test_split(*points, None) for _ in range(2))
    assert metrics == again
    assert {"test/elbo_window", "test/sample_distance", "test/sample_num_samples"} <= set(metrics)
    assert all(name.startswith("test/") for name in metrics)
    assert metrics["test/sample_num_samples"] == 2 * SMALL["metrics.num_samples"]


PROVENANCE = {
    "git_revision": "c82f3f7",
    "git_clean": False,
    "command": "workflows/tune.py --data heart",
    "packages": {"python": "3.12.1", "ray-ddpm": "0.1.0", "onnx": None},
    "hardware": {"cpu": "Xeon", "cores": 4, "memory_gb": 16.5, "gpus": ["NVIDIA H100", "NVIDIA H100"]},
    "metrics": {"test/sample_distance": 0.125},
    "trial_id": "t1",
}


def card(model, tmp_path, **changes):
    write_model_card(dataclasses.replace(model, provenance=PROVENANCE | changes), tmp_path)
    assert names(tmp_path) == {"model_card.md"}
    return (tmp_path / "model_card.md").read_text()


def test_the_model_card_has_metrics_parameters_and_provenance(points, tmp_path):
    text = card(points[0], tmp_path)
    assert "trial `t1`" in text and "| `test/sample_distance` | 0.125 |" in text
    assert "| `network.hidden_size` | 8 |" in text and points[1].spec.fingerprint in text
    blocks = [block.removeprefix("python\n") for block in text.split("```")[1::2] if block[:6] == "python"]
    assert len(blocks) == 2 and all(compile(block, MODEL_CARD, "exec") for block in blocks)
    assert "float32 [64, 2]" in blocks[0] and "mlflow.pyfunc" not in card(points[0], tmp_path, trial_id=None)
    section = text.split("## Provenance\n")[1].split("## Parameters")[0]
    assert "workflows/tune.py --data heart" in section
    assert "git revision `c82f3f7`, with uncommitted changes" in section
    assert "packages: python 3.12.1, ray-ddpm 0.1.0\n" in section
    assert "Xeon, 4 cores, 16.5 GB of memory; NVIDIA H100, NVIDIA H100" in section


def test_the_model_card_says_what_is_not_known(points, tmp_path):
    hardware = {"cpu": "Xeon", "cores": 4, "memory_gb": None, "gpus": []}
    text = card(points[0], tmp_path, git_revision=None, git_clean=None, hardware=hardware)
    assert "not in a git repository\n" in text and "Xeon, 4 cores; no NVIDIA GPU\n" in text
    assert "uncommitted" not in card(points[0], tmp_path, git_clean=True)
    write_model_card(points[0], tmp_path)
    assert "Not recorded" in (tmp_path / "model_card.md").read_text()


@pytest.mark.long
def test_the_second_model_of_a_cascade_is_published_with_samples_for_held_out_images(tmp_path):
    config = DataConfig(name="digits", super_resolution="4:8")
    values = {"network.base_channels": 8, "network.channel_multipliers": (1,)}
    config = source_preset(open_source(config)).with_values({**SMALL, **values})
    dataset = load_dataset(config.data)
    network = build_network(config, dataset.spec.shape).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    model = TrainedModel(config, dataset.spec, network)
    write_model_artifacts(model, dataset, None, tmp_path, lambda line: None)
    assert json.loads((tmp_path / "parity.json").read_text())["passed"]
    by_torch, by_onnx = (
        np.asarray(Image.open(tmp_path / name), dtype=float) for name in ("samples.png", "samples_onnx.png")
    )
    # Processors differ by a level or two of 255; of other images, whole strokes would be elsewhere.
    assert np.abs(by_torch - by_onnx).max() <= 4.0, "for the same images"
    card = (tmp_path / "model_card.md").read_text()
    assert "reduced to 4x4 pixels" in card and "--then sampler.onnx" in card
    assert "export.sampler sampler.onnx" not in card
