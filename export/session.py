"""An ONNX Runtime session on the processor that was asked for."""

import ctypes
import os
from typing import Literal

import onnxruntime

from diffusion.errors import InputError

Provider = Literal["auto", "cpu", "cuda"]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_NO_FOLDER = os.path.join(os.devnull, "none")


def open_session(model: bytes, provider: Provider) -> tuple[onnxruntime.InferenceSession, str]:
    """Open a model, on CUDA where that was asked for or can be had.

    Args:
        model: the ONNX file's bytes; a model that refers to other files is refused.
        provider: "cuda" insists; "auto" takes CUDA where it works and the CPU elsewhere.

    Returns:
        The session, and in words what it runs on and why.

    Raises:
        InputError: the bytes are no ONNX model, or CUDA was insisted on and cannot be had.
    """
    if provider == "cpu":
        return _session(model, [_CPU]), "CPU"
    reason = _why_no_cuda()
    if reason is None:
        session = _session(model, [_CUDA, _CPU])
        if session.get_providers()[0] == _CUDA:
            return session, "CUDA"
        reason = "ONNX Runtime could not load its CUDA libraries (CUDA 13 and cuDNN 9)"
    if provider == "cuda":
        raise InputError(f"provider cuda: {reason}; use provider auto or cpu, or install ray-ddpm[gpu]")
    return _session(model, [_CPU]), f"CPU, since {reason}"


def _why_no_cuda() -> str | None:
    """Ask the driver first: ONNX Runtime names CUDA as available whether or not there is a GPU."""
    if _CUDA not in onnxruntime.get_available_providers():
        return "this build of ONNX Runtime has no CUDA"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no GPU"
    onnxruntime.preload_dlls()
    return None


def _session(model: bytes, providers: list[str]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised, or said by open_session
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without a folder of its own a model in memory may read files from the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NO_FOLDER)
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code
        first_line = str(error).splitlines()[0][:160]
        raise InputError(f"ONNX Runtime cannot read the model: {first_line}") from error
