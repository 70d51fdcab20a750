"""A simulated device that, like mps, has no float64, and refuses operands on several devices."""

import importlib
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from diffusion import devices
from diffusion.seeding import noise_generator
from diffusion.training import random_draws

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


@contextmanager
def simulated_device(monkeypatch):
    """The simulated device, on which a training can run."""
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", {DEVICE.type})
    monkeypatch.setattr(random_draws, "noise_generator", generator)
    optimizers = importlib.import_module("torch.optim.optimizer")  # not an attribute of torch.optim
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", DEVICE.type])
    with Device():
        yield DEVICE
