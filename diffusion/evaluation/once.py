"""Values that are computed once for each tensor."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

_KNOWN = WeakIdKeyDictionary()


def once(tensor: Tensor, key: object, compute: Callable[[], Any], *, other: Tensor | None = None) -> Any:
    """The value that was computed for this tensor and key, unless the tensor has been changed since.

    Samples of several models are compared with the same reference, and with each other: what depends on one
    of them alone costs more than the rest. Values are forgotten with their tensor.

    Args:
        tensor: what the value depends on.
        key: what is computed.
        compute: computes the value.
        other: another tensor that the value depends on.
    """
    known = _KNOWN.setdefault(tensor, {})
    full_key = key, other if other is None else WeakIdRef(other)
    versions = tensor._version, other if other is None else other._version
    if known.get(full_key, (None, None))[0] != versions:
        known[full_key] = versions, compute()
    return known[full_key][1]
