"""An ONNX Runtime session on the processor that was asked for."""

import ctypes
import os
from typing import Any, Literal

import onnxruntime

from diffusion.errors import InputError

Provider = Literal["auto", "cpu", "cuda"]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_NO_FOLDER = os.path.join(os.devnull, "none")
# Matrix products so small are done before a second thread has woken.
_BYTES_OF_TINY_MODEL = 1_000_000
_FEWEST_BYTES_TO_FOLD = 2**26


def open_session(
    model: bytes, provider: Provider, threads: int | None = None
) -> tuple[onnxruntime.InferenceSession, str]:
    """Open a model, on CUDA where that was asked for or can be had.

    Args:
        model: the ONNX file's bytes; a model that refers to other files is refused.
        provider: "cuda" insists; "auto" takes CUDA where it works and the CPU elsewhere.
        threads: of the processor; None is one for a tiny model and one a core for others.

    Returns:
        The session, and in words what it runs on and why.

    Raises:
        InputError: the bytes are no ONNX model, or CUDA was insisted on and cannot be had.
    """
    if provider == "cpu":
        return _session(model, [_CPU], threads), "CPU"
    reason = _why_no_cuda()
    if reason is None:
        reason = "ONNX Runtime could not load its CUDA libraries (CUDA 13 and cuDNN 9)"
        try:
            session = _session(model, [_CUDA, _CPU], threads)
            if session.get_providers()[0] == _CUDA:
                return session, "CUDA"
        except InputError as error:  # which a bad file is on the processor as well
            reason = str(error)
    if provider == "cuda":
        raise InputError(
            f"provider cuda: {reason}; use provider auto or cpu, or install ray-ddpm[gpu] "
            "(python -m export.sampler --doctor says more)"
        )
    return _session(model, [_CPU], threads), f"CPU, since {reason}"


def open_static_session(model: bytes, batch: int, device: str) -> onnxruntime.InferenceSession:
    """Open a model for one batch size; on "cuda" its launches are captured as one CUDA graph.

    Args:
        model: as for `open_session`.
        batch: what the dimension of that name becomes.
        device: "cuda" or "cpu".

    Raises:
        InputError: it cannot be opened.
    """
    cuda = [(_CUDA, {"enable_cuda_graph": "1"}), _CPU]
    return _session(model, cuda if device == "cuda" else [_CPU], None, batch)


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


def _session(
    model: bytes, providers: list[Any], threads: int | None, batch: int | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised, or said by open_session
    if threads is None:
        options.intra_op_num_threads = 1 if len(model) < _BYTES_OF_TINY_MODEL else 0
    else:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without a folder of its own a model in memory may read files from the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NO_FOLDER)
    # Opening a small file must not fill the memory; 16-bit weights become twice as large.
    most = max(_FEWEST_BYTES_TO_FOLD, 2 * len(model))
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(most))
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    try:
        # It would print that it fell back to another provider, and try again.
        return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code
        first_line = (str(error).splitlines() or [""])[0][:160]
        raise InputError(f"ONNX Runtime cannot read the model: {first_line}") from error
