"""The choice of the device, and a training on a simulated device that, like mps, has no float64."""

import pytest
import torch

from diffusion.config import DataConfig, TrainingConfig
from diffusion.data.dataset import load_dataset
from diffusion.devices import default_device, to_float64, widest_float
from diffusion.errors import InputError
from diffusion.evaluation.features import fit_features
from diffusion.training.loop import Training
from diffusion.training.timestep_sampling import LossSecondMoment, stratified_timesteps
from diffusion.training.train_step import check_precision
from tests.simulated_device import generator


def metrics(config, dataset, features=None):
    """Metrics of the last evaluation of a training on the device of the data."""
    results = []
    Training(config, dataset, results.append, features=features).run()
    return results[-1].metrics


def test_a_training_without_float64_is_that_of_the_cpu(small_config, gaussian_dataset, device):
    config = small_config(training={"num_updates": 6, "num_evaluations": 1})
    dataset = gaussian_dataset(num_train=64, num_val=16)
    on_device, on_cpu = metrics(config, dataset.to(device)), metrics(config, dataset)
    assert on_device == pytest.approx(on_cpu, rel=1e-3, abs=1e-5, nan_ok=True)


def test_so_is_one_of_labelled_images(small_config, device):
    config = small_config(training={"num_updates": 2, "num_evaluations": 1})
    dataset = load_dataset(DataConfig(name="digits", conditional=True))
    features = fit_features(dataset, "random")
    on_device = metrics(config, dataset.to(device), features.to(device))
    assert on_device == pytest.approx(metrics(config, dataset, features), rel=1e-3, abs=0.01, nan_ok=True)


@pytest.mark.parametrize("method", ["stratified", "importance"])
def test_timesteps_drawn_in_float32_are_as_even(device, method):
    """One in each stratum; in proportion to the losses."""
    if method == "stratified":
        timesteps = stratified_timesteps(100, 50, generator(0, 0, device)).cpu()
        assert (timesteps.sort().values // 2).tolist() == list(range(50))
        return
    moment = LossSecondMoment(2)
    for _ in range(10):
        moment.observe(torch.tensor([0, 1]).to(device), torch.tensor([1.0, 3.0]).to(device))
    timesteps, weights = (each.cpu() for each in moment.draw(10_000, generator(0, 0, device)))
    assert timesteps.double().mean().item() == pytest.approx(0.75, abs=0.02)
    assert weights[timesteps == 1].tolist() == pytest.approx(
        [1 / (2 * 0.75)] * int(timesteps.sum()), rel=1e-3
    )


@pytest.mark.parametrize(
    ("cuda", "mps", "options", "expected"),
    [
        (True, True, {}, "cuda"),
        (True, False, {"num_workers": 4}, "cuda"),
        (True, False, {"use_cuda": False}, "cpu"),
        (False, True, {}, "mps"),
        (False, True, {"use_cuda": False}, "mps"),
        (False, True, {"num_workers": 2}, "cpu"),  # gloo
        (False, False, {}, "cpu"),
    ],
)
def test_the_fastest_device_that_a_worker_can_use(monkeypatch, cuda, mps, options, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert default_device(**options) == torch.device(expected)


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", torch.float64), ("mps", torch.float32)])
def test_mps_has_no_float64(kind, dtype):
    assert widest_float(torch.device(kind)) == dtype


def test_half_precision_on_mps(monkeypatch):
    mps = torch.device("mps")
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (14, 0)
    )
    check_precision(TrainingConfig(precision="bf16"), mps)
    with pytest.raises(InputError, match="fp16: only GPUs of NVIDIA support it"):
        check_precision(TrainingConfig(precision="fp16"), mps)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    with pytest.raises(InputError, match="bf16: needs macOS 14 or newer"):
        check_precision(TrainingConfig(precision="bf16"), mps)


def test_the_simulated_device_has_no_float64_and_does_not_mix(device):
    x = torch.ones(3).to(device)
    assert x.device == device and to_float64(x).device.type == "cpu"
    with pytest.raises(TypeError, match="no float64"):
        x.double()
    with pytest.raises(AssertionError, match="tensors on the CPU and on the device"):
        x + torch.ones(3)
