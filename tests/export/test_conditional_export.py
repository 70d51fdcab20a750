"""A conditional model through the ONNX file: labels, the null label, guidance."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.config import Config, NetworkConfig, SamplerConfig, ScheduleConfig
from diffusion.errors import InputError
from diffusion.networks.build import build_network
from diffusion.process.generate import Condition, sample_states
from diffusion.training.checkpoints import TrainedModel
from export.gpu_loop import DeviceLoopCache, with_step
from export.labels import network_labels
from export.limits import RequestGuard
from export.noise import normal_noise
from export.output import save_samples
from export.sampler import Sampler, main
from export.session import open_session
from export.to_onnx import export_onnx
from tests.diffusion.conftest import make_gaussian_dataset
from tests.export.test_torch_sampler import assert_states_are_those_of_production

CLASSES = ("cat", "dog", "eel")


@pytest.fixture(scope="module", params=["points", "image"])
def model(request):
    """An MLP for points and a U-Net for images, each with three classes and no weights that are zero."""
    spec = replace(make_gaussian_dataset().spec, classes=CLASSES)
    network = NetworkConfig(hidden_size=16, num_blocks=1, time_embedding_size=8, data_embedding_size=4)
    if request.param == "image":
        spec = replace(
            spec,
            kind="image",
            shape=(1, 8, 8),
            mean=[[[100.0]]],
            std=[[[50.0]]],
            range=(0.0, 255.0),
            columns=None,
        )
        network = NetworkConfig(
            kind="unet", base_channels=8, channel_multipliers=(1, 2), time_embedding_size=8
        )
    config = Config(
        schedule=ScheduleConfig(num_train_timesteps=12, beta_start=0.02, beta_end=0.4),
        network=network,
        sampler=SamplerConfig(name="ddim", num_steps=5, guidance_scale=2.0),
    )
    torch.manual_seed(0)
    built_network = build_network(config, spec.shape, spec.num_classes).eval().requires_grad_(False)
    for weight in built_network.parameters():
        weight.add_(0.1 * torch.randn(weight.shape))
    return TrainedModel(config, spec, built_network)


@pytest.fixture(scope="module")
def exported(model):
    return export_onnx(model)


@pytest.fixture(scope="module")
def sampler(exported):
    return Sampler(exported[0], provider="cpu")


def test_parity_is_checked_with_and_without_guidance(exported):
    names = {case.name for case in exported[1]}
    assert {"one step, batch 7, guidance 1", "one step, batch 7, guidance 2"} <= names
    assert {"deployed sampler, guidance 1", "deployed sampler, guidance 2"} <= names
    assert len([name for name in names if name.startswith("ddpm") and "guidance 2" in name]) == 2
    assert all(case.passed for case in exported[1])


def test_the_file_contains_classes_and_guidance_scale(sampler):
    assert sampler.spec.classes == list(CLASSES)
    assert sampler.spec.sampler["guidance_scale"] == 2.0


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_the_reference_of_parity_is_guided_as_in_production(model, scale):
    assert_states_are_those_of_production(model, scale)


@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 4.5])
def test_pytorch_and_onnx_runtime_draw_the_same_samples(model, sampler, scale):
    labels = np.array([2, 0, 1, 1, 0])

    def noise(row):
        return torch.from_numpy(normal_noise(5, np.arange(5), row + 1, model.data.shape))

    condition = Condition(torch.from_numpy(labels), 3, 2.0 if scale is None else scale)
    *_, (x, _) = sample_states(model.network, model.table, noise(-1), noise, condition)
    expected = model.data.denormalise(x.numpy())
    drawn = sampler.sample(5, seed=5, labels=labels.tolist(), guidance_scale=scale, batch_size=2)
    np.testing.assert_allclose(drawn, expected, atol=1e-4 * np.abs(expected).max())


def test_labels_change_samples_unless_guidance_is_zero(sampler):
    cats, dogs = (sampler.sample(4, labels=name, guidance_scale=3.0) for name in ("cat", "dog"))
    assert not np.allclose(cats, dogs)
    none = [sampler.sample(4, labels=name, guidance_scale=0.0) for name in ("cat", "dog")]
    np.testing.assert_allclose(*none, rtol=1e-6, atol=1e-6)


def test_labels_cycle_through_the_classes_by_default(sampler):
    labels = [CLASSES[index % 3] for index in range(7)]
    np.testing.assert_array_equal(sampler.sample(7), sampler.sample(7, labels=labels))


def test_the_command_line_takes_a_label(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sampler.onnx").write_bytes(exported[0])
    assert main(["sampler.onnx", "--label", "eel", "--guidance-scale", "1.5", "--output", "eels.npy"]) == 0
    eels = np.load(tmp_path / "eels.npy")
    expected = Sampler(exported[0], provider="cpu").sample(64, labels=2, guidance_scale=1.5)
    np.testing.assert_array_equal(eels, expected)
    for arguments, words in (("--label cow", "cat, dog, eel"), ("--guidance-scale -1", "give 0 to 100")):
        assert main(["sampler.onnx", *arguments.split()]) == 2
        assert words in capsys.readouterr().err


def test_a_picture_of_all_classes_is_written(sampler, tmp_path):
    save_samples(sampler.sample(6), sampler.spec, tmp_path / "turn.png")
    assert (tmp_path / "turn.png").stat().st_size > 0


def test_an_unconditional_file_takes_no_guidance(point_sampler, image_sampler):
    for sampler in (point_sampler, image_sampler):
        assert sampler.spec.classes == []
        with pytest.raises(InputError, match="has no classes"):
            sampler.sample(2, guidance_scale=3.0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_loop_on_a_device_draws_the_same(exported, sampler, scale):
    """On the CPU here. Both halves of a guided batch are combined in the step's graph."""
    spec, guided = sampler.spec, scale != 1.0
    content = with_step(exported[0], labelled=True)
    loops = DeviceLoopCache(content, open_session(content, "cpu")[0], spec.shape, labelled=True, device="cpu")
    labels = network_labels(np.arange(4) % len(CLASSES), len(CLASSES), guided=guided)

    def noise(row):
        return normal_noise(3, np.arange(4), row + 1, spec.shape)

    for _ in range(3):  # from the second time on, for a fixed batch size
        *_, last = loops.states(noise(-1), sampler.table(), noise, labels, scale, RequestGuard())
        actual = spec.denormalise(last.x())
    expected = sampler.sample(4, seed=3, guidance_scale=scale)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())


def test_cycling_labels_depend_on_the_sample_index(sampler):
    expected = sampler.sample(7, seed=1)
    actual = sampler.sample(3, seed=1, first_index=4)
    np.testing.assert_allclose(actual, expected[4:], rtol=0, atol=1e-5 * expected.std())
