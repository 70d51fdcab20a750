"""Opens ONNX Runtime sessions on the CPU or a GPU."""

import ctypes
import os
from typing import Any, Literal

import onnxruntime

from diffusion.errors import InputError

Provider = Literal["auto", "cpu", "cuda"]

DRIVER_LIBRARY = "nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1"

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_MISSING_FOLDER = os.path.join(os.devnull, "none")
# Matrix products of a smaller model are finished before a second thread wakes up, unlike convolutions.
_MIN_BYTES_FOR_THREADS = 1_000_000
# The operator as a node of an ONNX file names it: tag of the field op_type, length, name.
_CONVOLUTION = b'"\x04Conv'
_MIN_FOLDING_LIMIT = 2**26


def open_session(
    model: bytes, provider: Provider, threads: int | None = None
) -> tuple[onnxruntime.InferenceSession, str]:
    """Open a model for any batch size.

    Args:
        model: bytes of the ONNX file; a model that refers to other files is rejected.
        provider: "cpu"; "cuda", which fails if CUDA is not available; or "auto", which uses CUDA if it is
            available and the CPU otherwise.
        threads: number of CPU threads; None is one for a tiny model without convolutions, otherwise one per
            core.

    Returns:
        The session, and a description of what it runs on: "CPU" or "CUDA", followed by the reason if
        "auto" fell back to the CPU.

    Raises:
        InputError: the bytes are not an ONNX model, or provider "cuda" is not available.
    """
    if provider == "cpu":
        return _session(model, [_CPU], threads), "CPU"
    reason = cuda_unavailable_reason()
    if reason is None:
        reason = "ONNX Runtime could not load its CUDA libraries (CUDA 13 and cuDNN 9)"
        try:
            session = _session(model, [_CUDA, _CPU], threads)
            if session.get_providers()[0] == _CUDA:
                return session, "CUDA"
        except InputError as error:  # a corrupt file fails again below, on the CPU
            reason = str(error)
    if provider == "cuda":
        raise InputError(
            f"provider cuda: {reason}; use provider auto or cpu, or install ray-ddpm[gpu] "
            "(for details: python -m export.sampler --doctor)"
        )
    return _session(model, [_CPU], threads), f"CPU, since {reason}"


def open_static_session(model: bytes, batch_size: int, device: str) -> onnxruntime.InferenceSession:
    """Open a model for one batch size; on "cuda" its kernel launches are captured as one CUDA graph.

    Args:
        model: bytes of the ONNX file, as for `open_session`.
        batch_size: fixed size of the model's dimension "batch".
        device: "cuda" or "cpu".

    Raises:
        InputError: the model cannot be opened.
    """
    cuda = [(_CUDA, {"enable_cuda_graph": "1"}), _CPU]
    return _session(model, cuda if device == "cuda" else [_CPU], None, batch_size)


def has_convolutions(model: bytes) -> bool:
    """Whether an ONNX file has convolutions, by which threads and batches are chosen."""
    return _CONVOLUTION in model


def cuda_unavailable_reason() -> str | None:
    """Return why CUDA cannot be used, or None if a session may be tried.

    The driver is asked first, since ONNX Runtime lists CUDA as available even on machines without a GPU.
    """
    if _CUDA not in onnxruntime.get_available_providers():
        return "this build of ONNX Runtime has no CUDA"
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return "this machine has no NVIDIA driver"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no GPU"
    onnxruntime.preload_dlls()
    return None


def _session(
    model: bytes, providers: list[Any], threads: int | None, batch_size: int | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised or returned, not logged
    if threads is None:
        tiny = len(model) < _MIN_BYTES_FOR_THREADS and not has_convolutions(model)
        options.intra_op_num_threads = 1 if tiny else 0
    else:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Unless this is set, a model given as bytes may read files in the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _MISSING_FOLDER)
    # Constant folding must not let a small file fill the memory; 16-bit weights become twice as large.
    folding_limit = max(_MIN_FOLDING_LIMIT, 2 * len(model))
    options.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", str(folding_limit)
    )
    if batch_size is not None:
        options.add_free_dimension_override_by_name("batch", batch_size)
    try:
        # With its own fallback, ONNX Runtime would print a message and retry with another provider.
        return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime has an exception class per status code
        first_line = (str(error).splitlines() or [""])[0][:160]
        raise InputError(f"ONNX Runtime cannot read the model: {first_line}") from error
