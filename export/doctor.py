"""Reports what ONNX Runtime can run on this machine, and how to fix what prevents it from using CUDA."""

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
from export.gpu_loop import noise_file
from export.session import DRIVER_LIBRARY, Provider, open_session

_CUDA_MAJOR = 13
# Library -> file name on Windows, file name on Linux.
_LIBRARIES = {
    "CUDA runtime": ("cudart64_13.dll", "libcudart.so.13"),
    "cuBLAS": ("cublas64_13.dll", "libcublas.so.13"),
    "cuDNN": ("cudnn64_9.dll", "libcudnn.so.9"),
}
_INSTALL = 'pip install "ray-ddpm[gpu]"'


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        subject: what was checked.
        status: what was found.
        remedy: how to fix it, or None if it does not prevent the use of CUDA.
    """

    subject: str
    status: str
    remedy: str | None = None


def doctor_report(provider: Provider = "auto") -> tuple[list[str], bool]:
    """Check what this machine can run.

    Args:
        provider: the provider that samples shall be drawn with.

    Returns:
        The lines of the report, and whether that provider works.
    """
    findings = [_build(), _packages(), *_driver(), *_libraries()]
    lines = [_line(finding.subject, finding.status) for finding in findings]
    try:
        _, runs_on = open_session(noise_file().read_bytes(), provider)
        lines.append(_line("session", f"runs on {runs_on}"))
        works = True
    except InputError as error:
        lines.append(_line("session", str(error)))
        runs_on, works = "", False
    if runs_on == "CUDA":
        lines.append("Samples are drawn on the GPU.")
    elif provider == "cpu":
        lines.append("Samples are drawn on the CPU, as requested.")
    else:
        lines.append("Samples are drawn on the CPU." if works else "No samples can be drawn.")
        remedies = [finding.remedy for finding in findings if finding.remedy]
        lines += [f"to use CUDA: {remedy}" for remedy in dict.fromkeys(remedies)]
    return lines, works


def _line(subject: str, status: str) -> str:
    return f"{subject:<14}{status}"


def _build() -> Finding:
    version = f"ONNX Runtime {onnxruntime.__version__} on Python {platform.python_version()}"
    cuda = getattr(build_and_package_info, "cuda_version", None)
    if not cuda:
        return Finding("build", f"{version}, without CUDA", f"{_INSTALL} (Linux or Windows on x86-64)")
    return Finding("build", f"{version}, built for CUDA {cuda}")


def _packages() -> Finding:
    """Look for both packages of ONNX Runtime: in one environment they overwrite each other's files."""
    installed = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    remedy = None
    if len(installed) > 1:
        remedy = (
            "the two packages overwrite each other's files: "
            f"pip uninstall onnxruntime onnxruntime-gpu, then {_INSTALL}"
        )
    return Finding("packages", ", ".join(installed) or "not installed with pip", remedy)


def _driver() -> list[Finding]:
    install = f"install an NVIDIA driver for CUDA {_CUDA_MAJOR} or newer"
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        remedy = f"{install}; in a container, give it access to the GPU"
        return [Finding("driver", f"{DRIVER_LIBRARY} not found", remedy)]
    code = driver.cuInit(0)
    if code != 0:
        return [
            Finding("driver", f"does not start (cuInit returned {code})", "check the output of nvidia-smi")
        ]
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    major, minor = version.value // 1000, version.value % 1000 // 10
    findings = [Finding("driver", f"supports CUDA {major}.{minor}", install if major < _CUDA_MAJOR else None)]
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(100)
        driver.cuDeviceGetName(name, 100, index)
        names.append(name.value.decode(errors="replace"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    remedy = "make a GPU visible to this process"
    if visible is not None:
        remedy += f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    findings.append(Finding("GPUs", ", ".join(names) or "none", None if names else remedy))
    return findings


def _libraries() -> list[Finding]:
    if getattr(build_and_package_info, "cuda_version", None):
        _preload_quietly()
    findings = []
    for library, (windows_file, linux_file) in _LIBRARIES.items():
        file = windows_file if hasattr(ctypes, "WinDLL") else linux_file
        try:
            ctypes.CDLL(file)
            findings.append(Finding(library, f"{file} loads"))
        except OSError:
            findings.append(Finding(library, f"{file} not found", _INSTALL))
    return findings


def _preload_quietly() -> None:
    """Load the CUDA libraries that pip installed; what is missing is reported by `_libraries`."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        onnxruntime.preload_dlls()
