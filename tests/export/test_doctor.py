import ctypes
import importlib.metadata

import onnxruntime
import pytest
import torch

from export import doctor
from export.doctor import doctor_report
from export.sampler import main
from export.session import DRIVER_LIBRARY

HAS_CUDA = torch.cuda.is_available()


def test_the_report_lists_every_check_and_opens_a_session():
    lines, works = doctor_report()
    text = "\n".join(lines)
    assert works
    assert f"ONNX Runtime {onnxruntime.__version__}" in text
    for subject in ("build", "packages", "driver", "CUDA runtime", "cuDNN", "session"):
        assert any(line.startswith(subject) for line in lines), subject
    assert "runs on C" in text


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_unavailable_cuda_is_reported_with_its_remedy(capsys):
    lines, works = doctor_report("cuda")
    assert not works
    assert any(line.startswith("to use CUDA: ") for line in lines)
    assert main(["--doctor", "--provider", "cuda"]) == 1
    assert "to use CUDA: install an NVIDIA driver" in capsys.readouterr().out
    assert main(["--doctor"]) == 0
    assert main(["--doctor", "--provider", "cpu"]) == 0


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_a_gpu_is_named():
    lines, works = doctor_report("cuda")
    assert works
    assert torch.cuda.get_device_name(0) in "\n".join(lines)


class FakeDriver:
    """A CUDA driver with the interface that ctypes gives it."""

    def __init__(self, version, names, code=0):
        self.version, self.names, self.code = version, names, code

    def cuInit(self, _flags):
        return self.code

    def cuDriverGetVersion(self, version):
        version._obj.value = self.version

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.names)

    def cuDeviceGetName(self, buffer, _size, index):
        buffer.value = self.names[index].encode()


def fake_loader(driver, missing=()):
    """A replacement for ctypes.CDLL that loads `driver` and every library that is not missing."""

    def load(name, *_):
        if name == DRIVER_LIBRARY:
            if driver is None:
                raise OSError(name)
            return driver
        if name in missing:
            raise OSError(name)
        return object()

    return load


@pytest.mark.parametrize(
    ("driver", "missing", "status", "remedy"),
    [
        (None, (), "libcuda.so.1 not found", "install an NVIDIA driver for CUDA 13"),
        (FakeDriver(12080, ["A100"]), (), "supports CUDA 12.8", "install an NVIDIA driver for CUDA 13"),
        (FakeDriver(13000, []), (), "supports CUDA 13.0", "make a GPU visible to this process"),
        (FakeDriver(13000, ["H200"], code=999), (), "cuInit returned 999", "nvidia-smi"),
        (FakeDriver(13000, ["H200"]), ("libcudnn.so.9",), "libcudnn.so.9 not found", "ray-ddpm[gpu]"),
        (FakeDriver(13000, ["H200"]), ("libcudart.so.13",), "libcudart.so.13 not found", "ray-ddpm[gpu]"),
    ],
    ids=["no driver", "old driver", "no GPU", "broken driver", "no cuDNN", "no CUDA runtime"],
)
def test_an_obstacle_to_cuda_is_reported_with_its_remedy(monkeypatch, driver, missing, status, remedy):
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", fake_loader(driver, missing))
        patch.setattr(doctor, "open_session", lambda *_: (None, "CPU, since"))
        lines, _ = doctor_report()
    text = "\n".join(lines)
    assert status in text
    assert any(line.startswith("to use CUDA: ") and remedy in line for line in lines), text


def test_two_packages_that_overwrite_each_other_are_reported(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.31.1")
    assert any("overwrite each other" in line for line in doctor_report()[0])


def test_a_working_gpu_needs_no_remedy(monkeypatch):
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", fake_loader(FakeDriver(13010, ["H200", "H200"])))
        patch.setattr(doctor, "open_session", lambda *_: (None, "CUDA"))
        lines, works = doctor_report("cuda")
    assert works
    assert lines[-1] == "Samples are drawn on the GPU."
    assert any("H200, H200" in line for line in lines)
    assert not any(line.startswith("to use CUDA") for line in lines)
