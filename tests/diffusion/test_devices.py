"""The choice of the device, and a training on a simulated device that, like mps, has no float64."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from diffusion import devices
from diffusion.config import DataConfig, TrainingConfig
from diffusion.data.dataset import load_dataset
from diffusion.devices import default_device, to_float64, widest_float
from diffusion.errors import InputError
from diffusion.evaluation.features import fit_features
from diffusion.seeding import noise_generator
from diffusion.training import random_draws
from diffusion.training.loop import Training
from diffusion.training.timestep_sampling import LossSecondMoment, stratified_timesteps
from diffusion.training.train_step import check_precision

# A device type that every build of torch knows. Its own tensors have no values; those of `OnDevice` do.
DEVICE = torch.device("meta")


class OnDevice(torch.Tensor):
    """A tensor that says that it is on `DEVICE`, with its values on the CPU."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.size(), values.stride(), values.storage_offset(), dtype=values.dtype, device=DEVICE
        )

    def __init__(self, values):
        self.values_ = values

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return compute(function, arguments, options or {})


class Device(TorchDispatchMode):
    """While it is active, tensors can be created on `DEVICE` or moved there."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return compute(function, arguments, options or {})


MAY_MIX = {"_to_copy", "copy_", "index", "index_put_"}  # as in torch, where an index may be on the CPU


def compute(function, arguments, options):
    """Compute on the CPU, and refuse what mps refuses: float64, and operands on several devices."""
    name = function.overloadpacket.__name__
    tensors = [each for each in tree_flatten((arguments, options))[0] if isinstance(each, torch.Tensor)]
    here = any(isinstance(each, OnDevice) for each in tensors)
    if "device" in options and options["device"] is not None:
        target = torch.device(options["device"]) == DEVICE
    else:
        target = here
    if here and name not in MAY_MIX:
        mixed = [each for each in tensors if not isinstance(each, OnDevice) and each.dim()]
        assert not mixed, f"{name}: tensors on the CPU and on the device"

    def unwrap(value):
        return value.values_ if isinstance(value, OnDevice) else value

    def wrap(value):
        if not target or not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.float64:
            raise TypeError(f"{name}: the device has no float64")
        return OnDevice(value)

    inner = {key: torch.device("cpu") if key == "device" else unwrap(value) for key, value in options.items()}
    result = function(*tree_map(unwrap, arguments), **tree_map(unwrap, inner))
    return return_and_correct_aliasing(function, arguments, options, tree_map(wrap, result))


class Generator(torch.Generator):
    """A generator on the CPU that says that it is on `DEVICE`."""

    device = DEVICE


def generator(seed, update, device):
    """The CPU's generator of an update, for any device."""
    on_cpu = noise_generator(seed, update, torch.device("cpu"))
    return Generator().set_state(on_cpu.get_state()) if device == DEVICE else on_cpu


@pytest.fixture
def device(monkeypatch):
    """The simulated device, on which a training can run."""
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", {DEVICE.type})
    monkeypatch.setattr(random_draws, "noise_generator", generator)
    optimizers = importlib.import_module("torch.optim.optimizer")  # not an attribute of torch.optim
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", DEVICE.type])
    with Device():
        yield DEVICE


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
