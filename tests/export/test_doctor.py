import ctypes
import importlib.metadata

import onnxruntime
import pytest
import torch

from export import doctor
from export.doctor import doctors_report
from export.sampler import main

HAS_CUDA = torch.cuda.is_available()


def test_it_says_what_was_looked_at_and_what_a_session_got():
    lines, healthy = doctors_report()
    text = "\n".join(lines)
    assert healthy
    assert f"ONNX Runtime {onnxruntime.__version__}" in text
    for what in ("build", "packages", "driver", "CUDA runtime", "cuDNN", "a session"):
        assert any(line.startswith(what) for line in lines), what
    assert "runs on C" in text


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_cuda_that_cannot_be_had_is_said_with_its_remedy(capsys):
    lines, healthy = doctors_report("cuda")
    assert not healthy
    assert any(line.startswith("for CUDA: ") for line in lines)
    assert main(["--doctor", "--provider", "cuda"]) == 1
    assert "for CUDA: install an NVIDIA driver" in capsys.readouterr().out
    assert main(["--doctor"]) == 0
    assert main(["--doctor", "--provider", "cpu"]) == 0


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_a_gpu_is_named():
    lines, healthy = doctors_report("cuda")
    assert healthy
    assert torch.cuda.get_device_name(0) in "\n".join(lines)


class Driver:
    """A CUDA driver as ctypes sees it."""

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


def load(driver, missing=()):
    def of(name, *_):
        if name == doctor._DRIVER:
            if driver is None:
                raise OSError(name)
            return driver
        if name in missing:
            raise OSError(name)
        return object()

    return of


@pytest.mark.parametrize(
    ("driver", "missing", "said", "remedy"),
    [
        (None, (), "none (libcuda.so.1", "install an NVIDIA driver for CUDA 13"),
        (Driver(12080, ["A100"]), (), "for CUDA 12.8", "install an NVIDIA driver for CUDA 13"),
        (Driver(13000, []), (), "for CUDA 13.0", "give this process a GPU"),
        (Driver(13000, ["H200"], code=999), (), "cuInit gave 999", "nvidia-smi"),
        (Driver(13000, ["H200"]), ("libcudnn.so.9",), "libcudnn.so.9 is not there", "ray-ddpm[gpu]"),
        (Driver(13000, ["H200"]), ("libcudart.so.13",), "libcudart.so.13 is not there", "ray-ddpm[gpu]"),
    ],
    ids=["no driver", "old driver", "no GPU", "broken driver", "no cuDNN", "no CUDA runtime"],
)
def test_what_stands_in_the_way_is_named_with_its_remedy(monkeypatch, driver, missing, said, remedy):
    monkeypatch.setattr(doctor, "_preload_quietly", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", load(driver, missing))
        patch.setattr(doctor, "open_session", lambda *_: (None, "CPU, since"))
        lines, _ = doctors_report()
    text = "\n".join(lines)
    assert said in text
    assert any(line.startswith("for CUDA: ") and remedy in line for line in lines), text


def test_two_packages_that_share_a_folder_are_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.31.1")
    assert any("the two share a folder" in line for line in doctors_report()[0])


def test_a_working_gpu_needs_no_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "_preload_quietly", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", load(Driver(13010, ["H200", "H200"])))
        patch.setattr(doctor, "open_session", lambda *_: (None, "CUDA"))
        lines, healthy = doctors_report("cuda")
    assert healthy
    assert lines[-1] == "Samples are drawn on the GPU."
    assert any("H200, H200" in line for line in lines)
    assert not any(line.startswith("for CUDA") for line in lines)
