"""How much memory this machine has, to refuse what cannot fit before it is allocated.

An allocation that is too large often succeeds, and the process is killed when it uses the memory.
"""

import functools
import os
from contextlib import suppress
from pathlib import Path

from diffusion.errors import InputError

# Files in which Linux states the limit of a container, of control groups version 2 and 1.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@functools.cache
def machine_memory() -> int | None:
    """Bytes of memory that this machine, or the container that the process is in, has; None if unknown."""
    sizes = []
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            sizes.append(int(Path(name).read_text()))
    return min((size for size in sizes if size > 0), default=None)


def check_memory(needed: float, what: str, remedy: str, available: int | None = None) -> None:
    """Check that something can fit into memory at all.

    Args:
        needed: bytes that it needs.
        what: what needs them, to begin the message.
        remedy: what to do, to end the message.
        available: bytes that there are; None for all of this machine's.

    Raises:
        InputError: it needs more.
    """
    available = machine_memory() if available is None else available
    if available is not None and needed > available:
        raise InputError(
            f"{what} needs {_gigabytes(needed)} of memory, and there are {_gigabytes(available)}: {remedy}"
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"
