"""Report on this installation, for a bug report: `ray-ddpm doctor`, `make doctor`.

Each part is found out for itself: a package that is missing or broken hides nothing of the others, so none is
imported above. The report has no passwords and keys, and ~ for the home folder.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from diffusion.errors import InputError, printable
from diffusion.files import package_version, path_kind, user_path
from diffusion.memory_limit import machine_memory
from export.parser import OneLineParser
from workflows.cli.process import run
from workflows.environment import (
    cache_folder,
    default_output_dir,
    ray_address,
    reported_variables,
    set_defaults,
)
from workflows.installation import git_state, hardware
from workflows.redaction import redact

_INDENT = 14
_WIDTH = 110
_SECONDS_TO_START_RAY = 120.0
_LOW_DISK_BYTES = 2e9
_EXTRA = {"MLflow": "mlflow", "PyTorch": "torch", "Ray": "ray"}  # parts that come with an extra
# In a process of its own, since a start that hangs or crashes must not take the report along.
_START_RAY = """
import json
from workflows.environment import set_defaults
set_defaults(verbose=False)
import ray
from workflows.ray_runtime.session import start_ray, stop_ray
start_ray(verbose=False)
print("\\n" + json.dumps([len(ray.nodes()), ray.cluster_resources()]))
stop_ray()
"""


class _Broken(Exception):
    """A part of the installation does not work; the message says why."""


def main(arguments: Sequence[str], prog: str = "python -m workflows.doctor") -> int:
    """Print the report, and return the exit status: 1 if something does not work.

    Args:
        arguments: command-line arguments.
        prog: name of the command in its help.
    """
    parser = OneLineParser(
        prog=prog, description="Report on this installation, on one page, for a bug report."
    )
    default = default_output_dir()
    parser.add_argument("--output-dir", default=default, help=f"parent of runs (default: {default})")
    parser.add_argument(
        "--tracking-uri",
        help="MLflow server or database (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)",
    )
    options = parser.parse_args(arguments)
    settings = reported_variables()  # before others get their defaults
    set_defaults(verbose=False)
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "ray-ddpm": _version,
        "system": _system,
        "hardware": _hardware,
        "packages": _packages,
        "plug-ins": _plugins,
        "settings": lambda: iter([" ".join(f"{name}={value}" for name, value in settings.items()) or "none"]),
        "disk": lambda: _disks(options.output_dir),
        "MLflow": lambda: _tracking(options.tracking_uri),
        "ONNX Runtime": _onnxruntime,
        "PyTorch": _torch,
        "Ray": _ray,
    }
    broken = []
    for subject, part in parts.items():
        if subject in _EXTRA and not _is_installed(_EXTRA[subject]):
            _print_line(subject, "not installed: pip install 'ray-ddpm[train]'")
        elif not _print_part(subject, part):
            broken.append(subject)
    print(f"does not work: {', '.join(broken)}" if broken else "All of this works.")
    return 1 if broken else 0


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def _print_part(subject: str, part: Callable[[], Iterator[str]]) -> bool:
    """Print what a part finds out, as far as it gets, and return whether it works."""
    works = True
    first = subject
    try:
        for line in part():
            _print_line(first, line)
            first = ""
    except (_Broken, InputError) as error:
        works = False
        _print_line(first, f"DOES NOT WORK: {error}")
    except Exception as error:  # a broken package can raise anything
        works = False
        _print_line(first, f"DOES NOT WORK: {type(error).__name__}: {error}")
    return works


def _print_line(subject: str, text: str) -> None:
    home = str(Path.home())
    text = redact(printable(" ".join(text.split())))
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    for number, line in enumerate(
        textwrap.wrap(text[:2000], _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False) or [""]
    ):
        print(f"{'' if number else subject:<{_INDENT}}{line}", flush=True)


def _version() -> Iterator[str]:
    revision, clean = git_state(Path(__file__))
    code = "not in a git repository"
    if revision is not None:
        code = f"revision {revision}{'' if clean else ', with changed files'}"
    yield f"{package_version('ray-ddpm') or 'not installed as a package'}; {code}"
    yield f"in {Path(__file__).parents[1]}"


def _system() -> Iterator[str]:
    yield f"{platform.platform()}, Python {platform.python_version()} ({platform.python_implementation()})"
    yield f"{sys.executable}, in {Path.cwd()}"


def _hardware() -> Iterator[str]:
    found, memory = hardware(), machine_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else found["cores"]
    limit = f", of which this process may use {usable}" if usable != found["cores"] else ""
    yield f"{found['cores']} cores{limit}: {found['cpu']}"
    total = found["memory_gb"]
    if memory is not None and total is not None and memory < 0.95e9 * total:
        yield f"{total:g} GB memory, of which a container has {memory / 1e9:.1f}"
    elif total is not None:
        yield f"{total:g} GB memory"
    yield f"NVIDIA GPUs: {', '.join(found['gpus']) or 'none'}"


def _packages() -> Iterator[str]:
    """Versions of the packages that this one requires, its extras included, by its own metadata."""
    try:
        required = importlib.metadata.requires("ray-ddpm") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    names = {"numpy", "onnxruntime", "torch", "ray", "mlflow", "onnx"}
    names |= {re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in required}
    names -= {"onnxruntime"} if package_version("onnxruntime-gpu") else {"onnxruntime-gpu"}
    versions = {name: package_version(name) for name in sorted(names - {"ray-ddpm"})}
    yield ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    missing = [name for name, version in versions.items() if not version]
    yield f"not installed: {', '.join(missing) or 'none'}"


def _plugins() -> Iterator[str]:
    """What other packages add to the project's registries."""
    points = importlib.metadata.entry_points()
    groups = sorted(group for group in points.groups if group.startswith("ray_ddpm."))
    found = [
        f"{group.removeprefix('ray_ddpm.')}: {', '.join(sorted(points.select(group=group).names))}"
        for group in groups
    ]
    yield "; ".join(found) or "none"


def _disks(output_dir: str) -> Iterator[str]:
    folders = {"temporary files": Path(tempfile.gettempdir()), "cache": cache_folder()}
    if "://" in output_dir:
        yield f"runs: {output_dir}"
    else:
        folders = {"runs": user_path(output_dir)} | folders
    if sys.platform == "linux":
        folders["Ray's objects"] = Path("/dev/shm")
    problems = []
    for purpose, folder in folders.items():
        existing = next(each for each in (folder, *folder.parents) if path_kind(each) is not None)
        usage = shutil.disk_usage(existing)
        yield f"{purpose}: {usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free in {folder}"
        if not os.access(existing, os.W_OK):
            problems.append(f"{existing} is not writable")
        elif usage.free < _LOW_DISK_BYTES and purpose != "Ray's objects":
            problems.append(f"less than {_LOW_DISK_BYTES / 1e9:.0f} GB are free for {purpose}")
    if problems:
        raise _Broken("; ".join(problems))


def _tracking(tracking_uri: str | None) -> Iterator[str]:
    from workflows.tracking.local_database import database_of
    from workflows.tracking.tracker import resolve_tracking_uri, tracker_class

    uri = resolve_tracking_uri(tracking_uri)
    database = database_of(uri)
    exists = database is None or path_kind(database) == "file"
    tracker_class(uri).check_store(uri, may_create=exists)
    if database is None:
        yield f"{uri} answers"
    elif exists:
        yield f"{uri} can be used, {database.stat().st_size / 1e6:.1f} MB"
    else:
        yield f"{uri} does not exist yet, and can be made"


def _onnxruntime() -> Iterator[str]:
    from export.doctor import doctor_report

    lines, works = doctor_report()
    yield from lines
    if not works:
        raise _Broken("no samples can be drawn")


def _torch() -> Iterator[str]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
    yield f"built for {build}, {torch.get_num_threads()} threads"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    yield f"GPUs: {', '.join(devices) or 'none'}"
    total = float(torch.ones(4, 4, device="cuda" if torch.cuda.is_available() else "cpu").sum())
    if total != 16.0:
        raise _Broken(f"a sum of 16 ones is {total:g}")
    if hardware()["gpus"] and not torch.cuda.is_available():
        yield "it cannot use this machine's NVIDIA GPU: install its CUDA build, or a newer driver"


def _ray() -> Iterator[str]:
    address = ray_address()
    what = f"the cluster {address} can be joined" if address else "starts"
    try:
        result = subprocess.run(
            [sys.executable, "-c", _START_RAY],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=_SECONDS_TO_START_RAY,
        )
    except subprocess.TimeoutExpired as error:
        raise _Broken(f"it has not started within {_SECONDS_TO_START_RAY:.0f} s") from error
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise _Broken(f"status {result.returncode}: {lines[-1] if lines else 'no message'}")
    num_nodes, resources = json.loads(result.stdout.strip().splitlines()[-1])
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    yield f"{what}; machines: {num_nodes}, CPU cores: {cpus:g}, GPUs: {gpus:g}"


if __name__ == "__main__":
    run(main)
