"""The device that a process computes on, and float64 on devices that lack it."""

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = frozenset({"mps"})


def default_device(*, use_cuda: bool = True, num_workers: int = 1) -> torch.device:
    """The fastest device of this process: cuda, else mps (Apple's GPUs), else cpu.

    Args:
        use_cuda: whether this process may use a GPU of NVIDIA; one worker of several that share a machine
            may have none.
        num_workers: number of data-parallel workers. With several, mps is not used: gloo, the process
            group's backend without NCCL, exchanges tensors in main memory only.
    """
    if use_cuda and torch.cuda.is_available():
        return torch.device("cuda")
    if num_workers == 1 and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def has_float64(device: torch.device) -> bool:
    """Whether tensors on a device can have dtype float64; on mps they cannot."""
    return device.type not in _WITHOUT_FLOAT64


def cpu_has_bf16() -> bool:
    """Whether PyTorch computes in bfloat16 on this CPU by its instructions (AVX512 and later, some of ARM's).

    Without, a product in bfloat16 takes about a hundred times as long as one in float32.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it: for what must stay on the device."""
    return torch.float64 if has_float64(device) else torch.float32


def to_float64(values: Tensor) -> Tensor:
    """The values in float64, moved to the CPU if their device has no float64: for metrics."""
    return (values if has_float64(values.device) else values.cpu()).double()
