"""Opens ONNX Runtime sessions on the CPU or a GPU."""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import onnxruntime

from diffusion.errors import InputError
from export.device_thread import device_thread
from export.values import whole_number

Provider = Literal["auto", "cpu", "cuda", "tensorrt", "coreml", "openvino"]
Arena = Literal["kSameAsRequested", "kNextPowerOfTwo"]

DRIVER_LIBRARY = "nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1"

_CUDA = "CUDAExecutionProvider"
# Providers of ONNX Runtime that are used if they are asked for by name.
_BY_NAME = {"tensorrt": "TensorrtExecutionProvider", "coreml": "CoreMLExecutionProvider"}
_CPU = "CPUExecutionProvider"
_MISSING_FOLDER = os.path.join(os.devnull, "none")
# Matrix products of a smaller model are finished before a second thread wakes up, unlike convolutions.
_MIN_BYTES_FOR_THREADS = 1_000_000
# The operator as a node of an ONNX file names it: tag of the field op_type, length, name.
_CONVOLUTION = b'"\x04Conv'
_MIN_FOLDING_LIMIT = 2**26


@dataclass(frozen=True)
class DeviceOptions:
    """How a GPU is used.

    Attributes:
        device_id: number of the GPU.
        memory_limit: bytes that ONNX Runtime's arena may take of it; None for no limit. cuDNN's and cuBLAS's
            own memory is not in it.
        arena: how the arena grows: by what is asked for, or to the next power of two.
        tf32: whether products and convolutions may use TF32, of 10 bits, which is faster and moves samples by
            about 5e-4 standard deviations.
    """

    device_id: int = 0
    memory_limit: int | None = None
    arena: Arena = "kSameAsRequested"
    tf32: bool = False

    def __post_init__(self) -> None:
        whole_number("device_id", self.device_id, 0, 1023)
        if self.memory_limit is not None and not self.memory_limit > 0:
            raise InputError(f"memory_limit {self.memory_limit}: give a number greater than 0")
        if self.arena not in get_args(Arena):
            raise InputError(f"arena {self.arena!r}: choose one of {', '.join(get_args(Arena))}")

    def of_cuda(self, *, captures: bool = False) -> dict[str, str]:
        """Options of ONNX Runtime's CUDA provider; `captures`: whether launches become CUDA graphs."""
        return {
            "device_id": str(self.device_id),
            "arena_extend_strategy": self.arena,
            "use_tf32": str(int(self.tf32)),
            # Its default times every algorithm for each size of a batch, with as much memory as there is.
            "cudnn_conv_algo_search": "HEURISTIC",
            "enable_cuda_graph": str(int(captures)),
            **({} if self.memory_limit is None else {"gpu_mem_limit": str(self.memory_limit)}),
        }


def open_session(
    model: bytes,
    provider: Provider,
    threads: int | None = None,
    options: DeviceOptions | None = None,
    on_cpu: onnxruntime.InferenceSession | None = None,
) -> tuple[onnxruntime.InferenceSession, str]:
    """Open a model for any batch size.

    Args:
        model: bytes of the ONNX file; a model that refers to other files is rejected.
        provider: "cpu"; "cuda", "tensorrt" or "coreml", which fail if they are not available; or "auto",
            which uses CUDA if it is available and the CPU otherwise.
        threads: number of CPU threads; None is one for a tiny model without convolutions, otherwise one per
            core.
        options: how a GPU is used.
        on_cpu: session on the CPU to which "auto" falls back; None to open one.

    Returns:
        The session, and a description of what it runs on: the provider's name, such as "CPU" or "CUDA",
        followed by the reason if "auto" fell back to the CPU.

    Raises:
        InputError: the bytes are not an ONNX model, or the provider is not available.
    """
    options = options or DeviceOptions()
    if provider == "cpu":
        return _session(model, [_CPU], threads), "CPU"
    if provider in _BY_NAME:
        return _open_by_name(model, provider, threads, options)
    reason = cuda_unavailable_reason(options.device_id)
    if reason is None:
        reason = "ONNX Runtime could not load its CUDA libraries (CUDA 13 and cuDNN 9)"
        try:
            session = (
                device_thread("cuda", options.device_id)
                .submit(_session, model, [(_CUDA, options.of_cuda()), _CPU], threads)
                .result()
            )
            if session.get_providers()[0] == _CUDA:
                return session, "CUDA with TF32" if options.tf32 else "CUDA"
        except InputError as error:  # a corrupt file fails again below, on the CPU
            reason = str(error)
    if provider == "cuda":
        raise InputError(
            f"provider cuda: {reason}; use provider auto or cpu, or install ray-ddpm[gpu] "
            "(for details: python -m export.sampler --doctor)"
        )
    return on_cpu or _session(model, [_CPU], threads), f"CPU, since {reason}"


def _open_by_name(
    model: bytes, provider: Provider, threads: int | None, options: DeviceOptions
) -> tuple[onnxruntime.InferenceSession, str]:
    name, available = _BY_NAME[provider], onnxruntime.get_available_providers()
    remedy = "use provider auto or cpu"
    if name not in available:
        raise InputError(f"provider {provider}: this build of ONNX Runtime has no {name}; {remedy}")
    if provider == "tensorrt":
        reason = cuda_unavailable_reason(options.device_id)
        if reason is not None:
            raise InputError(f"provider {provider}: {reason}; {remedy}")
        providers: list[Any] = [
            (name, {"device_id": str(options.device_id)}),
            (_CUDA, options.of_cuda()),
            _CPU,
        ]
        opened = device_thread("cuda", options.device_id).submit(_session, model, providers, threads)
        session = opened.result()
    else:
        session = _session(model, [name, _CPU], threads)
    if session.get_providers()[0] != name:
        raise InputError(f"provider {provider}: ONNX Runtime could not load its libraries; {remedy}")
    return session, {"tensorrt": "TensorRT", "coreml": "CoreML"}[provider]


def open_device_session(
    model: bytes, device: str, options: DeviceOptions, *, whole: bool = False
) -> onnxruntime.InferenceSession:
    """Open a model for any batch size on "cuda" or "cpu", from the device's thread.

    Args:
        model: bytes of the ONNX file, as for `open_session`.
        device: "cuda" or "cpu".
        options: how a GPU is used.
        whole: whether a model is refused of which some operators would run on the CPU.

    Raises:
        InputError: the model cannot be opened, or not on the device.
    """
    return _on_device(model, device, options.of_cuda(), None, whole)


def open_static_session(
    model: bytes, sizes: Mapping[str, int], device: str, options: DeviceOptions
) -> onnxruntime.InferenceSession:
    """Open a model for one batch size; on "cuda" its kernel launches are captured as one CUDA graph.

    Args:
        model: bytes of the ONNX file, as for `open_session`.
        sizes: fixed sizes of symbolic dimensions.
        device: "cuda" or "cpu".
        options: how a GPU is used.

    Raises:
        InputError: the model cannot be opened, or not on the device.
    """
    return _on_device(model, device, options.of_cuda(captures=True), sizes, False)


def _on_device(
    model: bytes, device: str, cuda: dict[str, str], sizes: Mapping[str, int] | None, whole: bool
) -> onnxruntime.InferenceSession:
    if device != "cuda":
        return _session(model, [_CPU], None, sizes)
    # The CPU may not be listed where no operator may fall back to it.
    providers: list[Any] = [(_CUDA, cuda)] if whole else [(_CUDA, cuda), _CPU]
    session = _session(model, providers, None, sizes, whole)
    if session.get_providers()[0] != _CUDA:
        raise InputError("ONNX Runtime opened the model on the CPU instead of CUDA")
    return session


def has_convolutions(model: bytes) -> bool:
    """Whether an ONNX file has convolutions, by which threads and batches are chosen."""
    return _CONVOLUTION in model


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda_unavailable_reason(device_id: int = 0) -> str | None:
    """Return why CUDA cannot be used on a GPU, or None if a session may be tried.

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
    if device_id >= count.value:
        return f"there is no GPU {device_id}, the last one is {count.value - 1}"
    onnxruntime.preload_dlls()
    return None


def _session(
    model: bytes,
    providers: list[Any],
    threads: int | None,
    sizes: Mapping[str, int] | None = None,
    whole: bool = False,
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
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    if whole:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        # With its own fallback, ONNX Runtime would print a message and retry with another provider.
        return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime has an exception class per status code
        first_line = (str(error).splitlines() or [""])[0][:160]
        raise InputError(f"ONNX Runtime cannot read the model: {first_line}") from error
