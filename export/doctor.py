"""Says in plain words what ONNX Runtime can run on this machine, and how to mend what it cannot."""

import contextlib
import ctypes
import importlib.metadata
import io
import os
import platform
from dataclasses import dataclass

import onnxruntime
from onnxruntime.capi import build_and_package_info

from diffusion.errors import InputError
from export.device_loop import step_file
from export.session import Provider, open_session

_CUDA_MAJOR = 13
_WINDOWS = hasattr(ctypes, "WinDLL")
_DRIVER = "nvcuda.dll" if _WINDOWS else "libcuda.so.1"
_LIBRARIES = {
    "CUDA runtime": ("cudart64_13.dll", "libcudart.so.13"),
    "cuBLAS": ("cublas64_13.dll", "libcublas.so.13"),
    "cuDNN": ("cudnn64_9.dll", "libcudnn.so.9"),
}
_INSTALL = 'pip install "ray-ddpm[gpu]"'


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, and the remedy where it stands in the way of CUDA."""

    what: str
    found: str
    remedy: str | None = None


def doctors_report(provider: Provider = "auto") -> tuple[list[str], bool]:
    """What this machine can run, line by line.

    Args:
        provider: "cuda" where nothing less will do.

    Returns:
        The lines, and whether samples can be drawn by that provider.
    """
    findings = [_build(), _packages(), *_driver(), *_libraries()]
    lines = [f"{each.what:<14}{each.found}" for each in findings]
    try:
        _, runs_on = open_session(step_file(guided=False).read_bytes(), provider)
        lines.append(f"{'a session':<14}runs on {runs_on}")
        healthy = True
    except InputError as error:
        lines.append(f"{'a session':<14}{error}")
        runs_on, healthy = "", False
    remedies = [each.remedy for each in findings if each.remedy]
    if runs_on == "CUDA":
        lines.append("Samples are drawn on the GPU.")
    elif provider == "cpu":
        lines.append("Samples are drawn on the processor, as asked.")
    else:
        lines.append(
            "Samples are drawn on the processor." if healthy else "There is no session to draw with."
        )
        lines += [f"for CUDA: {remedy}" for remedy in dict.fromkeys(remedies)]
    return lines, healthy


def _build() -> Finding:
    version = f"ONNX Runtime {onnxruntime.__version__}, Python {platform.python_version()}"
    cuda = getattr(build_and_package_info, "cuda_version", None)
    if not cuda:
        return Finding("build", f"{version}, without CUDA", f"{_INSTALL} (Linux or Windows on x86-64)")
    return Finding("build", f"{version}, built for CUDA {cuda}")


def _packages() -> Finding:
    """Both packages in one environment overwrite each other's files."""
    there = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            there.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    remedy = None
    if len(there) > 1:
        remedy = f"pip uninstall onnxruntime onnxruntime-gpu, then {_INSTALL}: the two share a folder"
    return Finding("packages", ", ".join(there) or "none that pip knows", remedy)


def _driver() -> list[Finding]:
    newer = f"install an NVIDIA driver for CUDA {_CUDA_MAJOR} or newer"
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return [
            Finding("driver", f"none ({_DRIVER} is not there)", f"{newer}; in a container, pass the GPU in")
        ]
    code = driver.cuInit(0)
    if code != 0:
        return [Finding("driver", f"does not start (cuInit gave {code})", "see what nvidia-smi says")]
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    major, minor = version.value // 1000, version.value % 1000 // 10
    found = [Finding("driver", f"for CUDA {major}.{minor}", newer if major < _CUDA_MAJOR else None)]
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(100)
        driver.cuDeviceGetName(name, 100, index)
        names.append(name.value.decode(errors="replace"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "give this process a GPU" + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})")
    found.append(Finding("GPUs", ", ".join(names) or "none", None if names else hint))
    return found


def _libraries() -> list[Finding]:
    if getattr(build_and_package_info, "cuda_version", None):
        _preload_quietly()
    found = []
    for what, names in _LIBRARIES.items():
        file = names[0] if _WINDOWS else names[1]
        try:
            ctypes.CDLL(file)
            found.append(Finding(what, f"{file} loads"))
        except OSError:
            found.append(Finding(what, f"{file} is not there", _INSTALL))
    return found


def _preload_quietly() -> None:
    """It prints what it did not find, which is said here in other words."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        onnxruntime.preload_dlls()
