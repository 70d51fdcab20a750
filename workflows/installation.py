"""What is installed here and on what it runs: revision of the code, versions of packages, hardware.

Imports none of the packages that it reports, so that it works where one of them is missing or broken.
"""

import functools
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from diffusion.files import package_version

_PACKAGES = ("ray-ddpm", "torch", "ray", "mlflow", "onnx", "numpy")
_TIMEOUT_SECONDS = 10.0


def git_state(file: Path) -> tuple[str | None, bool | None]:
    """Revision of the git repository that tracks a file, and whether its tracked files are unchanged.

    Both are None without git, and for a file that no repository tracks: an environment with an installed
    package can lie inside a repository of other code. Untracked files do not count, as in
    `git describe --dirty`.
    """

    def git(*arguments: str) -> str:
        # Without optional locks, `git status` cannot collide with what the user does in the repository.
        return _output("git", "--no-optional-locks", "-C", str(file.parent), *arguments)

    try:
        git("ls-files", "--error-unmatch", file.name)
        revision = git("rev-parse", "HEAD")
        return revision, not git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None, None


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that compute; None for one that is not installed."""
    return {
        "python": platform.python_version(),
        **{name: package_version(name) for name in _PACKAGES},
        # Two distributions of the same package, of which one is installed.
        "onnxruntime": package_version("onnxruntime-gpu") or package_version("onnxruntime"),
    }


@functools.cache
def hardware() -> dict[str, Any]:
    """CPU model, number of cores, memory in GB and names of the NVIDIA GPUs of this machine.

    On a cluster this is the machine that started the run.
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": _memory_gb(),
        "gpus": _gpu_names(),
    }


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def _gpu_names() -> list[str]:
    # Not by torch.cuda, which would occupy memory of a GPU in a process that does not train.
    try:
        return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _output(*command: str) -> str:
    """What a command prints.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be run, fails, or takes too long.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS)
    return result.stdout.strip()
